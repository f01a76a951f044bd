"""Attention on a GPU, by cuDNN and by the kernels in tiles, against the specification in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import Array, dtype_of, to_host, wide
from hpcmp.documents import First
from hpcmp.kernels.cuda import attention as cuda
from hpcmp.kernels.cuda import cudnn
from hpcmp.random import DropoutMask
from tests.kernels.test_cuda_attention import SCALE, TOLERANCE, Case, close
from tests.kernels.test_cuda_attention_documents import block, documents

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(params=["cudnn", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By which of the two; the specification is no way out."""
    monkeypatch.setenv("HPCMP_CUDNN", "auto" if request.param == "cudnn" else "no")
    monkeypatch.setattr(cuda, "_specification", None)
    cudnn.library.cache_clear()
    if request.param == "cudnn" and cudnn.library() is None:
        pytest.skip("cuDNN, or nvidia-cudnn-frontend, is not installed")
    yield str(request.param)
    cudnn.library.cache_clear()


def put(x: Any) -> Any:
    import cupy

    return cupy.asarray(x)


def mask_of(case: Case) -> DropoutMask | None:
    m = case.mask
    return m and DropoutMask(m.rate, m.key, put(m.i), put(m.j), m.runs, put(m.extra))


def first_of(documents: First | None) -> First | None:
    import cupy

    return documents and First.of(documents.host, cupy)


def check(case: Case) -> None:
    q, kv, do, o, lse = map(put, (case.q, case.kv, case.do, case.o, case.lse))
    settings = SCALE, mask_of(case), case.causal, first_of(case.documents)
    found_o, found_lse = cuda.attention(q, kv, *settings)
    gradients = cuda.attention_backward(do, q, kv, o, lse, *settings)
    assert found_o.dtype == case.dtype and found_lse.dtype == wide(case.dtype)
    close(to_host(found_o), case.expected[0], case.tolerance)
    close(to_host(found_lse), case.expected[1], max(TOLERANCE[wide(case.dtype).name], 1e-13))
    for found, wanted in zip(gradients, case.gradients, strict=True):
        close(to_host(found), wanted, case.tolerance)


@pytest.mark.parametrize("name", TOLERANCE)
def test_it_is_what_the_specification_says(name: str, way: str) -> None:
    check(Case(name, 1, 1, causal=True))
    check(Case(name, 13, 1, (3, 3), 8))
    check(Case(name, 1, 70, (3, 1), 64))
    check(Case(name, 131, 131, (2, 1), 40, causal=True))
    check(Case(name, 67, 150, (2, 2), 48))
    check(Case(name, 300, 300, (8, 2), 128, causal=True))
    check(Case(name, 75, 75, (2, 1), 256, causal=True))


@pytest.mark.parametrize("name", TOLERANCE)
def test_dropout(name: str, way: str) -> None:
    """Which the kernels in tiles draw, also beside cuDNN."""
    check(Case(name, 70, 70, causal=True, rate=0.3, runs=1, first=0))
    check(Case(name, 33, 75, rate=0.5, first=2))
    check(Case(name, 150, 150, (4, 1), 128, causal=True, rate=0.1))


@pytest.mark.parametrize("name", TOLERANCE)
def test_documents(name: str, way: str) -> None:
    """At random and of one position, of heads in groups; blocks of keys that some queries do not see; dropout."""
    borders, tiles = ((1, 2, 31, 64, 65, 128, 140), (32, 33, 63, 127, 129, 140)), tuple(range(64, 513, 64))
    for s, heads, d in ((300, (8, 2), 128), (700, (4, 4), 64), (75, (2, 1), 256), (1024, (3, 1), 80)):
        draw = np.random.default_rng(s)
        ends = [(*sorted({*draw.integers(1, s, n).tolist()}), s) for n in (9, 1)]
        check(Case(name, s, s, heads, d, causal=True, documents=documents(*ends)))
    check(Case(name, 140, 140, (2, 1), 32, causal=True, documents=documents(*borders)))
    check(Case(name, 512, 512, (2, 2), 64, causal=True, documents=documents(tiles, (512,))))
    check(Case(name, 70, 100, (2, 1), documents=block(70, 100, 0)))
    check(Case(name, 300, 260, (2, 2), 128, documents=block(300, 260, 1)))
    check(Case(name, 40, 75, documents=block(40, 75, 1), rate=0.5))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_documents_are_made_by_cudnn(name: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Where it takes them: forward and backward, and nothing else does."""
    if way != "cudnn" or not cudnn.library().takes_documents:
        pytest.skip("cuDNN takes no documents here")
    monkeypatch.setattr(cuda, "_launch", None)
    check(Case(name, 300, 300, (8, 2), 128, causal=True, documents=documents((5, 120, 300), (300,))))
    check(
        Case(name, 1000, 1000, (4, 4), 64, causal=True, documents=documents(tuple(range(8, 1001, 8)), (1, 999, 1000)))
    )


def test_short_documents_take_less_time(way: str) -> None:
    """Of 8192 positions, 64 documents: less than half of one document's time, forward and backward."""
    import cupy

    q = cupy.ones((8192, 1, 16, 64), dtype_of("float16"))
    kv = cupy.ones((8192, 1, 16, 2, 64), dtype_of("float16"))
    times = []
    for first in (None, first_of(documents(tuple(range(128, 8193, 128))))):
        marks = [cupy.cuda.Event() for _ in range(2)]
        for turn in range(4):
            if turn == 1:  # the first call compiles
                marks[0].record()
            o, lse = cuda.attention(q, kv, 0.125, first=first)
            cuda.attention_backward(q, q, kv, o, lse, 0.125, first=first)
        marks[1].record()
        marks[1].synchronize()
        times.append(cupy.cuda.get_elapsed_time(*marks))
    assert times[1] < times[0] / 2


def test_packed_arrays(way: str) -> None:
    """Read where they lie, as projections leave them."""
    case = Case("bfloat16", 90, 90, (4, 2), 64, causal=True)
    s, b, n, d = case.q.shape
    packed = put(np.concatenate([case.q.reshape(s, b, -1), case.kv.reshape(s, b, -1)], -1))
    q, kv = packed[..., : n * d].reshape(s, b, n, d), packed[..., n * d :].reshape(s, b, 2, 2, d)
    close(to_host(cuda.attention(q, kv, SCALE)[0]), case.expected[0], case.tolerance)


@pytest.mark.parametrize("apart", [None, documents((200, 333, 700), (1, 2, 700))], ids=["joined", "apart"])
def test_the_bits_are_the_same_in_every_run(way: str, apart: First | None) -> None:
    def run() -> list[Array]:
        draw = np.random.default_rng(0)
        q, do = (put(draw.normal(size=(700, 2, 8, 128)).astype(dtype_of("bfloat16"))) for _ in range(2))
        kv = put(draw.normal(size=(700, 2, 2, 2, 128)).astype(dtype_of("bfloat16")))
        first = first_of(apart)
        o, lse = cuda.attention(q, kv, SCALE, first=first)
        return [to_host(x) for x in (o, lse, *cuda.attention_backward(do, q, kv, o, lse, SCALE, first=first))]

    before = run()
    for _ in range(4):
        for here, there in zip(run(), before, strict=True):
            np.testing.assert_array_equal(here, there)


def test_no_memory_of_the_size_of_the_scores(way: str) -> None:
    """Of 4096 x 4096 scores a head, 16 heads: 512 MiB in 16 bits."""
    import cupy

    q = cupy.ones((4096, 1, 16, 64), dtype_of("float16"))
    kv = cupy.ones((4096, 1, 16, 2, 64), dtype_of("float16"))
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    o, lse = cuda.attention(q, kv, 0.125)
    cuda.attention_backward(q, q, kv, o, lse, 0.125)
    assert pool.total_bytes() - before < 200 << 20


@pytest.mark.parametrize("name", TOLERANCE)
def test_merging(name: str) -> None:
    whole = Case(name, 21, 60)
    q, kv = put(whole.q), put(whole.kv)
    parts = [cuda.attention(q, kv[cut], SCALE, None, False) for cut in (slice(0, 17), slice(17, 60))]
    o, lse = cuda.merge_attention(*parts[0], *parts[1])
    close(to_host(o), whole.expected[0], whole.tolerance)
    close(to_host(lse), whole.expected[1], max(TOLERANCE[wide(whole.dtype).name], 1e-13))
