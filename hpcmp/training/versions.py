"""Which software a process runs: what should be the same on every host of a run."""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__


def load(name: str) -> tuple[Any, str]:
    """The module, or None and why: what is optional or broken must not end who asks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what CuPy misses is in doctor's report
            return importlib.import_module(name), ""
    except Exception as error:
        return None, first_line(error)


def ask(function: Callable[[], Any], otherwise: Any) -> Any:
    """What a library answers, or ``otherwise`` where it raises, as CuPy does without a driver."""
    try:
        return function()
    except Exception:
        return otherwise


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def versions(mpi: Any) -> dict[str, str]:
    """{software: version}; ``mpi``: the module ``mpi4py.MPI``, initialised, or None."""
    from ..kernels import blas
    from ..kernels.cuda import libraries

    numpy, h5py, cupy, nccl = (load(name)[0] for name in ("numpy", "h5py", "cupy", "cupy.cuda.nccl"))
    versions = {"Python": platform.python_version(), "hpcmp": __version__, "NumPy": numpy.__version__}
    versions["BLAS"] = str(blas.current() or "NumPy alone").partition(",")[0]  # not its kernels: processors may differ
    mpi4py, _ = load("mpi4py")
    versions["mpi4py"] = mpi4py.__version__ if mpi4py else "not installed"
    if mpi:
        vendor, number = mpi.get_vendor()
        standard = ".".join(map(str, mpi.Get_version()))
        first = mpi.Get_library_version().splitlines()[0].strip(" \t\0")
        versions["MPI"] = f"{vendor} {'.'.join(map(str, number))}, MPI {standard} ({first})"
    versions["h5py"] = h5py.__version__ if h5py else "not installed"
    versions["HDF5"] = h5py.version.hdf5_version if h5py else "not installed"
    versions["CuPy"] = cupy.__version__ if cupy else "not installed"
    if cupy:
        runtime = cupy.cuda.runtime
        versions["CUDA runtime"] = _cuda(ask(runtime.runtimeGetVersion, 0))
        versions["CUDA driver"] = _cuda(ask(runtime.driverGetVersion, 0))
        code = ask(lambda: nccl.get_version(), 0)
        versions["NCCL"] = libraries.dotted(code) if code else "not found"
    if cupy and ask(runtime.getDeviceCount, 0):  # else nothing loads them
        nvrtc = ask(lambda: cupy.cuda.nvrtc.getVersion(), ())
        versions["NVRTC"] = ".".join(map(str, nvrtc)) or "not found"
        for name, library in (("cuBLASLt", libraries.cublaslt()), ("cuDNN", libraries.cudnn())):
            versions[name] = library.version or f"not found ({library.why})"
    return versions


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "not found"


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out where ``folder`` lies, read from git's files; None if it is in no checkout.

    No program is started: an MPI process that forks may be ended by its network's driver. Changes that are not
    committed are not seen.
    """
    try:
        for place in (folder, *folder.parents):
            if (place / ".git").exists():
                return _head(place / ".git")
    except (OSError, ValueError):
        pass
    return None


def _head(git: Path) -> str | None:
    if git.is_file():  # a worktree's: "gitdir: PATH"
        git = git.parent / git.read_text().removeprefix("gitdir:").strip()
    common = git / "commondir"
    shared = git / common.read_text().strip() if common.exists() else git
    kind, _, name = (git / "HEAD").read_text().strip().partition(" ")
    if kind != "ref:":
        return kind
    for place in (git, shared):
        if (place / name).exists():
            return (place / name).read_text().strip()
    packed = (line.split() for line in (shared / "packed-refs").read_text().splitlines())
    return next((words[0] for words in packed if words[1:] == [name]), None)
