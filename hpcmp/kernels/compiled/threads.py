"""Rows shared over threads: loops that let go of Python's lock, in a pool of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ... import partition, process

_WORTH = 1 << 16  # numbers a thread should have: waking it takes about as long as 20 thousand


@functools.cache
def count() -> int:
    """How many threads a kernel may use; see ``process.threads``."""
    return process.threads()


def share(rows: int, numbers: int, work: Callable[[int, int], None]) -> None:
    """``work(a, b)`` on ranges that make up ``rows``, each on a thread; in this one alone if ``numbers`` are few.

    What a range's end is depends on the number of threads: no sum may run over more than one row.
    """
    threads = min(count(), rows, 1 + numbers // _WORTH)
    if threads <= 1:
        work(0, rows)
        return
    first, *others = partition.split(rows, threads)
    pending = [_pool().submit(work, part.start, part.stop) for part in others]
    work(first.start, first.stop)
    for each in pending:
        each.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, count() - 1), "hpcmp-kernel")
