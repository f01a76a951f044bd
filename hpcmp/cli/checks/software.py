"""Software: versions that differ between hosts, packages from elsewhere, settings of the environment that mislead."""

from __future__ import annotations

import os
import site
import sys
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from ...training.alike import code
from ...training.versions import load, versions
from .base import Check, Ranks, Subject, some

_PACKAGES = "numpy", "mpi4py", "h5py", "numba", "ml_dtypes", "cupy"

#: Variables of the environment: the values of each that mislead (None: any), and what comes of them.
MISLEADING: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "HDF5_VOL_CONNECTOR": (None, "files would go through another reader and writer than HDF5's own"),
    "HDF5_DRIVER": (None, "files would be laid out by another driver than the one that is asked for"),
    "HDF5_USE_FILE_LOCKING": (("TRUE", "1"), "HDF5 refuses every file where the file system has no locks"),
    "HDF5_DISABLE_VERSION_CHECK": (None, "an HDF5 that does not fit h5py goes unnoticed"),
    "PYTHONHOME": (None, "Python takes the library of another one"),
    "PYTHONDEVMODE": (None, "Python checks every allocation: slow"),
    "PYTHONTRACEMALLOC": (None, "Python records every allocation: slow"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "the host waits for every kernel: slow"),
    "NCCL_IB_DISABLE": (("1",), "NCCL leaves InfiniBand alone: slow between nodes"),
    "NCCL_P2P_DISABLE": (("1",), "NCCL leaves NVLink alone: slow within a node"),
}


@dataclass(frozen=True)
class Software:
    """What a rank runs. foreign: packages that go before those of its environment, and their folders; hdf5: the version
    that h5py was built for, and the one that it has; settings: those variables of MISLEADING that are set."""

    host: str
    versions: dict[str, str]
    foreign: dict[str, str] = field(default_factory=dict)
    hdf5: tuple[str, str] = ("", "")
    settings: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    blas: str = ""
    coretype: str = ""


def look(ranks: Ranks) -> Software:
    """This rank's; MPI is asked if it has been started."""
    from ...kernels import blas

    mpi = sys.modules.get("mpi4py.MPI")
    h5py, _ = load("h5py")
    built = ".".join(map(str, h5py.version.hdf5_built_version_tuple)) if h5py else ""
    return Software(
        ranks.host,
        versions(mpi if mpi and mpi.Is_initialized() else None) | {"hpcmp": code()},
        foreign(),
        (built, h5py.version.hdf5_version if h5py else ""),
        {name: os.environ[name] for name in MISLEADING if os.environ.get(name)},
        sys.getfilesystemencoding().lower(),
        str(blas.current() or "NumPy alone"),
        os.environ.get("OPENBLAS_CORETYPE", ""),
    )


def foreign() -> dict[str, str]:
    """The packages that go before those of this Python's environment, and their folders: those of PYTHONPATH, which a
    module file may set, or of ~/.local."""
    found = {}
    for name in _PACKAGES:
        taken, own = find_spec(name), PathFinder.find_spec(name, site.getsitepackages())
        if taken and own and taken.origin and taken.origin != own.origin:
            found[name] = str(Path(taken.origin).parent.parent)
    return found


def version_checks(ranks: list[Software]) -> list[Check]:
    """A line for each version; a problem where hosts differ."""
    checks = []
    for name in dict.fromkeys(name for rank in ranks for name in rank.versions):
        found: dict[str, set[str]] = {}
        for rank in ranks:
            found.setdefault(rank.versions.get(name, "not found"), set()).add(rank.host)
        if len(found) > 1:
            value = "; ".join(f"{version} on {some(hosts)}" for version, hosts in found.items())
            advice = "start every rank from the same environment, on a file system that all hosts share"
            checks.append(Check(name, "problem", value, advice))
        elif name == "h5py" and "not installed" in found:
            checks.append(Check(name, "problem", "not installed", "`pip install h5py`: data and checkpoints are HDF5"))
        else:
            checks.append(Check(name, "ok", next(iter(found))))
    return checks


def packages_check(ranks: list[Software]) -> Check:
    """Whether all packages are those of the environment."""
    strange = {name: folder for rank in ranks for name, folder in rank.foreign.items()}
    if not strange:
        return Check("packages", "ok", f"all of {sys.prefix}")
    taken = ", ".join(f"{name} of {folder}" for name, folder in strange.items())
    value = f"{taken} goes before that of {sys.prefix}"
    home = any(folder.startswith(os.path.expanduser("~/.local")) for folder in strange.values())
    advice = "`export PYTHONNOUSERSITE=1`" if home else "`unset PYTHONPATH`, or leave that folder out of it"
    return Check("packages", "warn", value, advice)


def hdf5_check(ranks: list[Software]) -> Check | list[Check]:
    """Whether h5py has the HDF5 that it was built for."""
    odd = [rank for rank in ranks if rank.hdf5[0] != rank.hdf5[1]]
    if not odd:
        return []
    built, runs = odd[0].hdf5
    value = f"h5py was built for {built}, and has {runs} on {some(rank.host for rank in odd)}"
    advice = "`pip install --no-binary=h5py --force-reinstall h5py`, or unload the hdf5 module that goes before it"
    return Check("HDF5 library", "warn", value, advice)


def parallel_hdf5() -> bool:
    """Whether h5py writes one file from many ranks."""
    h5py, _ = load("h5py")
    return bool(h5py and h5py.get_config().mpi)


def parallel_check(ranks: list[Software]) -> Check:
    """Which of the choices of checkpoint.storage there are; a run that asks for mpio without it is in ``needs``."""
    serial = "no mpio driver: checkpoint.storage may be any but mpio"
    return Check("parallel HDF5", "ok", "mpio driver" if parallel_hdf5() else serial)


def settings_check(ranks: list[Software]) -> Check | list[Check]:
    """Variables that cost time or trust; a line for each, and one if there are none."""
    checks = []
    for name, (values, effect) in MISLEADING.items():
        found = {rank.settings[name]: rank for rank in ranks if name in rank.settings}
        bad = [value for value in found if values is None or value.upper() in values]
        if bad:
            checks.append(Check("environment", "warn", f"{name}={bad[0]}: {effect}", f"`unset {name}`"))
    latin = [rank for rank in ranks if rank.encoding.replace("-", "") != "utf8"]
    if latin:
        value = f"names of files are {latin[0].encoding} on {some(rank.host for rank in latin)}, not UTF-8"
        checks.append(Check("environment", "warn", value, "`export PYTHONUTF8=1`, or LC_ALL=C.UTF-8"))
    return checks or Check("environment", "ok", "no variable is set that misleads")


def matrix_check(ranks: list[Software]) -> Check:
    """Which library makes the matrix products, and the processor that its code is for."""
    mine = ranks[0]
    if mine.coretype and "OpenBLAS" in mine.blas:
        advice = "`unset OPENBLAS_CORETYPE`: OpenBLAS itself takes the code for this processor"
        return Check("matrix library", "warn", f"{mine.blas} (by OPENBLAS_CORETYPE={mine.coretype})", advice)
    return Check("matrix library", "ok", mine.blas)


SUBJECT = Subject(
    "software", look, (version_checks, packages_check, hdf5_check, parallel_check, matrix_check, settings_check)
)
