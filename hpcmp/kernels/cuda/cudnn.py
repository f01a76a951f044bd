"""Attention by cuDNN's fused kernels, for 16-bit arrays: a graph for each shape, described, built once, executed by
pointers.

Needs the package nvidia-cudnn-frontend (the module ``cudnn``) and the library cuDNN 9. hpcmp's arrays are given as they
lie, with their strides: nothing is transposed. cuDNN's softmax statistics are the log-sum-exp of a row in natural
logarithms, float32, what ``attention.attention`` returns.

Not here: dropout. hpcmp draws it by global index; cuDNN draws by counters of its own, and its custom mask would be an
array of s x t numbers a head.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import Array, array_module, is_half
from ...errors import InputError
from .multiply import address

#: Operands and results of a graph; their position, from 1 on, is the uid. Documents have more: where they begin in each
#: of these, and then their lengths, twice.
FORWARD = "q", "k", "v", "o", "stats"
BACKWARD = "q", "k", "v", "o", "dO", "stats", "dQ", "dK", "dV"

#: Bytes of workspace at most for scores, unless the environment says otherwise: 0 for no more than there must be, -1
#: for any. By itself cuDNN's deterministic backward takes 2 for each score; told of a limit, it adds up dQ in order
#: instead (on Hopper, from 9.25 on).
LIMIT, _MOST = "CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT", 256 << 20


@dataclass(frozen=True)
class Tensor:
    """How an operand lies: (batch, heads, rows, columns), strides in numbers."""

    dim: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """What cuDNN is asked for: one attention operation, its operands and results in the order of ``names``.

    total: how many rows the documents have together that are the entries of the batch, or more; None: no documents.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    scale: float
    causal: bool
    total: int | None = None


def describe(names: tuple[str, ...], arrays: tuple[Array, ...], scale: float, causal: bool) -> Graph:
    """The graph of ``names`` over ``arrays``: of (s, b, n, d), and of (b, n, s) for the statistics."""
    return Graph(names, tuple(map(_tensor, arrays)), scale, causal)


def _tensor(x: Array) -> Tensor:
    view = x[..., None] if x.ndim == 3 else x.transpose(1, 2, 0, 3)
    stride = tuple(s // x.itemsize for s in view.strides[:3])
    return Tensor(view.shape, (*stride, 1), x.dtype.name)


class Library:
    """cuDNN on the current device: builds graphs, and executes them on CuPy's current stream."""

    def __init__(self) -> None:
        import cudnn

        self.cudnn, self.limit, self.workspaces = cudnn, _limit(), dict[int, list[Any]]()
        self.handle = cudnn.create_handle()

    def graph(self, graph: Graph, **settings: Any) -> Any:
        """The ``cudnn.pygraph`` of a description."""
        kind = self.cudnn.data_type
        types = {"float16": kind.HALF, "bfloat16": kind.BFLOAT16, "float32": kind.FLOAT}
        made = self.cudnn.pygraph(
            io_data_type=types[graph.tensors[0].dtype],
            intermediate_data_type=kind.FLOAT,
            compute_data_type=kind.FLOAT,
            **settings,
        )
        backward = graph.names == BACKWARD
        results = graph.names[-3:] if backward else graph.names[-2:]
        described = dict(zip(graph.names, graph.tensors, strict=True))
        begins, lengths = ({}, {}) if graph.total is None else self._documents(made, graph)
        operands = {
            name: made.tensor(
                name=name,
                dim=list(t.dim),
                stride=list(t.stride),
                data_type=types[t.dtype],
                uid=graph.names.index(name) + 1,
            )
            for name, t in described.items()
            if name not in results
        }
        for name in operands.keys() & begins.keys():
            operands[name].set_ragged_offset(begins[name])
        common = {
            **operands,
            **lengths,
            "attn_scale": graph.scale,
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0 if graph.causal else None,
        }
        if backward:  # deterministic: hpcmp promises the same bits in every run
            found = made.sdpa_backward(name="attention_backward", use_deterministic_algorithm=True, **common)
        else:
            found = made.sdpa(name="attention", generate_stats=True, **common)
        for name, tensor in zip(results, found, strict=True):
            t = described[name]
            tensor.set_output(True).set_uid(graph.names.index(name) + 1)
            tensor.set_dim(list(t.dim)).set_stride(list(t.stride)).set_data_type(types[t.dtype])
            if name in begins:
                tensor.set_ragged_offset(begins[name])
        return made

    def _documents(self, made: Any, graph: Graph) -> tuple[dict[str, Any], dict[str, Any]]:
        """By operand, the tensor of where documents begin in it; and what else the operation is told of them."""
        count, kind, total = graph.tensors[0].dim[0], self.cudnn.data_type, len(graph.names)

        def index(name: str, length: int, uid: int, data_type: Any) -> Any:
            return made.tensor(name=name, dim=[length, 1, 1, 1], stride=[1] * 4, data_type=data_type, uid=uid)

        begins = {
            name: index(f"{name}_begins", count + 1, total + i, kind.INT64) for i, name in enumerate(graph.names, 1)
        }
        told: dict[str, Any] = {
            name: index(name, count, 2 * total + i, kind.INT32) for i, name in enumerate(("seq_len_q", "seq_len_kv"), 1)
        }
        if graph.names == BACKWARD:  # else its workspace has room for as many rows of every document
            told |= {"max_total_seq_len_q": graph.total, "max_total_seq_len_kv": graph.total}
        return begins, told | {"use_padding_mask": True}

    @functools.cached_property
    def takes_documents(self) -> bool:
        """Whether documents may be the entries of a batch, in one array: where NVIDIA tests all that it takes.

        cuDNN 9.25, since before there might be no entries without rows; Hopper (compute capability 9.0), since there is
        no deterministic backward of documents on 8.x and 12.x, and on 10.x the package may take engines of its own.
        """
        import cupy

        return bool(self.cudnn.backend_version() >= 92500 and cupy.cuda.Device().compute_capability == "90")

    def build(self, graph: Graph) -> Any | None:
        """An executable graph; None where cuDNN or this GPU does not support it, or only with all scores in memory."""
        made = self.graph(graph, handle=self.handle)
        try:
            made.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        except self.cudnn.cudnnGraphNotSupportedError:
            return None
        (b, heads, s, _), t, size = graph.tensors[0].dim, graph.tensors[1].dim[2], made.get_workspace_size()
        return None if 0 < self.limit < 2 * b * heads * s * t <= size else (made, size)

    def execute(self, built: Any, pointers: tuple[int, ...]) -> None:
        """Run a built graph over arrays at these addresses. The workspace is kept, one a stream; those that became too
        small, too, since CUDA graphs may use them."""
        import cupy

        graph, size = built
        stream = cupy.cuda.get_current_stream().ptr
        kept = self.workspaces.setdefault(stream, [])
        if not kept or kept[-1].size < size:
            kept.append(cupy.empty(max(size, 1), np.uint8))
        workspace = kept[-1]
        self.cudnn.set_stream(self.handle, stream)
        graph.execute(dict(enumerate(pointers, 1)), workspace.data.ptr, handle=self.handle)


def _limit() -> int:
    """``LIMIT`` in the environment, which has it from now on. Raises InputError unless it is a whole number."""
    word = os.environ.setdefault(LIMIT, str(_MOST))
    try:
        return int(word)
    except ValueError:
        raise InputError(f"{LIMIT}={word}: expected a number of bytes, 0 or -1") from None


@functools.cache
def library() -> Any | None:
    """cuDNN, or None: without the package or the library, or with HPCMP_CUDNN=no in the environment.

    Raises InputError for another word there than "no" and "auto".
    """
    word = os.environ.get("HPCMP_CUDNN", "auto")
    if word not in ("auto", "no"):
        raise InputError(f"HPCMP_CUDNN={word}: expected no or auto")
    if word == "no":
        return None
    try:
        return Library()
    except (ImportError, OSError, RuntimeError):  # RuntimeError: the package finds no libcudnn
        return None


#: What a layout's graph was built to, forward and backward; None where it is not supported.
_built: dict[tuple[Any, ...], Any] = {}


def takes(dtype: np.dtype[Any], d: int) -> bool:
    """Whether to ask cuDNN at all: 16-bit numbers, and head sizes that are multiples of 8 up to 256."""
    return is_half(dtype) and d % 8 == 0 and 0 < d <= 256


def serves(q: Array, kv: Array) -> bool:
    """Whether cuDNN is here, and takes these arrays."""
    return takes(q.dtype, q.shape[-1]) and kv.dtype == q.dtype and library() is not None


def attention(q: Array, kv: Array, scale: float, causal: bool) -> tuple[Array, Array] | None:
    """``attention.attention`` without dropout, of arrays that are not empty; None where cuDNN does not support it."""
    q, kv = aligned(q), aligned(kv)
    (s, b, n, d), xp = q.shape, array_module(q)
    o, lse = xp.empty(q.shape, q.dtype), xp.empty((b, n, s), np.float32)
    layout = q.dtype, q.shape, q.strides, kv.shape, kv.strides, scale, causal
    if layout not in _built:
        k = kv[..., 0, :]
        _built[layout] = loaded().build(describe(FORWARD, (q, k, k, o, lse), scale, causal))
    if (built := _built[layout]) is None:
        return None
    k_at = address(kv)
    loaded().execute(built, (address(q), k_at, k_at + d * kv.itemsize, address(o), address(lse)))
    return o, lse


def attention_backward(
    do: Array, q: Array, kv: Array, o: Array, lse: Array, scale: float, causal: bool
) -> tuple[Array, Array] | None:
    """``attention.attention_backward`` without dropout, of arrays that are not empty; None as above."""
    do, q, kv, o = (aligned(x) for x in (do, q, kv, o))
    xp = array_module(q)
    lse = xp.ascontiguousarray(lse, np.float32)
    dq, dkv = xp.empty(q.shape, q.dtype), xp.empty(kv.shape, kv.dtype)
    layout = q.dtype, q.shape, q.strides, kv.shape, kv.strides, o.strides, do.strides, scale, causal
    if layout not in _built:
        k, dk = kv[..., 0, :], dkv[..., 0, :]
        _built[layout] = loaded().build(describe(BACKWARD, (q, k, k, o, do, lse, dq, dk, dk), scale, causal))
    if (built := _built[layout]) is None:
        return None
    k_at, dk_at, step = address(kv), address(dkv), q.shape[-1] * kv.itemsize
    operands = address(q), k_at, k_at + step, address(o), address(do), address(lse)
    loaded().execute(built, (*operands, address(dq), dk_at, dk_at + step))
    return dq, dkv


def loaded() -> Any:
    """cuDNN, which is here (``serves``)."""
    return library()


def aligned(x: Array) -> Array:
    """``x``, or a copy: rows of adjacent numbers that begin at multiples of 16 bytes, as cuDNN reads them."""
    fits = x.strides[-1] == x.itemsize and not any(step % 16 for step in x.strides[:-1]) and address(x) % 16 == 0
    return x if fits and (x.ndim == 4 or x.strides[-2] == x.shape[-1] * x.itemsize) else x.copy()
