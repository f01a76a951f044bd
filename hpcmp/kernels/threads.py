"""Work shared over the threads of this process: calls that let go of Python's lock while they run, in one pool.

Everything on the CPU uses this pool, matrix products included, whose library computes with one thread in each call:
a library's own threads wait awake for their next product, on the cores that other kernels could use meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from .. import partition, process

_WORTH = 1 << 16  # numbers a thread should have: waking it takes about as long as 20 thousand

_asked: int | None = None


def count() -> int:
    """How many threads share a kernel's work: what ``use`` said, else what the environment says when it is first
    asked (``process.threads``)."""
    return _asked or _given()


def use(n: int) -> None:
    """Share work over ``n`` threads from now on."""
    global _asked
    _asked = n


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Make all ``calls``, each on a thread of its own, the first on this one."""
    pool = _pool(count()) if len(calls) > 1 else None
    pending = [pool.submit(call) for call in calls[1:]] if pool else []
    try:
        calls[0]()
    finally:  # nothing runs on when this has returned: the arrays are the caller's again
        for each in pending:
            each.exception()
    for each in pending:
        each.result()


def share(rows: int, numbers: int, work: Callable[[int, int], None]) -> None:
    """``work(a, b)`` on ranges that make up ``rows``, each on a thread; in this one alone if ``numbers`` are few.

    What a range's end is depends on the number of threads: no sum may run over more than one row.
    """
    threads = min(count(), rows, 1 + numbers // _WORTH)
    if threads <= 1:
        work(0, rows)
        return
    together([functools.partial(work, part.start, part.stop) for part in partition.split(rows, threads)])


@functools.cache
def _given() -> int:
    return process.threads()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), "hpcmp-kernel")
