"""Writing pieces to HDF5 files: one rank lays a file out, then one rank or all write numbers into it.

When the numbers are written, all that HDF5 keeps about them is on the disk already. So a write that fails (disk full,
quota) fails on the rank that makes it, and the file can still be closed: HDF5 hangs, or crashes the process, when ranks
define datasets together and one of them has no room.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import to_host
from .agree import reason
from .guarded import GuardedFile
from .manifest import on_disk
from .slab import Region, Slab


@dataclass(frozen=True)
class Dataset:
    """A dataset to create: its path in the file, shape, dtype, and where in the tensor of ``whole`` shape it starts."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    origin: tuple[int, ...]
    whole: tuple[int, ...]


def lay_out(path: Path, datasets: Sequence[Dataset]) -> None:
    """Create the file, with its full length and every dataset in its place, but no numbers. Raises OSError."""
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with GuardedFile(path, "x+") as guarded:
        with h5py.File(guarded, "w") as file:
            for item in datasets:
                dataset = file.create_dataset(item.path, item.shape, on_disk(item.dtype), dcpl=plist)
                if not item.shape:
                    dataset[()] = 0  # h5py leaves scalars out of the property list: this gives them their place
                dataset.attrs["start"] = np.array(item.origin, np.int64)
                dataset.attrs["shape"] = np.array(item.whole, np.int64)
        guarded.check()


def write(
    path: Path,
    parts: Sequence[tuple[Dataset, Slab, Region]],
    comm: Any,
    at: Callable[[str], None],
) -> list[str]:
    """Write each part into its dataset of a file that is laid out; returns the parts' digests.

    comm: None, or an mpi4py communicator whose ranks all write to this file, through MPI-IO (then collective). at: is
    told each phase. On return the file is closed and its numbers are on the disk. Raises OSError, once it is closed.
    """
    import h5py

    guarded = GuardedFile(path, "r+") if comm is None else None
    options = {} if comm is None else {"driver": "mpio", "comm": comm}
    failure: Exception | None = None
    digests: list[str] = []
    # Closing is collective, so that an error waits until it is done.
    with guarded or nullcontext(), h5py.File(guarded or path, "r+", **options) as file:
        try:
            for item, slab, region in parts:
                digests.append(_write(file[item.path], item, slab, region))
                at("write")
                if guarded:
                    guarded.check()
        except Exception as error:
            failure = error
        at("flush")
        file.flush()
    if guarded:
        guarded.check()
    if failure:
        raise OSError(f"{path}: {reason(failure)}")
    at("fsync")
    sync(path)
    return digests


def _write(dataset: Any, item: Dataset, slab: Slab, region: Region) -> str:
    crc = 0
    for block in region.blocks(dataset.dtype.itemsize):
        host: Any = np.asarray(to_host(slab.data[block.relative(region.start)]), dataset.dtype, order="C")
        crc = zlib.crc32(host, crc)
        dataset[block.relative(item.origin)] = host
    return f"{crc:08x}"


def sync(path: Path) -> None:
    """Force a file, or a directory with the names in it, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no directories
            raise
    finally:
        os.close(descriptor)
