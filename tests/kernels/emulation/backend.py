"""The CUDA sources on the CPU and NumPy arrays: a backend of ``hpcmp.kernels.cuda.launch``.

g++ builds each source, with ``include/emulation.h`` before it, into a shared library, once (kept in the temporary
folder by the hash of its text). A launch copies its arrays to the ends of memory beyond which none is mapped, and back,
so that a thread that reads or writes outside them is caught; so are arguments that a kernel's parameters do not fit,
writes beside an array, and barriers that not all threads reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcmp.kernels.cuda import launch
from tests.kernels.cublaslt import CublasLt, make_lt, multiplying

INCLUDE = Path(__file__).with_name("include")
FLAGS = "-std=c++17 -O1 -fno-strict-aliasing -ffp-contract=off -fPIC -shared -w".split()
FLAGS += "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error".split()
OUTCOMES = {
    1: "touched memory outside its arguments",
    2: "waits for ever",
    3: "wrote beyond its dynamic shared memory",
    4: "moved numbers at once at an address that is no multiple of their size, or went beyond an array of its own",
}
MOST = 2**31 - 1, 65535, 65535, 1024, 1024, 64  # blocks of a grid, and threads of a block, along each axis
#: Where libraries are kept. Ranks under mpirun, whose temporary folder is another one, inherit it.
BUILT = Path(os.environ.setdefault("HPCMP_EMULATION", f"{tempfile.gettempdir()}/hpcmp-emulation-{os.getuid()}"))
FILL = 0xFF  # what lies beside an array, and in a new one: NaN in every type

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA sources with")


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """CUDA kernels run here, on NumPy arrays, and cuBLASLt's products; what ``numpy.empty`` makes is NaN."""
    products = multiplying(make_lt(CublasLt()))
    with launch.running_on(Emulation()), products, mock.patch.object(np, "empty", filled):
        yield


def filled(shape: Any, dtype: Any = float, *args: Any, **settings: Any) -> np.ndarray[Any, Any]:
    """As ``numpy.empty``, with every byte set."""
    found = np.ndarray(shape, dtype)
    found.reshape(-1).view(np.uint8)[:] = FILL
    return found


class Emulation:
    """The backend."""

    multiprocessors = 3

    def compile(self, source: str, expressions: tuple[str, ...]) -> dict[str, Any]:
        library = built(launch.text(source), expressions)
        return {expression: Emulated(library, i, expression) for i, expression in enumerate(expressions)}


@functools.cache
def built(text: str, expressions: tuple[str, ...]) -> ctypes.CDLL:
    """The library of some kernels of a source."""
    entries = ", ".join(f"emulation::entry(&{expression})" for expression in expressions)
    whole = f"{text}\nstd::vector<emulation::Entry>& emulation::entries() {{\n"
    whole += f"    static std::vector<Entry> all = {{{entries}}};\n    return all;\n}}\n"
    headers = b"".join(path.read_bytes() for path in sorted(INCLUDE.iterdir()))
    name = hashlib.sha256(headers + whole.encode() + " ".join(FLAGS).encode()).hexdigest()[:24]
    BUILT.mkdir(exist_ok=True)
    library = BUILT / f"{name}.so"
    if not library.exists():
        code, made = BUILT / f"{name}.{os.getpid()}.cpp", BUILT / f"{name}.{os.getpid()}.so"
        code.write_text(whole)
        include = ["-I", str(INCLUDE), "-include", "emulation.h"]
        subprocess.run(["g++", *FLAGS, *include, "-o", str(made), str(code)], check=True, timeout=300)
        made.rename(library)
        code.unlink()
    found = ctypes.CDLL(str(library))
    found.emulation_signature.restype = ctypes.c_char_p
    found.emulation_launch.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * 2]
    return found


class Emulated:
    """A kernel, called as CuPy's are."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, library: ctypes.CDLL, entry: int, name: str) -> None:
        self.library, self.entry, self.name = library, entry, name
        self.parameters: list[str] = library.emulation_signature(entry).decode().split()

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        dims = (*grid, 1, 1)[:3] + (*block, 1, 1)[:3]
        assert all(1 <= n <= most for n, most in zip(dims, (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True)), (
            dims
        )
        assert dims[3] * dims[4] * dims[5] <= 1024, dims
        assert shared_mem <= min(self.max_dynamic_shared_size_bytes, 227 << 10), shared_mem
        assert len(args) == len(self.parameters), f"{self.name}: {len(args)} arguments of {len(self.parameters)}"
        pairs = list(zip(args, self.parameters, strict=True))
        memory = Memory([(a, p) for a, p in pairs if _is_array(a)])
        try:
            values = [self._value(a, p, memory) for a, p in pairs]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            address = ctypes.c_void_p()
            outcome = self.library.emulation_launch(
                self.entry, (ctypes.c_uint * 6)(*dims), shared_mem, pointers, ctypes.byref(address)
            )
            if outcome:
                raise RuntimeError(
                    f"{self.name} {OUTCOMES[outcome]}{memory.near(address.value) if outcome == 1 else ''}"
                )
            memory.settle(self.name)
        finally:
            memory.free()

    def _value(self, argument: Any, parameter: str, memory: Memory) -> Any:
        """An argument as the bytes that the kernel reads."""
        kind, size = parameter[0], int(parameter[1:])
        if argument is None:
            fits, value = kind in "pP", ctypes.c_void_p(0)
        elif _is_array(argument):
            fits, value = kind in "pP" and argument.itemsize == size, ctypes.c_void_p(memory.address(argument))
        else:
            raw = np.asarray(argument)
            sort = {"i": "i", "u": "i", "b": "i", "f": "f", "V": "s"}[raw.dtype.kind]
            fits, value = (kind, size) == (sort, raw.itemsize), (ctypes.c_char * raw.itemsize)(*raw.tobytes())
        if not fits:
            raise TypeError(f"{self.name}: {argument!r} for a parameter of the kind {parameter}")
        return value


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.names is None


class Memory:
    """Copies of arrays, each at the end of mapped memory but for up to 15 bytes, which keep its address modulo 16.

    Arrays whose memory overlaps lie in one piece.
    """

    def __init__(self, arrays: list[tuple[Any, str]]) -> None:
        self.pieces: list[Piece] = []
        bounds = sorted((*np.lib.array_utils.byte_bounds(a), "P" in p) for a, p in arrays if a.size)
        for low, high, written in bounds:
            if self.pieces and low < self.pieces[-1].high:
                last = self.pieces[-1]
                last.high, last.written = max(last.high, high), last.written or written
            else:
                self.pieces.append(Piece(low, high, written))
        for piece in self.pieces:
            piece.enter()

    def address(self, array: Any) -> int:
        """Where the copy's first number is; one that may not be touched, of an empty array."""
        place = array.__array_interface__["data"][0]
        for piece in self.pieces:
            if array.size and piece.low <= place < piece.high:
                return piece.start + place - piece.low
        return 16

    def settle(self, name: str) -> None:
        """Copy back what may have been written."""
        for piece in self.pieces:
            piece.settle(name)

    def free(self) -> None:
        for piece in self.pieces:
            piece.free()

    def near(self, address: int | None) -> str:
        """Where an address lies, told from the arrays."""
        offsets = [((address or 0) - p.start, p.high - p.low) for p in self.pieces]
        offset, size = min(offsets, key=lambda pair: abs(pair[0]), default=(address, 0))
        return f": byte {offset} of an array of {size}"


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Piece:
    """The bytes from ``low`` to ``high``, and their copy from ``start`` on."""

    def __init__(self, low: int, high: int, written: bool) -> None:
        self.low, self.high, self.written = low, high, written

    def enter(self) -> None:
        page, size = mmap.PAGESIZE, self.high - self.low
        room = -(-(size + 16) // page) * page
        self.length = room + 2 * page
        self.base = _libc.mmap(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
        _libc.mprotect(self.base, page, 0)
        _libc.mprotect(self.base + page + room, page, 0)
        self.first, self.end = self.base + page, self.base + page + room
        self.start = self.end - size - (self.end - size - self.low) % 16
        ctypes.memset(self.first, FILL, room)
        ctypes.memmove(self.start, self.low, size)
        self.before = b"" if self.written else ctypes.string_at(self.start, size)

    def settle(self, name: str) -> None:
        size = self.high - self.low
        beside = ctypes.string_at(self.first, self.start - self.first)
        beside += ctypes.string_at(self.start + size, self.end - self.start - size)
        assert beside.count(FILL) == len(beside), f"{name} wrote beside an array of {size} bytes"
        if self.written:
            ctypes.memmove(self.low, self.start, size)
        else:
            assert ctypes.string_at(self.start, size) == self.before, f"{name} wrote to a constant array"

    def free(self) -> None:
        _libc.munmap(self.base, self.length)
