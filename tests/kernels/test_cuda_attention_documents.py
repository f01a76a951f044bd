"""The CUDA kernels of attention where a query sees the keys of its own document alone, run on the CPU."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hpcmp.documents import First
from hpcmp.kernels.cuda import attention as cuda
from tests.kernels.emulation.backend import emulated, needs_gxx
from tests.kernels.test_cuda_attention import SCALE, TOLERANCE, Case, close, no_specification

pytestmark = [needs_gxx, pytest.mark.timeout(300)]
__all__ = ["no_specification"]


def documents(*ends: tuple[int, ...]) -> First:
    """Of each sample, where its documents end: every query sees its own from the beginning."""
    return First.of(np.array([sum(([a] * (e - a) for a, e in pairwise((0, *one))), []) for one in ends]), np)


def block(s: int, t: int, seed: int) -> First:
    """Of two samples, any block of keys: from the first query on, and after the last, some see none."""
    draw = np.random.default_rng((s, t, seed))
    host = np.sort(draw.integers(0, t + t // 2 + 1, (2, s)), 1)
    host[0, : s // 3] = 0
    return First.of(host, np)


@pytest.mark.parametrize("name", TOLERANCE)
def test_documents_that_end_on_and_beside_the_borders_of_tiles(name: str) -> None:
    """Of one query, of a tile and more; the tiles of all types end after 32, 64 or 128 rows."""
    ends = (1, 2, 31, 64, 65, 128, 140), (32, 33, 63, 127, 129, 140)
    Case(name, 140, 140, (2, 1), documents=documents(*ends), causal=True).check()


@pytest.mark.parametrize("name", TOLERANCE)
def test_blocks_of_keys_some_of_which_no_query_sees(name: str) -> None:
    """As on a ring: a query that sees none has zeros, -inf and no gradient, nor has a sample without any."""
    Case(name, 70, 100, (2, 1), documents=block(70, 100, 0)).check()
    Case(name, 33, 40, (3, 3), 5, documents=First.of(np.array([[0] * 33, [40] * 33]), np)).check()
    Case(name, 9, 5, documents=First.of(np.array([[5] * 9, [2**31 - 1] * 9]), np)).check()


@pytest.mark.parametrize("name", TOLERANCE)
def test_beside_dropout(name: str) -> None:
    ends = (3, 67, 75), (75,)
    Case(name, 75, 75, (2, 2), documents=documents(*ends), causal=True, rate=0.3).check()
    Case(name, 40, 75, documents=block(40, 75, 1), rate=0.5).check()


@pytest.mark.parametrize(("name", "d"), [("float32", 96), ("float32", 256), ("bfloat16", 128), ("float16", 256)])
def test_large_heads(name: str, d: int) -> None:
    Case(name, 75, 75, (2, 1), d, documents=documents((16, 17, 75), (33, 64, 75)), causal=True).check()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", TOLERANCE)
def test_tiles_that_do_not_see_each_other_are_not_visited(name: str, causal: bool) -> None:
    """NaN in the one document would be seen in the other, were a tile of it multiplied by zeros there."""
    both = documents((128, 160), (128, 160))
    case = Case(name, 160, 160, (2, 1), 8, documents=both, causal=causal)
    early, late = slice(0, 128), slice(128, 160)
    for here, there in ((early, late), (late, early))[not causal :]:  # if not causal, early queries see late keys
        q, kv, do, o, lse = (x.copy() for x in (case.q, case.kv, case.do, case.o, case.lse))
        kv[there], q[there], do[there], lse[..., there] = np.nan, np.nan, np.nan, np.nan
        with emulated():
            found = cuda.attention(q, kv, SCALE, None, causal, both)[0]
            dq, dkv = cuda.attention_backward(do, q, kv, o, lse, SCALE, None, causal, both)
        close(found[here], case.expected[0][here], case.tolerance)
        close(dq[here], case.gradients[0][here], case.tolerance)
        if causal:
            close(dkv[here], case.gradients[1][here], case.tolerance)


def test_blocks_of_keys_with_documents_make_the_whole() -> None:
    """Merged, with a block that some queries do not see."""
    whole = Case("float64", 21, 60, documents=First.of(np.sort(np.arange(42).reshape(2, 21) * 7 % 55, 1), np))
    assert whole.documents is not None
    o, lse = np.zeros_like(whole.q), np.full(whole.lse.shape, -np.inf)
    dq, dkv = np.zeros_like(whole.q), np.zeros_like(whole.kv)
    cuts = slice(0, 17), slice(17, 60)
    firsts = [First.of(np.maximum(whole.documents.host - cut.start, 0), np) for cut in cuts]
    with emulated():
        for cut, first in zip(cuts, firsts, strict=True):
            part = cuda.attention(whole.q, whole.kv[cut], SCALE, None, False, first)
            o, lse = cuda.merge_attention(o, lse, *part)
        for cut, first in zip(cuts, firsts, strict=True):
            backward = whole.do, whole.q, whole.kv[cut], o, lse, SCALE, None, False, first
            add, dkv[cut] = cuda.attention_backward(*backward)
            dq += add
    for found, wanted in zip((o, lse, dq, dkv), (*whole.expected, *whole.gradients), strict=True):
        close(found, wanted, whole.tolerance)


def test_more_runs_of_keys_than_kernels_take_are_done_otherwise() -> None:
    Case("bfloat16", 20, 20, rate=0.5, runs=3, documents=documents((7, 20), (20,)), causal=True).check()
