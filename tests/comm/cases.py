"""Every call of a communicator over arrays of any library, held against MpiCommunicator on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from hpcmp import partition
from hpcmp.arrays import Array, to_host
from hpcmp.comm.base import Communicator, Pending

Case = Callable[[Communicator, Any], list[Pending]]  # (communicator, host array -> its array) -> what it started


def draw(rank: int, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    """A rank's array: whole numbers, so that a sum is exact in every order."""
    return np.random.default_rng((rank, *shape)).integers(-64, 64, shape).astype(dtype)


def cases() -> Iterator[tuple[str, Case]]:
    """Each call on shapes that divide evenly, unevenly and not at all, on axes that are first and not."""

    def case(name: str, call: Callable[[Communicator, Any], Pending | list[Pending]]) -> tuple[str, Case]:
        def started(comm: Communicator, put: Any) -> list[Pending]:
            found = call(comm, put)
            return found if isinstance(found, list) else [found]

        return name, started

    for dtype in (np.float32, np.float64, np.int32, np.int64, np.uint8):
        yield case(f"all_reduce {np.dtype(dtype)}", lambda c, put, t=dtype: c.all_reduce(put(draw(c.rank, 4, 3, dtype=t))))
    for shape in ((), (3,), (2, 0, 5)):
        yield case(f"all_reduce {shape}", lambda c, put, s=shape: c.all_reduce(put(draw(c.rank, *s)), "max"))
        yield case(f"broadcast {shape}", lambda c, put, s=shape: c.broadcast(put(draw(c.rank, *s)), c.size - 1))
    yield case("all_reduce of a view", lambda c, put: c.all_reduce(put(draw(c.rank, 3, 5)).T))
    yield case("broadcast of a view", lambda c, put: c.broadcast(put(draw(c.rank, 3, 5)).T))
    yield case("all_reduce into out", lambda c, put: c.all_reduce(put(draw(c.rank, 6)), out=put(np.zeros(6))))
    yield case("all_reduce in place", lambda c, put: (lambda x: c.all_reduce(x, out=x))(put(draw(c.rank, 6))))
    yield case("all_reduce of a view in place", lambda c, put: (lambda x: c.all_reduce(x, out=x))(put(draw(c.rank, 3, 5)).T))
    for total in (None, 13, 1, 0):
        for axis in (0, 1, -1):

            def gather(c: Communicator, put: Any, total: Any = total, axis: int = axis) -> Pending:
                shape = [3, 2, 4]
                shape[axis] = shape[axis] if total is None else partition.sizes(total, c.size)[c.rank]
                return c.all_gather(put(draw(c.rank, *shape)), axis, total)

            def scatter(c: Communicator, put: Any, total: Any = total, axis: int = axis) -> Pending:
                shape = [3, 2, 4]
                shape[axis] = 2 * c.size if total is None else total
                return c.reduce_scatter(put(draw(c.rank, *shape)), axis)

            yield case(f"all_gather {total} axis {axis}", gather)
            yield case(f"reduce_scatter {total} axis {axis}", scatter)
    for split, concat in ((0, 1), (1, 0), (2, 0), (0, 2)):
        for whole, total in ((6, None), (13, 7), (1, 1), (0, 2), (5, 0)):

            def exchange(
                c: Communicator, put: Any, split: int = split, concat: int = concat, whole: int = whole, total: Any = total
            ) -> Pending:
                shape = [2, 3, 2]
                shape[split] = whole
                shape[concat] = 3 if total is None else partition.sizes(total, c.size)[c.rank]
                return c.all_to_all(put(draw(c.rank, *shape)), split, concat, total)

            yield case(f"all_to_all {whole} of axis {split} to {total} of axis {concat}", exchange)
    yield case("a chain of stages", _chain)
    yield case("a ring", _ring)


def _chain(c: Communicator, put: Any) -> list[Pending]:
    """Up and down a chain, several messages under way at once, some without elements."""
    like, sizes, found = put(np.zeros(0)), (3, 5, 0, 7), []
    for i, n in enumerate(sizes):
        if c.rank > 0:
            found.append(c.recv((n, 2), np.float64, c.rank - 1, 2 * i, like=like))
        if c.rank < c.size - 1:
            found.append(c.send(put(draw(c.rank, n, 2) + i), c.rank + 1, 2 * i))
    for i, n in enumerate(sizes):
        if c.rank > 0:
            found.append(c.send(put(draw(c.rank, 2, n)).T, c.rank - 1, 2 * i + 1))
        if c.rank < c.size - 1:
            found.append(c.recv((n, 2), np.float64, c.rank + 1, 2 * i + 1, like=like))
    return found


def _ring(c: Communicator, put: Any) -> list[Pending]:
    """Every rank sends to the next one before it receives from the one before."""
    if c.size == 1:
        return []
    sent = c.send(put(draw(c.rank, 4)), (c.rank + 1) % c.size)
    return [sent, c.recv((4,), np.float64, (c.rank - 1) % c.size, like=put(np.zeros(0)))]


def differences(comm: Communicator, control: Communicator, xp: ModuleType) -> list[str]:
    """What differs between ``comm``, on arrays of ``xp``, and ``control``, on the host, on this rank."""
    found = []
    for name, case in cases():
        kept: list[tuple[Array, np.ndarray]] = []

        def put(x: np.ndarray, kept: list[Any] = kept) -> Array:
            made = xp.asarray(x)
            kept.append((made, x.copy()))
            return made

        ys = [to_host(pending.wait()) for pending in case(comm, put)]
        expected = [pending.wait() for pending in case(control, lambda x: x)]
        for y, z in zip(ys, expected, strict=True):
            if (y.shape, y.dtype) != (z.shape, z.dtype) or not np.array_equal(y, z):
                found.append(f"{name}: {y.dtype} {y.tolist()}, not {z.dtype} {z.tolist()}")
        if "in place" not in name and "into" not in name:
            found += [f"{name}: changed its input" for made, x in kept if not np.array_equal(to_host(made), x)]
    return found
