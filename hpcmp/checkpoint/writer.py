"""Writing pieces to HDF5 files: one rank lays a file out, then each rank writes its numbers at their places.

HDF5 hangs, or crashes the process, when ranks define datasets together and one of them has no room; and it cannot close
a file whose last writes fail. So all that HDF5 keeps is on the disk before there are numbers, and these, contiguous as
they are, are written to the file itself (``mpio.py``: through MPI-IO). A write that fails (disk full, quota) is then
the error of one system call.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import to_host
from ..errors import reason
from . import digest, reader
from .background import Task
from .guarded import GuardedFile
from .manifest import on_disk
from .plan import Dataset
from .runs import runs
from .slab import Region, Slab

Part = tuple[Dataset, Slab, Region]  # where to, the array, which region of the tensor it is


def lay_out(path: Path, datasets: Sequence[Dataset], alignment: int = 1) -> None:
    """Create the file, with its full length and every dataset in its place, but no numbers. Raises OSError.

    Datasets of at least ``alignment`` bytes start at multiples of it.
    """
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with GuardedFile(path, "x+") as guarded:
        options = {"alignment_threshold": alignment, "alignment_interval": alignment}
        with h5py.File(guarded, "w", **options) as file:
            for item in datasets:
                dataset = file.create_dataset(item.path, item.shape, on_disk(item.dtype), dcpl=plist)
                if not item.shape:
                    dataset[()] = 0  # h5py leaves scalars out of the property list: this gives them their place
                dataset.attrs["start"] = np.array(item.origin, np.int64)
                dataset.attrs["shape"] = np.array(item.whole, np.int64)
        guarded.check()
    sync(path)


def lay_out_tensors(path: Path, tensors: Mapping[str, Sequence[tuple[str, Dataset]]]) -> None:
    """Create a file that shows every tensor by its name in its global shape, and holds no numbers. Raises OSError.

    For other programs: a tensor in one piece is a link to it, one in several a virtual dataset, both by the names of
    files in the same directory. ``reader`` never follows either.
    """
    import h5py

    with GuardedFile(path, "x+") as guarded:
        with h5py.File(guarded, "w") as file:
            for name, pieces in tensors.items():
                source, first = pieces[0]
                if len(pieces) == 1:
                    file[name] = h5py.ExternalLink(source, first.path)
                    continue
                layout = h5py.VirtualLayout(first.whole, on_disk(first.dtype))
                for source, item in pieces:
                    index = Region(item.origin, item.shape).relative((0,) * len(item.shape))
                    layout[index] = h5py.VirtualSource(source, item.path, item.shape, on_disk(item.dtype))
                file.create_virtual_dataset(name, layout)
        guarded.check()
    sync(path)


def write(path: Path, parts: Sequence[Part], at: Callable[[str], None], verify: str = "cache") -> list[str]:
    """Write each part into its dataset of a file that is laid out, and read it back; returns the parts' digests.

    Other processes may write other parts at the same time. at: is told each phase. verify: as of ``Storage``. On return
    the numbers are on the disk. Raises OSError naming the file.
    """
    with reader.OpenFile(path) as file:
        offsets = [file.extent(item.path)[0] for item, _, _ in parts]
    with _named(path), open(path, "r+b", buffering=0) as target:
        digests = []
        for (item, slab, region), offset in zip(parts, offsets, strict=True):
            running = digest.running()
            for block, host in blocks(item, slab, region):
                running.update(host)
                _place(target.fileno(), offset, item, block, host)
            digests.append(running.hexdigest())
            at("write")
        settle(path, target.fileno(), parts, digests, at, verify)
    return digests


def settle(
    path: Path, descriptor: int, parts: Sequence[Part], digests: Sequence[str], at: Callable[[str], None], verify: str
) -> None:
    """Force a file to the disk. OSError unless the parts then read back as their digests say (``verify``).

    descriptor: of the file, opened before anything was written to it: of a write that failed behind the scenes, the
    system tells only those who had the file open then.
    """
    at("fsync")
    synced = Task(partial(os.fsync, descriptor))  # the disk works while what the system has in memory is read
    try:
        if verify == "disk":
            synced.finish()
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        at("digest")
        if verify != "no":
            with reader.OpenFile(path) as file:
                for (item, slab, region), expected in zip(parts, digests, strict=True):
                    if file.digest(item.path, item.shape, item.dtype, item.origin, region) != expected:
                        raise OSError(f"{path}: {slab.name} does not read back as it was written")
    finally:
        synced.finish()
    synced.result()


def blocks(item: Dataset, slab: Slab, region: Region) -> Iterator[tuple[Region, Any]]:
    """(block, its numbers as they are on disk) for the blocks of a part."""
    dtype = on_disk(item.dtype)
    for block in region.blocks(dtype.itemsize):
        yield block, np.asarray(to_host(slab.data[block.relative(region.start)]), dtype, order="C")


def _place(descriptor: int, offset: int, item: Dataset, block: Region, host: Any) -> None:
    """Write a block's numbers to where they belong in the dataset that begins at ``offset``: run by run."""
    starts, length = runs(item.shape, block.moved(item.origin))
    view, run = memoryview(host.reshape(-1).view(np.uint8)), length * host.dtype.itemsize
    for i, start in enumerate(starts):
        left, at = view[i * run : (i + 1) * run], offset + int(start) * host.dtype.itemsize
        while left:
            written = os.pwrite(descriptor, left, at)
            left, at = left[written:], at + written
    if len(starts) == 1:  # else others write in between, and the disk would get it more than once
        # The disk begins at once, not when fsync asks it to. What is on its way there is not forgotten by this advice.
        os.posix_fadvise(descriptor, at - len(view), len(view), os.POSIX_FADV_DONTNEED)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The errors of the system on an open file, and those of a GPU, do not say which file they were for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except (RuntimeError, MemoryError) as error:
        raise OSError(f"{path}: {reason(error)}") from error


def sync(path: Path) -> None:
    """Force a file, or a directory with the names in it, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no directories
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
