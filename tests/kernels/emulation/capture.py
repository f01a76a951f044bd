"""A backend of ``hpcmp.kernels.cuda.graphs`` over the emulation: captures by writing down what would run.

While work is captured nothing of it is executed: launches, products and what NumPy does to arrays that lie "on the
device" are recorded with addresses, and replaying executes them there. So whatever is done beside a capture, or lies
elsewhere in a replay, gives wrong numbers: what is free, new or scratch memory between two graphs is NaN. Memory is
handed out again as soon as it is free, and is never unmapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from hpcmp import captured, kernels
from hpcmp.arrays import is_half
from hpcmp.kernels.cuda import launch, multiply
from hpcmp.kernels.cuda.graphs import Memory
from tests.kernels.cublaslt import CublasLt, make_lt
from tests.kernels.emulation.backend import FILL, Emulation
from tests.kernels.emulation.pool import Freed, Pool

Plain = np.ndarray[Any, Any]


class OnDevice(Plain):
    """An array on the device: what NumPy does to it is recorded while work is captured."""

    keeper: Any = None  # of its memory
    within = False  # whether it was made while work was captured

    def __array_finalize__(self, of: Any) -> None:
        self.within = getattr(of, "within", False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **settings: Any) -> Any:
        call = getattr(ufunc, method)
        if out is None and method != "at":
            return DEVICE.made(lambda *xs: call(*xs, **settings), inputs)
        targets, n = out or (), len(inputs)

        def into(*xs: Any) -> None:  # which keeps no array
            call(*xs[:n], **({"out": xs[n:]} if xs[n:] else {}), **settings)

        DEVICE.run(into, (*inputs, *targets))
        return targets[0] if targets else None

    def __array_function__(self, func: Any, types: Any, args: Any, settings: Any) -> Any:
        return DEVICE.made(lambda *xs: func(*xs, **settings), args)

    def astype(self, dtype: Any, *args: Any, copy: bool = True, **settings: Any) -> Any:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        return DEVICE.made(lambda x: x.astype(dtype), (self,))

    def copy(self, *args: Any) -> Any:
        return DEVICE.made(lambda x: x.copy(), (self,))

    def reshape(self, *shape: Any, **settings: Any) -> Any:
        found = super().reshape(*shape, **settings)
        if np.may_share_memory(plain(found), plain(self)) or not self.size:
            return found
        return DEVICE.made(lambda x: x.reshape(*shape), (self,))

    def __setitem__(self, key: Any, value: Any) -> None:
        DEVICE.run(lambda x, y: x.__setitem__(key, y), (self, value))


def plain(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(map(plain, x))
    return x.view(np.ndarray) if isinstance(x, OnDevice) else x


class Reference:
    """An array in memory that a graph may find changed, or gone."""

    def __init__(self, x: Plain) -> None:
        self.at, self.shape, self.strides, self.dtype = x.__array_interface__["data"][0], x.shape, x.strides, x.dtype
        self.root: Any = None
        if not getattr(x, "within", False):
            root: Any = x
            while isinstance(root.base, np.ndarray):
                root = root.base
            self.root = weakref.ref(root)

    def __call__(self) -> Plain:
        if 0 in self.shape:
            return np.ndarray(self.shape, self.dtype)
        assert self.root is None or self.root() is not None, "an array that a graph reads or writes is gone"
        first = np.ndarray((1,), self.dtype, (ctypes.c_char * self.dtype.itemsize).from_address(self.at))
        return np.lib.stride_tricks.as_strided(first, self.shape, self.strides)


class Device:
    """The backend. Counts what runs by graphs, and what without."""

    def __init__(self) -> None:
        self.own, self.scratch = Pool(), Pool()
        self.work: list[tuple[Callable[..., Any], list[Any]]] | None = None
        self.memory: Memory | None = None
        self.known: dict[int, weakref.ref[Plain]] = {}  # arrays of the host's that stand for some of the device
        self.joined: list[Any] = []  # streams that are part of the capture
        self.graphs = self.launches = self.captures = 0

    def capture(self, run: Callable[[], Any], memory: Memory) -> tuple[Graph, Any]:
        assert self.work is None
        self.work, self.memory = [], memory
        self.captures += 1
        try:
            result = run()
            left = [stream.left() for stream in self.joined]
            assert all(left), "a capture ends before its streams have come together"
            return Graph(self, self.work), result
        finally:
            self.work = self.memory = None
            self.joined.clear()

    def copy(self, target: Plain, x: Plain) -> None:
        assert self.work is None and target.shape == x.shape and target.dtype == x.dtype
        np.copyto(plain(target), plain(x))

    def alias(self, x: Plain) -> Plain:
        found = Reference(x)().view(OnDevice)
        found.within = True
        return found

    def run(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Now, or in each replay of what is being captured."""
        arrays = [x for x in args if isinstance(x, np.ndarray) and not x.dtype.names and x.ndim]
        hosts = [x for x in arrays if not isinstance(x, OnDevice)]
        if self.work is None:
            self.launches += 1
            self.known |= {id(x): weakref.ref(x) for x in hosts}
            call(*map(plain, args))
            return
        for x in hosts:
            assert id(x) in self.known and self.known[id(x)]() is x, "an array of the host's in captured work"
        self.work.append((call, [Reference(x) if any(x is a for a in arrays) else x for x in args]))

    def made(self, call: Callable[..., Any], args: Any) -> Any:
        """What ``call`` makes; while work is captured, an array in which each replay will make it."""
        if self.work is None:
            found = call(*map(plain, args))
            return found.view(OnDevice) if isinstance(found, np.ndarray) else found
        with np.errstate(all="ignore"):
            like = call(*map(plain, args))
        target = self.empty(like.shape, like.dtype)
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        lengths = [len(arg) if isinstance(arg, list | tuple) else None for arg in args]

        def into(target: Plain, *xs: Any) -> None:
            left = iter(xs)
            again = [next(left) if n is None else [next(left) for _ in range(n)] for n in lengths]
            target[...] = call(*again)

        self.run(into, (target, *flat))
        return target

    def empty(self, shape: Any, dtype: Any = float, *args: Any, **settings: Any) -> Plain:
        """In the place of ``numpy.empty``: NaN."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        if not size:
            return np.ndarray(shape, dtype).view(OnDevice)
        if self.work is None:
            keeper: Any = self.own(size)
            at = keeper.ptr
        else:
            assert self.memory is not None
            at = self.memory.malloc(size)
            keeper = Freed(self.memory, at)
        root = np.frombuffer((ctypes.c_char * size).from_address(at), np.uint8).view(OnDevice)
        root.keeper, root.within = keeper, self.work is not None
        return np.ndarray.reshape(root.view(dtype), shape)

    def zeros(self, shape: Any, dtype: Any = float, *args: Any, **settings: Any) -> Plain:
        """In the place of ``numpy.zeros``; structs, which launches are given by value, stay on the host."""
        if np.dtype(dtype).names:
            return np.frombuffer(bytearray(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        found = self.empty(shape, dtype)
        self.run(lambda x: x.fill(0), (found,))
        return found

    def asarray(self, x: Any, dtype: Any = None, **settings: Any) -> Any:
        """In the place of ``numpy.asarray``, which makes an array of NumPy's own of one on the device."""
        if not isinstance(x, OnDevice):
            return np.array(x, dtype, copy=None, **settings)
        return x.astype(dtype, copy=False) if dtype is not None else x

    def ascontiguousarray(self, x: Any, dtype: Any = None) -> Any:
        """In the place of ``numpy.ascontiguousarray``, likewise."""
        if not isinstance(x, OnDevice):
            return np.array(x, dtype, order="C", copy=None, ndmin=1)
        if x.flags.c_contiguous and dtype in (None, x.dtype):
            return x
        return self.made(lambda x: np.array(x, dtype, order="C"), (x,))


class Graph:
    """A piece of work, to be done again and again."""

    def __init__(self, device: Device, work: list[Any]) -> None:
        self.device, self.work = device, work

    def launch(self) -> None:
        assert self.device.work is None
        self.device.graphs += 1
        for memory in self.device.scratch.all:
            memory[:] = FILL
        with np.errstate(all="ignore"):
            for call, args in self.work:
                call(*(x() if isinstance(x, Reference) else x for x in args))


class Kernels(Emulation):
    """The backend of launches."""

    def compile(self, source: str, expressions: tuple[str, ...]) -> dict[str, Any]:
        return {name: Kernel(kernel) for name, kernel in super().compile(source, expressions).items()}


class Kernel:
    def __init__(self, kernel: Any) -> None:
        self.kernel, self.max_dynamic_shared_size_bytes = kernel, kernel.max_dynamic_shared_size_bytes

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], shared_mem: int = 0) -> None:
        self.kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        DEVICE.run(lambda *args: self.kernel(grid, block, args, shared_mem=shared_mem), args)


class Products(CublasLt):
    """cuBLASLt, which reads its descriptors when it is called, and the matrices later."""

    def matmul(self, light_handle: int, compute_desc: int, *rest: Any) -> None:
        told = dict(self.things[compute_desc])

        def work() -> None:
            with mock.patch.dict(self.things, {compute_desc: told}):
                CublasLt.matmul(self, light_handle, compute_desc, *rest)

        DEVICE.run(work, ())

    def _within(self, address: int, length: int) -> None:
        assert address


DEVICE = Device()


@contextlib.contextmanager
def on_device() -> Iterator[Device]:
    """NumPy's new arrays lie on a device, which has the CUDA kernels and captures graphs."""
    global DEVICE
    DEVICE = Device()
    lt = make_lt(Products())

    def of(x: Plain) -> Any:
        return kernels.CUDA_HALF if is_half(x.dtype) else kernels.CUDA

    with contextlib.ExitStack() as undo:
        undo.enter_context(launch.running_on(Kernels()))
        products = {"planners": lambda: (lt.plan,), "address": lambda x: x.ctypes.data, "_plans": {}}
        undo.enter_context(mock.patch.multiple(multiply, **products))
        for name in ("empty", "zeros", "asarray", "ascontiguousarray"):
            undo.enter_context(mock.patch.object(np, name, getattr(DEVICE, name)))
        undo.enter_context(mock.patch.object(kernels, "of", of))
        undo.enter_context(mock.patch.object(captured, "Cupy", lambda: DEVICE))
        yield DEVICE
