"""Attention within documents by cuDNN: what it is asked for, carried out with NumPy; the package's own checks."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import Array, dtype_of
from hpcmp.documents import First
from hpcmp.kernels import attention as specification
from hpcmp.kernels.cuda import attention as cuda
from hpcmp.kernels.cuda import cudnn, cudnn_documents
from hpcmp.kernels.cuda.cudnn import BACKWARD, FORWARD, Graph, Tensor
from tests.kernels.emulation.backend import emulated, needs_gxx
from tests.kernels.test_cuda_attention_documents import documents
from tests.kernels.test_cuda_cudnn import Interpreter, draw, packaged, validate, view

#: Of two samples, where documents end: of one position, up to 9; three and one of them.
ENDS = (1, 8, 17), (17,)


class Documents(Interpreter):
    """cuDNN in NumPy where the entries of a batch are documents: each where its offset says, and as long as it is."""

    takes_documents = True

    def execute(self, graph: Graph, pointers: tuple[int, ...]) -> None:
        if graph.total is None:
            return super().execute(graph, pointers)
        count, names = graph.tensors[0].dim[0], len(graph.names)
        at, begins, lengths = pointers[:names], pointers[names : 2 * names], pointers[2 * names :]
        assert len(lengths) == 2 and not any(address % 16 for address in pointers)
        of_q, of_kv = (view(Tensor((count,), (1,), "int32"), address) for address in lengths)
        np.testing.assert_array_equal(of_q, of_kv)
        offsets = [view(Tensor((count + 1,), (1,), "int64"), address) for address in begins]
        for x, t in zip(offsets, graph.tensors, strict=True):  # in order, without gaps: what cuDNN is tested with
            np.testing.assert_array_equal(np.diff(x), of_q.astype(np.int64) * t.stride[2])
        stats = graph.tensors[graph.names.index("stats")]
        assert stats.stride[1:] == (1, stats.dim[1], 1)  # the heads of a position side by side
        known = len(self.pointers)
        assert of_q.sum() <= graph.total and of_q.max() <= graph.tensors[0].dim[2]
        for i, length in enumerate(of_q):
            if not length:
                continue
            tensors = tuple(Tensor((1, t.dim[1], int(length), t.dim[3]), t.stride, t.dtype) for t in graph.tensors)
            places = tuple(
                a + int(x[i]) * dtype_of(t.dtype).itemsize for a, x, t in zip(at, offsets, tensors, strict=True)
            )
            super().execute(Graph(graph.names, tensors, graph.scale, graph.causal), places)
        self.pointers[known:] = [pointers]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Documents:
    made = Documents()
    monkeypatch.setattr(cudnn, "library", lambda: made)
    monkeypatch.setattr(cudnn, "_built", {})
    monkeypatch.setattr(cudnn_documents, "_built", {})
    return made


def check(arrays: tuple[Array, Array, Array], first: First, causal: bool = True) -> Array:
    """The log-sum-exp, which is like the rest what the specification makes."""
    q, kv, do = arrays
    wide = [x.astype(np.float64) for x in arrays]
    want_o, want_lse = specification.attention(wide[0], wide[1], 0.3, None, causal, first)
    want = specification.attention_backward(wide[2], wide[0], wide[1], want_o, want_lse, 0.3, None, causal, first)
    o, lse = cuda.attention(q, kv, 0.3, None, causal, first)
    gradients = cuda.attention_backward(do, q, kv, want_o.astype(q.dtype), lse, 0.3, None, causal, first)
    assert (o.dtype, lse.dtype) == (q.dtype, np.float32)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    for found, wanted in zip((o, *gradients), (want_o, *want), strict=True):
        assert found.shape == wanted.shape and found.dtype == q.dtype
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
    return lse


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("ends", [ENDS, ((17,), (5, 17)), (tuple(range(1, 18)), (3, 4, 5, 6, 17))])
def test_documents_are_the_entries_of_a_batch(
    interpreter: Documents, name: str, n: int, k: int, ends: tuple[tuple[int, ...], ...]
) -> None:
    check(draw(name, 17, 17, n, k, 16), documents(*ends))
    assert [graph.names for graph in interpreter.built] == [FORWARD, BACKWARD]
    assert len(interpreter.pointers) == 4  # a call a sample
    assert all(graph.causal and graph.total == 128 for graph in interpreter.built)


def test_arrays_are_read_where_they_lie(interpreter: Documents) -> None:
    """Parts of a packed array, as projections leave them, and some of its heads: no copies."""
    packed = np.random.default_rng(0).normal(size=(17, 2, 4 * 16 + 2 * 2 * 16)).astype(np.float16)
    q, kv = packed[..., :64].reshape(17, 2, 4, 16), packed[..., 64:].reshape(17, 2, 2, 2, 16)
    for part in ((q, kv, q.copy()), (q[:, :, 2:], kv[:, :, 1:], q[:, :, 2:].copy())):
        interpreter.pointers.clear()
        check(part, documents(*ENDS))
        for sample, pointers in enumerate(interpreter.pointers):
            lie = part[0][:, sample % 2], part[1][:, sample % 2, :, 0], part[1][:, sample % 2, :, 1]
            assert list(pointers[:3]) == [x.ctypes.data for x in lie]


def test_the_log_sum_exp_is_read_where_it_lies_and_from_elsewhere(interpreter: Documents) -> None:
    """Such as one joined from parts of the heads, or from the kernels in tiles."""
    q, kv, do = draw("float16", 17, 17, 4, 2, 16)
    first = documents(*ENDS)
    lse = check((q, kv, do), first)
    o = cuda.attention(q, kv, 0.3, None, True, first)[0]
    interpreter.pointers.clear()
    found = [
        cuda.attention_backward(do, q, kv, o, x, 0.3, None, True, first)
        for x in (lse, lse.copy(), lse[:, :, ::-1].copy()[:, :, ::-1])
    ]
    for other in found[1:]:
        for here, there in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(here, there)
    places = [pointers[5] for pointers in interpreter.pointers[::2]]
    assert (places[0] == lse.ctypes.data) and lse.ctypes.data not in places[1:]


def test_few_graphs_are_built_and_a_plan_is_made_once(interpreter: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to 4 documents one graph, of 5 to 8 another; the plan goes with the documents."""
    made: list[First] = []
    plan = cudnn_documents.plan
    monkeypatch.setattr(cudnn_documents, "plan", lambda first: made.append(first) or plan(first))
    before = len(cudnn_documents._plans)
    for ends in (ENDS, ((2, 3, 4, 17), (9, 17)), ENDS):
        first = documents(*ends)
        for _ in range(3):
            check(draw("float16", 17, 17, 4, 2, 16), first)
    assert len(interpreter.built) == 2 and len(made) == 3
    check(draw("float16", 17, 17, 4, 2, 16), documents((1, 2, 3, 4, 17), (17,)))
    assert len(interpreter.built) == len(set(interpreter.built)) == 4
    check(draw("float16", 17, 17, 4, 2, 16), documents((17,), (17,)))  # no borders: as without documents
    assert [graph.total for graph in interpreter.built[4:]] == [None, None]
    made.clear()
    del first
    gc.collect()
    assert len(cudnn_documents._plans) == before


def test_long_documents_have_graphs_of_their_own() -> None:
    """By powers of two, and never longer than a sample in whole tiles; where they begin goes to the device once."""
    plan = cudnn_documents.plan(documents((5, 9), (9,)))
    assert plan is not None and plan.offsets(3) is plan.offsets(3)
    np.testing.assert_array_equal(plan.offsets(3), [[0, 15, 27, 27, 27, 27], [0, 27, 27, 27, 27, 27]])
    found = [cudnn_documents.plan(documents((n, 700), (n, 700))) for n in (350, 500, 600)]
    assert [(plan.count, plan.longest, plan.total) for plan in found if plan] == [
        (4, 512, 768),
        (4, 512, 768),
        (4, 768, 768),
    ]


@needs_gxx
@pytest.mark.timeout(300)
def test_what_it_does_not_do_the_kernels_do(interpreter: Documents) -> None:
    """Windows, blocks of keys, head sizes that are no multiples of 16, what it refuses, and other GPUs and versions."""
    window = First.of(np.maximum(np.arange(17) - 3, 0)[None].repeat(2, 0), np)
    late = First.of(np.array([[0] * 5 + [3] * 12, [0] * 17]), np)  # from the third on, but none begins there
    with emulated():
        check(draw("float16", 17, 17, 4, 2, 16), window)
        check(draw("float16", 17, 17, 4, 2, 16), late)
        check(draw("float16", 17, 17, 4, 2, 16), documents(*ENDS), causal=False)
        check(draw("float16", 17, 17, 4, 2, 8), documents(*ENDS))
        interpreter.takes_documents = False
        check(draw("float16", 17, 17, 4, 2, 16), documents(*ENDS))
        assert not interpreter.built
        interpreter.takes_documents, interpreter.largest = True, 8
        for _ in range(2):
            check(draw("float16", 17, 17, 4, 2, 16), documents(*ENDS))
    assert len(interpreter.built) == 2 and not interpreter.pointers


@pytest.mark.parametrize(
    ("version", "capability", "takes"),
    [(92500, "90", True), (92801, "90", True), (92401, "90", False), (92801, "100", False)],
)
def test_where_documents_are_tested_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, version: int, capability: str, takes: bool
) -> None:
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=lambda: device)))
    library = cudnn.Library.__new__(cudnn.Library)
    library.cudnn = SimpleNamespace(backend_version=lambda: version)
    assert library.takes_documents is takes


@pytest.mark.parametrize("names", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_package_takes_the_graphs(name: str, names: tuple[str, ...]) -> None:
    """As far as that can be seen without a GPU."""
    library = packaged()
    plan = cudnn_documents.plan(documents((5, 128, 300), (1, 300)))
    assert plan is not None
    for n, k, d in ((4, 2, 64), (4, 4, 128), (3, 1, 256)):
        q, kv, do = draw(name, 300, 300, n, k, d)
        lse = cudnn_documents._stats(300, 2, n, np)
        arrays: tuple[Any, ...] = q, kv[..., 0, :], kv[..., 1, :], q
        arrays = (*arrays, lse) if names == FORWARD else (*arrays, do, lse, q, kv[..., 0, :], kv[..., 1, :])
        graph = cudnn_documents.describe(names, arrays, 0.3, plan)
        validate(library, graph)
