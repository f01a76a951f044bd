"""The CBLAS libraries that can be found on this machine, called through ctypes: MKL, OpenBLAS, BLIS."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ..process import loaded

ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # the constants of cblas.h
_GNU_THREADS, _INTEL_THREADS, _REPRODUCIBLE = 3, 0, 2  # those of mkl.h: threading layers, MKL_CBWR_AUTO

#: {name: (what its file is called where the process has it already, what to ask the loader for)}.
LIBRARIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mkl": (r"libmkl_rt\.so[.\d]*", ("libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")),
    "openblas": (r"lib(scipy_)?openblas.*\.so[.\d]*", ("libopenblas.so.0", "libopenblas.so")),
    "blis": (r"lib(blis|cblas).*\.so[.\d]*", ("libblis.so.4", "libblis.so", "libcblas.so.3", "libcblas.so")),
}

#: What builds put around the names of cblas.h: NumPy's wheels, OpenBLAS and MKL with integers of 64 bits, the rest.
_AFFIXES = (("scipy_", "64_"), ("", "64_"), ("", "_64"), ("scipy_", ""), ("", ""))


class Library:
    """A CBLAS in this process. gemm: {dtype: its function}; is_numpys: whether it is what ``np.matmul`` calls.

    Sizes are passed in 64 bits to all of them: a library whose integers have 32 reads the lower half of the same
    register or slot of the stack (System V, AArch64).
    """

    def __init__(self, name: str, path: str) -> None:
        """Raises OSError where it cannot be loaded or is no CBLAS."""
        self.name, self.path, self.is_numpys = name, path, Path(path).parent.name == "numpy.libs"
        self._dll = ctypes.CDLL(path)
        found = [affix for affix in _AFFIXES if hasattr(self._dll, "cblas_sgemm".join(affix))]
        if not found:
            raise OSError(f"{path} has no cblas_sgemm")
        self._affix = found[0]
        if name == "mkl":
            self._start_mkl()
        self.gemm: dict[np.dtype[Any], Any] = {}
        i, p = c_int64, c_void_p
        for letter, dtype, real in (("s", np.float32, c_float), ("d", np.float64, c_double)):
            gemm = self._function(f"cblas_{letter}gemm")
            gemm.argtypes, gemm.restype = [c_int, c_int, c_int, i, i, i, real, p, i, p, i, real, p, i], None
            self.gemm[np.dtype(dtype)] = gemm

    def _function(self, name: str) -> Any:
        return getattr(self._dll, name.join(self._affix))

    def _start_mkl(self) -> None:
        """What MKL must know before its first product, unless its own variables say it."""
        if "MKL_THREADING_LAYER" not in os.environ:  # OpenMP's threads: GCC's, which others use too, if it is there
            self._dll.MKL_Set_Threading_Layer(_GNU_THREADS if _loads("libgomp.so.1") else _INTEL_THREADS)
        if "MKL_CBWR" not in os.environ:  # else the bits may depend on where malloc puts arrays, and runs differ
            self._dll.MKL_CBWR_Set(_REPRODUCIBLE)
        self._dll.MKL_Set_Dynamic(0)

    def set_threads(self, n: int) -> None:
        """Compute with ``n`` threads from now on, where the library can be told."""
        if self.name == "mkl":
            self._dll.MKL_Set_Num_Threads(c_int(n))
        elif self.name == "openblas":
            self._function("openblas_set_num_threads")(c_int(n))
        elif hasattr(self._dll, "bli_thread_set_num_threads"):
            self._dll.bli_thread_set_num_threads(c_int64(n))

    def __str__(self) -> str:
        """Name and version; for OpenBLAS the processor whose kernels it chose."""
        if self.name == "mkl":
            text = ctypes.create_string_buffer(256)
            self._dll.MKL_Get_Version_String(text, c_int(len(text)))
            version = re.search(r"Version (\d[\w.]*)", text.value.decode())
            return f"MKL {version[1]}" if version else "MKL"
        if self.name == "openblas":
            texts = [self._function(f"openblas_get_{what}") for what in ("config", "corename")]
            for text in texts:
                text.argtypes, text.restype = [], ctypes.c_char_p
            config, core = (text().decode() for text in texts)
            return f"{' '.join(config.split()[:2])}, kernels for {core}"
        return Path(self.path).name


@functools.cache
def find(name: str) -> Library | None:
    """The library ``name``, one of ``LIBRARIES``, loaded if need be; None where there is none."""
    for path in _candidates(name):
        try:
            return Library(name, path)
        except OSError:
            continue
    return None


def _candidates(name: str) -> Iterator[str]:
    """Where it may be: in this process (NumPy's before SciPy's), in this environment, where the loader looks."""
    pattern, files = LIBRARIES[name]
    yield from map(str, sorted(loaded(pattern), key=lambda path: path.parent.name != "numpy.libs"))
    yield from (str(path) for path in (Path(sys.prefix, "lib", file) for file in files) if path.exists())
    if name == "mkl":
        try:
            listed = importlib.metadata.files("mkl") or []
        except importlib.metadata.PackageNotFoundError:
            listed = []
        yield from (str(file.locate()) for file in listed if re.fullmatch(pattern, file.name))
    yield from files


def _loads(file: str) -> bool:
    try:
        return bool(ctypes.CDLL(file))
    except OSError:
        return False


def is_intel() -> bool:
    """Whether the processor is Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
