"""What a process can tell about its job without a message: its launcher, its MPI, its share of the cores."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch import Launcher as Launcher
from ..batch import launcher as launcher
from ..errors import InputError
from ..process import cores as cores
from ..process import loaded, threads


def start_mpi() -> Any:
    """The module ``mpi4py.MPI``, initialised, with all processes of the job in its COMM_WORLD.

    Raises InputError for the wrong mpiexec, before MPI_Init where that can be told, since there some libraries abort;
    ImportError or RuntimeError where there is no mpi4py or no MPI library.
    """
    import mpi4py

    survives = "mpi4py.MPI" not in sys.modules and "OMPI_MCA_mpi_ft_enable" in os.environ  # mpirun --with-ft ulfm
    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, not survives
    from mpi4py import MPI

    if not MPI.Is_initialized():
        if wrong := _other_mpi(MPI.get_vendor()[0]):
            raise InputError(wrong)
        if (library := mpi_library()) is not None and library.is_relative_to(sys.prefix):
            os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # PyPI's writes an error for every window that is made
        _choose_sums(os.environ)
        with _alone():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        if survives:
            atexit.register(_finalize, MPI)
    if wrong := wrong_mpiexec(MPI.COMM_WORLD.size):
        raise InputError(wrong)
    return MPI


def alone(mpi: Any) -> bool:
    """Whether all other processes of the job are dead, as MPI knows: then there is nobody to abort, and Open MPI's
    mpirun would take an abort for success."""
    return bool(_dead(mpi) == mpi.COMM_WORLD.size - 1)


def _dead(mpi: Any) -> int:
    """How many processes of the job are dead, as MPI knows."""
    try:
        return int(mpi.COMM_WORLD.Get_failed().size)
    except (NotImplementedError, mpi.Exception):  # an MPI whose processes do not outlive each other
        return 0


def _finalize(mpi: Any) -> None:
    """At the end of a process that may outlive others. If it has, MPI_Finalize waits for them at times, for ever."""
    if not _dead(mpi) and not mpi.Is_finalized():
        mpi.Finalize()


def _choose_sums(environ: MutableMapping[str, str]) -> None:
    """Between hosts, have Open MPI's nonblocking sums go by halving and doubling (Rabenseifner's algorithm).

    By itself it sends those in place, and those of less than four ranks, up and down a binomial tree, whole: on four
    hosts that takes three times as long (docs/topology.md). Within a host short messages are faster by the tree.
    """
    started = launcher(environ)
    if started and started.local_size and started.local_size < started.size:
        environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Spare a process that no launcher started Open MPI's search for network cards, a second long, while MPI starts."""
    name = "OMPI_MCA_btl"
    if launcher() is not None or name in os.environ:
        yield
        return
    os.environ[name] = "self"
    try:
        yield
    finally:
        del os.environ[name]  # a job that this process launches has ranks to talk to


def wrong_mpiexec(world_size: int) -> str | None:
    """What to do when a launcher started several processes and each is alone in ``COMM_WORLD``; None if all is well.

    That is what the mpiexec of another MPI leads to: N runs of one rank, which overwrite each other's files.
    """
    started = launcher()
    if started is None and world_size == 1 and os.environ.get("PMIX_RANK", "0") not in ("", "0"):
        # PMIx alone tells no size: the other processes of the job know, the first cannot.
        return f"PMIx started this process as rank {os.environ['PMIX_RANK']}, and MPI sees a job of 1: {_start_with()}"
    if started is None or started.size == 1 or world_size != 1:
        return None
    if started.name == "srun":
        advice = (
            "start with `srun --mpi=pmix` (`srun --mpi=list` shows what there is), or with mpirun in the allocation"
        )
    else:
        advice = _start_with()
    return f"{started.name} started {started.size} processes, and MPI sees {started.size} jobs of 1 rank: {advice}"


def _other_mpi(vendor: str) -> str | None:
    """The same before MPI_Init, from the name of the library alone."""
    started = launcher()
    foreign = {"Open MPI": ("MPICH", "Intel MPI", "MVAPICH"), "MPICH Hydra": ("Open MPI", "Spectrum MPI")}
    if started is None or started.size == 1 or vendor not in foreign.get(started.name, ()):
        return None
    return f"{started.name} started {started.size} processes, and they use {vendor}: {_start_with()}"


def _start_with() -> str:
    library = mpi_library()
    if own := mpiexec(library):
        return f"start with {own}, which belongs to {library}"
    return f"start with the mpiexec that belongs to {library or 'the MPI library in use'}"


def mpiexec(library: Path | None) -> Path | None:
    """The mpiexec installed with an MPI library: in ``bin`` beside or above the library's folder."""
    places = [] if library is None else [folder / "bin" for folder in list(library.parents)[:3]]
    names = (folder / name for folder in places for name in ("mpirun", "mpiexec"))
    return next((path for path in names if os.access(path, os.X_OK)), None)


def mpi_library() -> Path | None:
    """The MPI library that this process has loaded."""
    return next(iter(mpi_libraries()), None)


def mpi_libraries() -> list[Path]:
    """All that it has loaded: more than one is one too many."""
    return loaded(r"libmpi(_abi|_cray|_gnu_\d+|_ibm|_intel|_nvidia|ch)?\.so[.\d]*")


def _function(library: Path | None, name: str) -> Any:
    """A C function of a library that is loaded already, or None."""
    if library is None:
        return None
    try:
        return getattr(ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY), name, None)
    except OSError:
        return None


def cuda_aware(mpi: Any, override: str = "auto") -> bool:
    """Whether the MPI behind ``mpi`` (the module ``mpi4py.MPI``) takes pointers to GPU memory, or crashes on them.

    ``override`` ("yes" or "no") decides; then HPCMP_CUDA_AWARE; then the library: ``mpi_memory_alloc_kinds`` (MPI 4.1),
    ``MPIX_Query_cuda_support`` (Open MPI, MPICH), ``MPIX_GPU_query_support`` (Cray, when MPICH_GPU_SUPPORT_ENABLED=1).
    Raises InputError for another word in HPCMP_CUDA_AWARE.
    """
    word = override if override != "auto" else os.environ.get("HPCMP_CUDA_AWARE", "auto")
    if word not in ("auto", "yes", "no"):
        raise InputError(f"HPCMP_CUDA_AWARE={word}: expected yes, no or auto")
    if word != "auto":
        return word == "yes"
    info = mpi.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    if any(kind.split(":")[0].strip() == "cuda" for kind in kinds.split(",")):
        return True
    library = mpi_library()
    if "CRAY" in mpi.Get_library_version().upper():
        query, supported = _function(library, "MPIX_GPU_query_support"), ctypes.c_int(0)
        enabled = os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1"
        return bool(enabled and query and query(0, ctypes.byref(supported)) == 0 and supported.value)  # 0: CUDA
    query = _function(library, "MPIX_Query_cuda_support")
    return bool(query and query())


@dataclass(frozen=True)
class Share:
    """The cores that a process may use, and the threads that its kernels and matrix products have."""

    cores: frozenset[int]
    threads: int


def share() -> Share:
    """This process's share."""
    return Share(cores(), threads())


def oversubscription(local_size: int, shares: Sequence[Share] | None = None) -> str | None:
    """A warning when the threads of the ``local_size`` ranks of this host outnumber its cores; else None.

    ``shares`` of all these ranks make it exact. Without them, ranks are taken to share this rank's cores, unless the
    host has enough for every rank to own as many.
    """
    mine = share()
    if shares is None:
        shares = [mine] * local_size
        own = local_size * len(mine.cores) <= (os.cpu_count() or 1)
        cores = len(mine.cores) * (local_size if own else 1)
    else:
        cores = len(frozenset().union(*(s.cores for s in shares)))
    wanted = sum(s.threads for s in shares)
    if wanted <= cores:
        return None
    advice = f"start at most {cores} ranks" if local_size > cores else f"set OMP_NUM_THREADS={cores // local_size}"
    return f"{wanted} threads of {local_size} ranks share {cores} cores: {advice}"
