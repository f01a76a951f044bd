"""Every call of a communicator over arrays of any library, held against MpiCommunicator on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from hpcmp import partition
from hpcmp.arrays import Array, to_host
from hpcmp.comm.base import Communicator, Pending

Put = Callable[[np.ndarray], Array]  # a host array as an array of the library under test
Case = Callable[[Communicator, Put], list[Pending]]


def draw(c: Communicator, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    """A rank's array: whole numbers, so that a sum is exact in every order."""
    return np.random.default_rng((c.rank, *shape)).integers(-64, 64, shape).astype(dtype)


def cases() -> Iterator[tuple[str, Case]]:
    """Each call on shapes that divide evenly, unevenly and not at all, and on axes that are first and that are not."""
    for dtype in (np.float32, np.float64, np.int32, np.int64, np.uint8):
        yield f"all_reduce {np.dtype(dtype)}", partial(_all_reduce, shape=(4, 3), dtype=dtype)
    for shape in ((), (3,), (2, 0, 5)):
        yield f"all_reduce {shape}", partial(_all_reduce, shape=shape, op="max")
        yield f"broadcast {shape}", partial(_broadcast, shape=shape)
    yield "all_reduce of a view", partial(_all_reduce, shape=(3, 5), view=True)
    yield "all_reduce into out", partial(_all_reduce, shape=(3, 5), out="new")
    yield "all_reduce in place", partial(_all_reduce, shape=(3, 5), out="x")
    yield "all_reduce of a view in place", partial(_all_reduce, shape=(3, 5), out="x", view=True)
    yield "broadcast of a view", partial(_broadcast, shape=(3, 5), view=True)
    for total in (None, 13, 1, 0):
        for axis in (0, 1, -1):
            for dtype in (np.float32, np.float64):
                how: dict[str, Any] = {"total": total, "axis": axis, "dtype": dtype}
                yield f"all_gather {how}", partial(_all_gather, **how)
                yield f"reduce_scatter {how}", partial(_reduce_scatter, **how)
    for axes in ((0, 1), (1, 0), (2, 0), (0, 2)):
        for sizes in ((6, None), (13, 7), (1, 1), (0, 2), (5, 0)):
            yield f"all_to_all {sizes} along {axes}", partial(_all_to_all, axes=axes, sizes=sizes)
    for rows in ("uneven", "none", "last", "even"):
        for dtype in (np.float32, np.float64):
            for name, case in (("all_gather_v", _gather_v), ("reduce_scatter_v", _scatter_v), ("all_to_all_v", _all_v)):
                yield f"{name} {rows} {np.dtype(dtype)}", partial(case, how=rows, dtype=dtype)
    yield "a chain of stages", _chain
    yield "a ring", _ring


def _all_reduce(
    c: Communicator,
    put: Put,
    *,
    shape: tuple[int, ...],
    dtype: Any = np.float64,
    op: Any = "sum",
    out: str = "",
    view: bool = False,
) -> list[Pending]:
    x = put(draw(c, *shape, dtype=dtype))
    x = x.T if view else x
    target = {"": None, "new": put(np.zeros(shape)), "x": x}[out]
    reduced = c.all_reduce(x, op, target)
    return [reduced] if target is None else [reduced, Pending(target)]  # the second: what it has become


def _broadcast(c: Communicator, put: Put, *, shape: tuple[int, ...], view: bool = False) -> list[Pending]:
    x = put(draw(c, *shape))
    return [c.broadcast(x.T if view else x, c.size - 1)]


def _all_gather(c: Communicator, put: Put, *, total: int | None, axis: int, dtype: Any) -> list[Pending]:
    shape = [3, 2, 4]
    shape[axis] = shape[axis] if total is None else partition.sizes(total, c.size)[c.rank]
    return [c.all_gather(put(draw(c, *shape, dtype=dtype)), axis, total)]


def _reduce_scatter(c: Communicator, put: Put, *, total: int | None, axis: int, dtype: Any) -> list[Pending]:
    shape = [3, 2, 4]
    shape[axis] = 2 * c.size if total is None else total
    return [c.reduce_scatter(put(draw(c, *shape, dtype=dtype)), axis)]


def _all_to_all(c: Communicator, put: Put, *, axes: tuple[int, int], sizes: tuple[int, int | None]) -> list[Pending]:
    (split, concat), (whole, total) = axes, sizes
    shape = [2, 3, 2]
    shape[split] = whole
    shape[concat] = 3 if total is None else partition.sizes(total, c.size)[c.rank]
    return [c.all_to_all(put(draw(c, *shape, dtype=np.int32)), split, concat, total)]


def rows_of(how: str, size: int) -> list[int]:
    """Rows of every rank: of no rule, with none in between, for the last rank alone, or for nobody."""
    rows = {"uneven": [(5 * r) % 4 for r in range(size)], "none": [0] * size, "even": [3] * size}
    return rows.get(how, [0] * (size - 1) + [4])


def _gather_v(c: Communicator, put: Put, *, how: str, dtype: Any) -> list[Pending]:
    rows = rows_of(how, c.size)
    return [c.all_gather_v(put(draw(c, rows[c.rank], 2, 3, dtype=dtype)), rows)]


def _scatter_v(c: Communicator, put: Put, *, how: str, dtype: Any) -> list[Pending]:
    rows = rows_of(how, c.size)
    return [c.reduce_scatter_v(put(draw(c, sum(rows), 2, dtype=dtype)), rows)]


def _all_v(c: Communicator, put: Put, *, how: str, dtype: Any) -> list[Pending]:
    """Rank r sends rank q its rows by (r + 2 q): other numbers there and back."""
    rows = rows_of(how, 2 * c.size)
    table = [[rows[(r + 2 * q) % (2 * c.size)] for q in range(c.size)] for r in range(c.size)]
    sent, received = table[c.rank], [line[c.rank] for line in table]
    return [c.all_to_all_v(put(draw(c, sum(sent), 3, dtype=dtype)), sent, received)]


def _chain(c: Communicator, put: Put) -> list[Pending]:
    """Up and down a chain, several messages under way at once, some without elements."""
    like, sizes, found = put(np.zeros(0)), (3, 5, 0, 7), []
    for i, n in enumerate(sizes):
        if c.rank > 0:
            found.append(c.recv((n, 2), np.float64, c.rank - 1, 2 * i, like=like))
        if c.rank < c.size - 1:
            found.append(c.send(put(draw(c, n, 2) + i), c.rank + 1, 2 * i))
    for i, n in enumerate(sizes):
        if c.rank > 0:
            found.append(c.send(put(draw(c, 2, n)).T, c.rank - 1, 2 * i + 1))
        if c.rank < c.size - 1:
            found.append(c.recv((n, 2), np.float64, c.rank + 1, 2 * i + 1, like=like))
    return found


def _ring(c: Communicator, put: Put) -> list[Pending]:
    """Every rank sends to the next one before it receives from the one before."""
    if c.size == 1:
        return []
    sent = c.send(put(draw(c, 4)), (c.rank + 1) % c.size)
    return [sent, c.recv((4,), np.float64, (c.rank - 1) % c.size, like=put(np.zeros(0)))]


def differences(comm: Communicator, control: Communicator, xp: ModuleType) -> list[str]:
    """What differs between ``comm``, on arrays of ``xp``, and ``control``, on the host, on this rank."""
    found = []
    for name, case in cases():
        kept: list[tuple[Array, np.ndarray]] = []

        def put(x: np.ndarray, kept: list[tuple[Array, np.ndarray]] = kept) -> Array:
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


def assert_a_waiting_rank_holds_up_no_sum(comm: Communicator) -> None:
    """Rank 0 sends only when the sum is there, which needs the others, who wait for what it sends."""
    pending = comm.all_reduce(np.full(1000, float(comm.rank)))
    if comm.rank == 0:
        assert (pending.wait() == sum(range(comm.size))).all()
        for send in [comm.send(np.ones(3), peer) for peer in range(1, comm.size)]:
            send.wait()
    else:
        assert (comm.recv((3,), np.float64, 0, like=np.empty(0)).wait() == 1).all()
        assert (pending.wait() == sum(range(comm.size))).all()
