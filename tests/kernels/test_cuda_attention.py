"""The CUDA kernels of attention, run on the CPU, against the specification in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import Array, dtype_of, wide
from hpcmp.documents import First
from hpcmp.kernels import attention as specification
from hpcmp.kernels.cuda import attention as cuda
from hpcmp.random import DropoutMask
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]

#: Largest error allowed, of the largest number of a result: several roundings of the type.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}
SCALE = 0.3


class Case:
    """Arguments of one call, and what the specification makes of them in float64."""

    def __init__(
        self, name: str, s: int, t: int, heads: tuple[int, int] = (4, 2), d: int = 24, causal: bool = False,
        rate: float = 0.0, runs: int = 2, first: int = 2, documents: First | None = None,
    ) -> None:  # fmt: skip
        self.dtype, self.causal, self.documents, batch = dtype_of(name), causal, documents, 2
        self.tolerance = TOLERANCE[name]
        draw, (n, k) = np.random.default_rng((s, t, d)), heads
        self.q, self.do = (draw.normal(size=(s, batch, n, d)).astype(self.dtype) for _ in range(2))
        self.kv = draw.normal(size=(t, batch, k, 2, d)).astype(self.dtype)
        self.mask = dropout(rate, s, batch, n, t, runs, first) if rate else None
        arguments = (x.astype(np.float64) for x in (self.q, self.kv))
        o, lse = specification.attention(*arguments, SCALE, self.mask, causal, documents)
        self.expected = o, lse
        self.o, self.lse = o.astype(self.dtype), lse.astype(wide(self.dtype))
        wider = (x.astype(np.float64) for x in (self.do, self.q, self.kv))
        self.gradients = specification.attention_backward(*wider, o, lse, SCALE, self.mask, causal, documents)

    def check(self) -> None:
        with emulated():
            settings = SCALE, self.mask, self.causal, self.documents
            o, lse = cuda.attention(self.q, self.kv, *settings)
            gradients = cuda.attention_backward(self.do, self.q, self.kv, self.o, self.lse, *settings)
        assert o.dtype == self.dtype and lse.dtype == wide(self.dtype)
        close(o, self.expected[0], self.tolerance)
        close(lse, self.expected[1], max(TOLERANCE[wide(self.dtype).name], 1e-13))
        for found, wanted in zip(gradients, self.gradients, strict=True):
            assert found.dtype == self.dtype
            close(found, wanted, self.tolerance)


def dropout(rate: float, s: int, b: int, n: int, t: int, runs: int, first: int) -> DropoutMask:
    """Keys in a few runs, of which the first begins at ``first``."""
    ends = [t * (i + 1) // runs for i in range(runs)]
    columns = tuple(
        slice(first + 9 * i + a, first + 9 * i + e) for i, (a, e) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    )
    return DropoutMask(rate, (5, 6), np.arange(s) + 3, np.arange(b)[:, None, None], columns, np.arange(n)[:, None])


def close(found: Array, wanted: Array, tolerance: float) -> None:
    """To a share of the largest number, or of one; -inf, the log-sum-exp of no key, is itself."""
    assert found.shape == wanted.shape
    found, wanted = (np.where(wanted == -np.inf, x == -np.inf, x) for x in (found.astype(np.float64), wanted))
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.fixture(autouse=True)
def no_specification(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The kernels do it, and no other way is taken unseen."""
    if "otherwise" not in request.node.name:
        monkeypatch.setattr(cuda, "_specification", None)
    monkeypatch.setenv("HPCMP_CUDNN", "no")
    cuda.cudnn.library.cache_clear()


@pytest.mark.parametrize("name", TOLERANCE)
def test_sizes_that_are_no_multiple_of_anything(name: str) -> None:
    """One tile and several, one query or key, heads of a group of their own, in groups, and one group for all."""
    Case(name, 1, 1, causal=True).check()
    Case(name, 13, 1, (3, 3), 5).check()
    Case(name, 1, 70, (3, 1), 64).check()
    Case(name, 131, 131, (2, 1), 40, causal=True).check()
    Case(name, 67, 150, (2, 2), 48).check()


@pytest.mark.parametrize("name", TOLERANCE)
def test_dropout_is_that_of_the_specification(name: str) -> None:
    """Keys of one run and of two, and columns that begin where no four random words do."""
    Case(name, 70, 70, causal=True, rate=0.3, runs=1, first=0).check()
    Case(name, 33, 75, rate=0.5, first=2).check()
    Case(name, 33, 75, rate=0.5, first=8).check()


@pytest.mark.parametrize(("name", "d"), [("float32", 96), ("float32", 256), ("bfloat16", 128), ("float16", 256)])
def test_large_heads(name: str, d: int) -> None:
    Case(name, 75, 75, (2, 1), d, causal=True, rate=0.2).check()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_arrays_as_they_lie(name: str) -> None:
    """Views of a packed array, whose rows are not aligned; some of the heads; every second number; reversed axes."""
    whole = Case(name, 20, 20, d=22, causal=True)
    s, b, n, d = whole.q.shape
    packed = np.zeros((s, b, n * d + 4 * d + 1), whole.dtype)
    packed[..., : n * d], packed[..., n * d : -1] = whole.q.reshape(s, b, -1), whole.kv.reshape(s, b, -1)
    part = packed[..., : n * d].reshape(s, b, n, d), packed[..., n * d : -1].reshape(s, b, 2, 2, d)
    assert part[1].base is not None
    rest = np.repeat(whole.do.T, 2, 0)[::2].T, whole.o.transpose(1, 0, 2, 3).copy().transpose(1, 0, 2, 3)
    with emulated():
        o, _ = cuda.attention(*part, SCALE)
        dq, dkv = cuda.attention_backward(rest[0], *part, rest[1], whole.lse.T.copy().T, SCALE)
        some = cuda.attention(part[0][:, :, 2:], part[1][:, :, 1:], SCALE)[0]
    close(o, whole.expected[0], whole.tolerance)
    close(some, whole.expected[0][:, :, 2:], whole.tolerance)
    close(dq, whole.gradients[0], whole.tolerance)
    close(dkv, whole.gradients[1], whole.tolerance)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_blocks_of_keys_make_the_whole(name: str) -> None:
    """As on a ring: o and lse over all blocks are merged, and each block's part of the gradient is made from them."""
    whole = Case(name, 21, 60, rate=0.4)
    cuts = slice(0, 17), slice(17, 17), slice(17, 60)
    with emulated():
        o, lse = np.zeros_like(whole.q), np.full(whole.lse.shape, -np.inf, whole.dtype)
        dq, dkv = np.zeros_like(whole.q), np.zeros_like(whole.kv)
        for cut in cuts:
            if cut.stop > cut.start:
                part = cuda.attention(whole.q, whole.kv[cut], SCALE, None, False)
                o, lse = cuda.merge_attention(o, lse, *part)
        want, want_lse = specification.attention(whole.q, whole.kv, SCALE, None, False)
        close(o, want, whole.tolerance)
        close(lse, want_lse, whole.tolerance)
        gradients = specification.attention_backward(whole.do, whole.q, whole.kv, o, lse, SCALE, None, False)
        for cut in cuts:
            if cut.stop > cut.start:
                add, dkv[cut] = cuda.attention_backward(whole.do, whole.q, whole.kv[cut], o, lse, SCALE, None, False)
                dq += add
    close(dq, gradients[0], whole.tolerance)
    close(dkv, gradients[1], whole.tolerance)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("d", [1, 8, 33])
def test_merging(name: str, d: int) -> None:
    """A block without keys has no weight, and two of them make one."""
    dtype, draw = dtype_of(name), np.random.default_rng(d)
    o1, o2 = (draw.normal(size=(5, 2, 3, d)).astype(dtype) for _ in range(2))
    lse1, lse2 = (draw.normal(size=(2, 3, 5)).astype(wide(dtype)) * 30 for _ in range(2))
    lse1[0], lse2[:, 1] = -np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        want = specification.merge_attention(*(x.astype(np.float64) for x in (o1, lse1, o2, lse2)))
    with emulated():
        o, lse = cuda.merge_attention(o1, lse1, o2[::1], lse2)
    close(o, want[0], TOLERANCE[name])
    finite = np.isfinite(want[1])
    np.testing.assert_array_equal(lse[~finite], want[1][~finite])
    close(lse[finite], want[1][finite], TOLERANCE[wide(dtype).name])


def test_large_scores_stay_finite() -> None:
    q = 1e3 * np.random.default_rng(0).normal(size=(70, 1, 2, 4)).astype(np.float32)
    kv = np.stack([q, q], -2)
    with emulated():
        o, lse = cuda.attention(q, kv, 0.5)
        found = o, lse, *cuda.attention_backward(np.ones_like(q), q, kv, o, lse, 0.5)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    "shapes", [((3, 2, 4, 8), (0, 2, 2, 2, 8)), ((0, 2, 4, 8), (0, 2, 2, 2, 8)), ((3, 1, 1, 264), (3, 1, 1, 2, 264))]
)
def test_what_is_done_otherwise(shapes: Any) -> None:
    """Without queries or keys, and with heads that are too large, the specification does it: also in 16 bits."""
    draw = np.random.default_rng(0)
    for name in ("float64", "bfloat16"):
        q, kv = (draw.normal(size=shape).astype(dtype_of(name)) for shape in shapes)
        o, lse = cuda.attention(q, kv, 0.5, None, False)
        assert (o.dtype, lse.dtype) == (q.dtype, wide(q.dtype))
        want = specification.attention(q.astype(np.float64), kv.astype(np.float64), 0.5, None, False)
        np.testing.assert_allclose(o.astype(np.float64), want[0], atol=0.02)
        np.testing.assert_allclose(lse, want[1], atol=1e-4)
        dq, dkv = cuda.attention_backward(q, q, kv, o, lse, 0.5, None, False)
        assert (dq.shape, dkv.shape) == shapes and dq.dtype == dkv.dtype == q.dtype


def test_more_runs_of_keys_than_kernels_take_are_done_otherwise() -> None:
    Case("float32", 9, 20, rate=0.5, runs=3).check()


def test_shared_memory_fits() -> None:
    """On every GPU from compute capability 8.0 on; large heads of large numbers where there is more of it."""
    for kernel in (cuda._FORWARD, cuda._QUERIES, cuda._KEYS):
        for itemsize in (2, 4, 8):
            for d in (1, 64, 65, 128, 256):
                room = 99 if itemsize * d <= 1024 else 163
                assert cuda._tiling(kernel, itemsize, d).shared(kernel, itemsize) <= room << 10
