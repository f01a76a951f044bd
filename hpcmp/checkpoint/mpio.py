"""Writing pieces to one file through parallel HDF5, whose MPI-IO gathers small runs into large writes.

As in ``writer.py`` the file is laid out before; all that happens here is numbers. A collective write that fails on
one rank leaves the others waiting for ever, within HDF5 and MPI-IO: so room is reserved, and limits are looked at,
before the file is opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import reason
from . import digest, writer
from .digest import Running
from .storage import Storage
from .writer import Part

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

LIBC = ctypes.CDLL(None, use_errno=True)


def write(
    path: Path,
    parts: Sequence[Part],
    rounds: Mapping[str, int],
    storage: Storage,
    mesh: Mesh,
    at: Callable[[str], None],
) -> list[str]:
    """Write each part into its dataset, and read it back, as ``writer.write`` does; returns the parts' digests.

    Collective over ``mesh``, whose recorder tells what ranks wait in here. rounds: the tensors that are written by all
    ranks together, and in how many blocks, the same on all ranks; a rank that has fewer blocks, or has failed, takes
    part with none, so that nobody waits for it. The others each rank writes when it likes. Raises OSError, once the
    file is closed.
    """
    import h5py

    from ..comm.detect import start_mpi

    alone, together = (h5py.h5p.create(h5py.h5p.DATASET_XFER) for _ in range(2))
    alone.set_dxpl_mpio(h5py.h5fd.MPIO_INDEPENDENT)
    together.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    running = [digest.running() for _ in parts]
    by_name: dict[str, list[tuple[Part, Running]]] = {name: [] for name in rounds}
    for part, mine in zip(parts, running, strict=True):
        by_name.setdefault(part[0].path, []).append((part, mine))
    failures: list[Exception] = []
    with _kept(failures):
        _make_room(path, reserve=mesh.rank == 0)
    if any(mesh.gather_objects(bool(failures))):
        if failures:
            raise failures[0]
        return [mine.hexdigest() for mine in running]  # of nothing: it is raised on another rank
    info = start_mpi().Info.Create(storage.info())
    with ExitStack() as stack:
        with _opened(path, mesh, info) as file:
            with _kept(failures):
                held = stack.enter_context(open(path, "rb"))
                for name, pairs in by_name.items():
                    if name not in rounds:
                        dataset = file[name].id
                        for block in _blocks(pairs):
                            _put(dataset, block, alone)
                        at("write")
            for name, count in rounds.items():
                dataset, blocks = file[name].id, _blocks(by_name[name])
                for _ in range(count):
                    found = None
                    with _kept(failures):
                        found = None if failures else next(blocks, None)
                    with _kept(failures), mesh.flight.blocking("MPI-IO write"):
                        _put(dataset, found, together)
                at("write")
        info.Free()
        if failures:
            raise OSError(f"{path}: {reason(failures[0])}")
        digests = [mine.hexdigest() for mine in running]
        writer.settle(path, held.fileno(), parts, digests, at, storage.verify)
    return digests


@contextmanager
def _opened(path: Path, mesh: Mesh, info: Any) -> Iterator[Any]:
    """The file, opened and closed by all ranks together."""
    import h5py

    with mesh.flight.blocking("MPI-IO open"):
        file = h5py.File(path, "r+", driver="mpio", comm=mesh.comm, info=info)
    try:
        yield file
    finally:
        with mesh.flight.blocking("MPI-IO close"):
            file.close()


def _make_room(path: Path, reserve: bool) -> None:
    """OSError if this process may not write all of the file, or, for the one that is to ``reserve`` it, if the disk or
    the quota has no room; a file system that reserves nothing is believed."""
    size = path.stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < size:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if reserve and size:
        with path.open("r+b") as file:  # not posix_fallocate, which writes to every block where there is no such call
            failed = LIBC.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size))
        if failed and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise OSError(code, os.strerror(code), str(path))


def _blocks(pairs: Sequence[tuple[Part, Running]]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(where in its dataset it starts, its numbers) for the blocks of parts, each added to the part's digest."""
    for (item, slab, region), running in pairs:
        for block, host in writer.blocks(item, slab, region):
            running.update(host)
            yield tuple(a - o for a, o in zip(block.start, item.origin, strict=True)), host


def _put(dataset: Any, block: tuple[tuple[int, ...], Any] | None, transfer: Any) -> None:
    """Write a block, or take part in a collective write with none."""
    import h5py

    space = dataset.get_space()
    if block is None:
        memory, host = h5py.h5s.create_simple((1,)), np.empty(1, dataset.dtype)
        space.select_none()
        memory.select_none()
    elif (host := block[1]).ndim == 0:
        memory = space
    else:
        memory = h5py.h5s.create_simple(host.shape)
        space.select_hyperslab(block[0], host.shape)
    dataset.write(memory, space, host, dxpl=transfer)


@contextmanager
def _kept(failures: list[Exception]) -> Iterator[None]:
    """What goes wrong in the body is kept for later."""
    try:
        yield
    except Exception as error:
        failures.append(error)
