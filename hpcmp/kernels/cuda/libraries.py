"""Which of NVIDIA's libraries can be loaded here, for those who ask: a run takes what there is (``multiply``,
``cudnn``), and computes the same without, but slower."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

#: The compute capability, as ``capability`` gives it, from which on GPUs multiply 8 bits (``multiply.scaled``).
EIGHT_BITS = 89


def capability() -> int:
    """The compute capability of this process's GPU, ten times: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device().compute_capability)


class Library(NamedTuple):
    """version: "" if it cannot be loaded; why: what is then missing, in one line."""

    version: str = ""
    why: str = ""


def cublaslt() -> Library:
    """cuBLASLt, through nvmath-python."""
    return _loaded(_cublaslt)


def cudnn() -> Library:
    """cuDNN, through its frontend; none with HPCMP_CUDNN=no in the environment."""
    return Library(why="HPCMP_CUDNN=no") if os.environ.get("HPCMP_CUDNN") == "no" else _loaded(_cudnn)


def said() -> str:
    """What makes products and attention here, in one line."""
    lt, dnn = cublaslt(), cudnn()
    products = f"cuBLASLt {lt.version}" if lt.version else f"cuBLAS through CuPy ({lt.why})"
    attention = f"by cuDNN {dnn.version} where it can, else in tiles" if dnn.version else f"in tiles ({dnn.why})"
    return f"matrix products by {products}; attention {attention}"


def dotted(number: int) -> str:
    """A version as NVIDIA's libraries number it, such as 13.1.0 of 130100."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _loaded(ask: Callable[[], str]) -> Library:
    try:
        return Library(ask())
    except Exception as error:  # whatever a package raises that does not find its library
        return Library(why=(str(error) or type(error).__name__).splitlines()[0])


def _cublaslt() -> str:
    import nvmath
    from nvmath.bindings import cublasLt

    return f"{dotted(int(cublasLt.get_version()))} (nvmath-python {nvmath.__version__})"


def _cudnn() -> str:
    import cudnn

    return f"{cudnn.backend_version_string()} (frontend {cudnn.__version__})"
