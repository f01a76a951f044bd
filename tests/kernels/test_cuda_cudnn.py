"""Attention by cuDNN: what it is asked for, carried out with NumPy; the calls, where the package is installed."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import Array, dtype_of
from hpcmp.errors import InputError
from hpcmp.kernels import attention as specification
from hpcmp.kernels.cuda import attention as cuda
from hpcmp.kernels.cuda import cudnn
from hpcmp.kernels.cuda.cudnn import BACKWARD, FORWARD, Graph
from tests.kernels.emulation.backend import emulated, needs_gxx


class Interpreter:
    """cuDNN in NumPy: reads and writes memory by the dims and strides of a graph, knowing nothing of hpcmp's arrays."""

    def __init__(self, largest: int = 256) -> None:
        self.largest, self.built, self.pointers = largest, list[Graph](), list[tuple[int, ...]]()

    def build(self, graph: Graph) -> Graph | None:
        self.built.append(graph)
        return graph if graph.tensors[0].dim[3] <= self.largest else None

    def execute(self, graph: Graph, pointers: tuple[int, ...]) -> None:
        self.pointers.append(pointers)
        x = dict(zip(graph.names, map(view, graph.tensors, pointers), strict=True))
        q, k, v = (np.asarray(x[name], np.float64) for name in "qkv")
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        scores = graph.scale * q @ k.swapaxes(2, 3)
        if graph.causal:
            scores[..., ~np.tri(*scores.shape[2:], dtype=bool)] = -np.inf
        if graph.names == FORWARD:
            x["stats"][...] = np.log(np.exp(scores).sum(-1, keepdims=True))
            x["o"][...] = np.exp(scores - x["stats"]) @ v
            return
        p, o, do = (np.asarray(y, np.float64) for y in (np.exp(scores - x["stats"]), x["o"], x["dO"]))
        ds = graph.scale * p * (do @ v.swapaxes(2, 3) - (do * o).sum(-1, keepdims=True))
        x["dQ"][...] = ds @ k
        for name, of_heads in (("dK", ds.swapaxes(2, 3) @ q), ("dV", p.swapaxes(2, 3) @ do)):
            b, n, *rest = of_heads.shape
            x[name][...] = of_heads.reshape(b, n // group, group, *rest).sum(2)


def view(t: cudnn.Tensor, address: int) -> Array:
    """The array that a description says is there."""
    dtype = dtype_of(t.dtype)
    size = 1 + sum((n - 1) * step for n, step in zip(t.dim, t.stride, strict=True))
    raw = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(raw, dtype)
    return np.lib.stride_tricks.as_strided(flat, t.dim, [step * dtype.itemsize for step in t.stride])


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    made = Interpreter()
    monkeypatch.setattr(cudnn, "library", lambda: made)
    monkeypatch.setattr(cudnn, "_built", {})
    return made


def draw(name: str, s: int, t: int, n: int, k: int, d: int) -> tuple[Array, Array, Array]:
    """q, kv, do."""
    normal = np.random.default_rng((s, t, n, d)).normal
    shapes = (s, 2, n, d), (t, 2, k, 2, d), (s, 2, n, d)
    q, kv, do = (normal(size=shape).astype(dtype_of(name)) for shape in shapes)
    return q, kv, do


def check(q: Array, kv: Array, do: Array, causal: bool) -> None:
    wide = [x.astype(np.float64) for x in (q, kv, do)]
    want_o, want_lse = specification.attention(wide[0], wide[1], 0.3, None, causal)
    want = specification.attention_backward(wide[2], wide[0], wide[1], want_o, want_lse, 0.3, None, causal)
    o, lse = cuda.attention(q, kv, 0.3, None, causal)
    gradients = cuda.attention_backward(do, q, kv, want_o.astype(q.dtype), lse, 0.3, None, causal)
    assert (o.dtype, lse.dtype) == (q.dtype, np.float32)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    for found, wanted in zip((o, *gradients), (want_o, *want), strict=True):
        assert found.shape == wanted.shape and found.dtype == q.dtype
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("s", "t", "causal"), [(7, 7, True), (5, 9, False), (1, 1, True), (9, 2, False)])
def test_it_is_asked_for_attention(
    interpreter: Interpreter, name: str, n: int, k: int, s: int, t: int, causal: bool
) -> None:
    check(*draw(name, s, t, n, k, 16), causal)
    assert [graph.names for graph in interpreter.built] == [FORWARD, BACKWARD]
    assert {graph.causal for graph in interpreter.built} == {causal}


def test_arrays_are_read_where_they_lie(interpreter: Interpreter) -> None:
    """Parts of a packed array, as projections leave them, and some of its heads: no copies."""
    packed = np.random.default_rng(0).normal(size=(6, 2, 4 * 8 + 2 * 2 * 8)).astype(np.float16)
    q, kv = packed[..., :32].reshape(6, 2, 4, 8), packed[..., 32:].reshape(6, 2, 2, 2, 8)
    check(q, kv, q.copy(), True)
    check(q[:, :, 2:], kv[:, :, 1:], q[:, :, 2:].copy(), True)
    places = [
        [x.ctypes.data for x in (q, kv[..., 0, :], kv[..., 1, :])] for q, kv in ((q, kv), (q[:, :, 2:], kv[:, :, 1:]))
    ]
    assert [list(pointers[:3]) for pointers in interpreter.pointers] == [places[0]] * 2 + [places[1]] * 2


def test_other_layouts_are_copied(interpreter: Interpreter) -> None:
    """Rows that begin at no multiple of 16 bytes, numbers that do not follow each other, values far from their keys."""
    q, kv, do = draw("float16", 6, 6, 4, 2, 8)
    odd = np.zeros((6, 2, 4, 9), np.float16)
    odd[..., :8] = q
    check(odd[..., :8], np.repeat(kv, 2, -1)[..., ::2], do.T.copy().T, True)
    check(q, np.moveaxis(np.moveaxis(kv, 3, 0).copy(), 0, 3), do, True)
    assert not any(pointer % 16 for pointers in interpreter.pointers for pointer in pointers)


def test_a_graph_is_built_once_for_a_layout(interpreter: Interpreter) -> None:
    for _ in range(3):
        check(*draw("bfloat16", 7, 7, 4, 2, 16), True)
    assert len(interpreter.built) == 2
    check(*draw("bfloat16", 8, 8, 4, 2, 16), True)
    check(*draw("float16", 7, 7, 4, 2, 16), True)
    assert len(interpreter.built) == len(set(interpreter.built)) == 6


@needs_gxx
@pytest.mark.timeout(300)
def test_what_it_does_not_do_the_kernels_do(interpreter: Interpreter) -> None:
    """Dropout, wide numbers, head sizes that are no multiple of 8 are not asked for; what it refuses, only once."""
    mask = cuda.DropoutMask(
        0.5, (1, 2), np.arange(5), np.arange(2)[:, None, None], (slice(0, 5),), np.arange(4)[:, None]
    )
    interpreter.largest = 8
    with emulated():
        for name, d, drop in (("float16", 12, None), ("float32", 8, None), ("float16", 8, mask)):
            q, kv, do = draw(name, 5, 5, 4, 2, d)
            want = specification.attention(q.astype(np.float64), kv.astype(np.float64), 0.3, drop)
            o, lse = cuda.attention(q, kv, 0.3, drop)
            cuda.attention_backward(do, q, kv, o, lse, 0.3, drop)
            np.testing.assert_allclose(o.astype(np.float64), want[0], atol=5e-3)
        assert not interpreter.built
        for _ in range(2):
            check(*draw("float16", 5, 5, 4, 2, 16), True)
    assert len(interpreter.built) == 2 and not interpreter.pointers


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn.library.cache_clear()
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert cudnn.library() is None
    cudnn.library.cache_clear()

    def fails() -> None:
        raise RuntimeError("no libcudnn.so")

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(create_handle=fails))
    assert cudnn.library() is None
    cudnn.library.cache_clear()
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(create_handle=object))
    assert cudnn.library() is not None
    cudnn.library.cache_clear()
    monkeypatch.setenv("HPCMP_CUDNN", "no")
    assert cudnn.library() is None
    cudnn.library.cache_clear()
    monkeypatch.setenv("HPCMP_CUDNN", "yes")
    with pytest.raises(InputError, match="HPCMP_CUDNN=yes: expected no or auto"):
        cudnn.library()


@pytest.mark.parametrize(("limit", "most"), [("", 256 << 20), ("1000", 1000), ("0", 1 << 40), ("-1", 1 << 40)])
def test_what_needs_all_scores_in_memory_is_not_done(limit: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the package is told the limit, so that it may find a way with less."""
    monkeypatch.setenv(cudnn.LIMIT, limit)
    if not limit:
        monkeypatch.delenv(cudnn.LIMIT)
    heuristics = SimpleNamespace(A=0, FALLBACK=1)
    package = SimpleNamespace(create_handle=object, heur_mode=heuristics, cudnnGraphNotSupportedError=ValueError)
    monkeypatch.setitem(sys.modules, "cudnn", package)
    library = cudnn.Library()
    assert os.environ[cudnn.LIMIT] == (limit or str(most))
    for scores, size, built in ((most, most, True), (most + 2, most + 2, most == 1 << 40), (most + 2, most + 1, True)):
        made = SimpleNamespace(build=lambda modes: None, get_workspace_size=lambda size=size: size)
        monkeypatch.setattr(library, "graph", lambda graph, handle, made=made: made)
        q, k = (cudnn.Tensor((1, 1, rows, 8), (8, 8, 8, 1), "float16") for rows in (1, scores // 2))
        assert library.build(Graph(("q", "k"), (q, k), 1.0, True)) == ((made, size) if built else None)


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(create_handle=object))
    monkeypatch.setenv(cudnn.LIMIT, "much")
    cudnn.library.cache_clear()
    with pytest.raises(InputError, match=f"{cudnn.LIMIT}=much: expected a number of bytes"):
        cudnn.library()


def test_graphs_run_on_the_current_stream_with_room_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """By uid and address; the workspace of a stream grows, and is kept."""
    calls: list[Any] = []
    stream = SimpleNamespace(ptr=7)
    empty = [SimpleNamespace(size=n, data=SimpleNamespace(ptr=1000 + n)) for n in range(30)]
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: stream),
        empty=lambda n, dtype: calls.append(("empty", n)) or empty[n],
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(
        sys.modules,
        "cudnn",
        SimpleNamespace(
            create_handle=lambda: "handle", set_stream=lambda handle, stream: calls.append((handle, stream))
        ),
    )
    graph = SimpleNamespace(execute=lambda pack, workspace, handle: calls.append((pack, workspace, handle)))
    made = cudnn.Library()
    for size in (10, 5, 20):
        made.execute((graph, size), (11, 12))
    run = [("handle", 7), ({1: 11, 2: 12}, 1010, "handle")]
    assert calls == [("empty", 10), *run, *run, ("empty", 20), run[0], ({1: 11, 2: 12}, 1020, "handle")]
    stream.ptr = 8
    made.execute((graph, 5), (11, 12))
    assert calls[-3:-1] == [("empty", 5), ("handle", 8)]


def packaged() -> cudnn.Library:
    """The package, without a device."""
    library = cudnn.Library.__new__(cudnn.Library)
    try:
        library.cudnn = importlib.import_module("cudnn")
    except (ImportError, OSError):  # OSError: old ones load libcudnn at once
        pytest.skip("nvidia-cudnn-frontend is not installed")
    return library


def validate(library: cudnn.Library, graph: Graph) -> None:
    """By the package alone, as newer ones do; others load libcudnn for it."""
    try:
        library.graph(graph).validate()
    except RuntimeError as error:
        if "Unable to find symbol" not in str(error):
            raise
        pytest.skip("this nvidia-cudnn-frontend asks libcudnn, which is not installed")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("names", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_package_takes_the_graphs(name: str, names: tuple[str, ...], causal: bool) -> None:
    """As far as that can be seen without a GPU: it validates what is described, and refuses what it does not serve."""
    library = packaged()
    for s, t, d in ((128, 128, 64), (77, 77, 128), (5, 9, 256), (5, 9, 12)):
        if causal and s != t:
            continue
        q, kv, do = draw(name, s, t, 4, 2, d)
        lse, k = np.zeros((2, 4, s), np.float32), kv[..., 0, :]
        arrays = (q, k, k, q, lse) if names == FORWARD else (q, k, k, q, do, lse, q, k, k)
        graph = cudnn.describe(names, arrays, 0.3, causal)
        if d % 8:
            with pytest.raises(library.cudnn.cudnnGraphNotSupportedError, match="multiple of 8"):
                validate(library, graph)
        else:
            validate(library, graph)
