"""Context parallelism: attention over a ring, over exchanged heads, and over both, is attention of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import dtype_of
from hpcmp.comm.base import Pending, Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.cursor import Place
from hpcmp.layers.attention import CausalAttention, Rope, attention_core
from hpcmp.layers.context import BLOCK, HeadExchange, HeadsToPositions, PositionsToHeads, Ring
from hpcmp.layers.dropout import attention_mask
from hpcmp.layers.heads import Heads
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module
from hpcmp.testing import assert_adjoint, equals_serial

from .common import BATCH, draw, place
from .test_attention import D, attention

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LENGTHS = (13, 5, 2, 0)


def axes(size: int) -> list[dict[str, int]]:
    """Every cp = ring x ulysses with tp, of so many ranks; cp of 1 only on one."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return [
        {"cp": cp, "ulysses": ulysses, "tp": size // cp}
        for cp in divisors[min(1, size - 1) :]
        for ulysses in divisors
        if cp % ulysses == 0
    ]


@contextmanager
def spread(world: Intracomm, length: int, **sizes: int) -> Iterator[tuple[Mesh, ModelParallel]]:
    """A mesh, and what layers are built with; sequence parallel where there is tp."""
    with Mesh(world, **sizes) as mesh:
        cursor = place(length).cursor
        groups = {axis: mesh[axis] for axis in ("ring", "ulysses")}
        yield mesh, ModelParallel(mesh["tp"], cursor, sequence=sizes["tp"] > 1, **groups)


# --- the ring: who needs what ------------------------------------------------------------------------------------


class Peer(Solo):
    """A rank of a group, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 13, 56])
def test_every_query_meets_every_key_up_to_it_once(size: int, length: int) -> None:
    seen = np.zeros((length, length), int)
    for rank, peer in itertools.product(range(size), repeat=2):
        ring = Ring(Peer(rank, size), lambda: length)
        queries, keys, causal = ring.pair(peer)
        here, there = ring.positions(rank)[queries], ring.positions(peer)[keys]
        allowed = np.tri(len(here), len(there), dtype=int) if causal else np.ones((len(here), len(there)), int)
        np.add.at(seen, np.ix_(here, there), allowed)
    np.testing.assert_array_equal(seen, np.tri(length, dtype=int))


def test_every_rank_computes_as_much_in_every_step() -> None:
    size, piece = 4, 3
    for rank, peer in itertools.product(range(size), repeat=2):
        ring = Ring(Peer(rank, size), lambda: 2 * size * piece)
        queries, keys, causal = ring.pair(peer)
        pairs = len(ring.positions(rank)[queries]) * len(ring.positions(peer)[keys])
        assert (causal, pairs) == ((True, 4 * piece**2) if peer == rank else (False, 2 * piece**2))


@pytest.mark.mpi(min_size=2)
def test_work_is_what_the_pairs_say(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores computed on every rank, forward and backward: (1 + 1/R) / 2R of the square each, no more."""
    done = []

    def counted(right: Callable[..., Any], q: int) -> Callable[..., Any]:
        return lambda *args: (done.append(args[q].shape[0] * args[q + 1].shape[0]), right(*args))[1]

    for name, q in (("attention", 0), ("attention_backward", 1)):
        monkeypatch.setattr(kernels.CPU, name, counted(getattr(kernels.CPU, name), q))
    size = world.size
    length = 6 * size
    with spread(world, length, cp=size, tp=1) as (_, p):
        core = CausalAttention(Heads(2, 1), p)
        o, saved = core.forward((draw(6, BATCH, 2, D), draw(6, BATCH, 1, 2, D)))
        core.backward(o, saved, wgrad.now)
    assert done == 2 * [36, *[18] * (size - 1)]
    assert sum(done) == length**2 * (1 + 1 / size) / size
    assert world.allgather(done) == [done] * size


# --- the ring: what travels --------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_come_by_in_turn_and_sums_come_home(world: Intracomm, length: int) -> None:
    with Mesh(world, cp=world.size) as mesh:
        ring = Ring(mesh["ring"], lambda: length)
        size, rank = world.size, world.rank
        mine = ring.positions(rank)[:, None].astype(float)
        carried, order = None, []
        for peer, block in ring.blocks(mine):
            order.append(peer)
            np.testing.assert_array_equal(block[:, 0], ring.positions(peer))
            if peer != rank:
                total = np.zeros_like(block) if carried is None else carried.wait()
                carried = ring.hop(total + 10.0**rank, peer, BLOCK + 1)
        assert order == [(rank - step) % size for step in range(size)]
        if carried is not None:
            home = carried.wait()
            np.testing.assert_array_equal(home, np.full_like(mine, sum(10.0**r for r in range(size) if r != rank)))


def test_the_next_block_is_on_its_way_under_the_work_on_this_one() -> None:
    class Told(Peer):
        """A rank of three, whose messages take note of when they start and end."""

        def send(self, x: Any, peer: int, tag: int = 0) -> Pending:
            return Pending(x, (), self.note("send", peer))

        def recv(self, shape: Any, dtype: Any, peer: int, tag: int = 0, *, like: Any) -> Pending:
            return Pending(np.ones(shape), (), self.note("receive", peer))

        def note(self, what: str, peer: int) -> Callable[[Any], Any]:
            told.append(f"{what} {peer}")
            return lambda y: (told.append(f"{what} {peer} done"), y)[1]

    told: list[str] = []
    for peer, _ in Ring(Told(1, 3), lambda: 12).blocks(np.ones((4, 1))):
        told.append(f"work on {peer}")
    started, ended = ["send 2", "receive 0"], ["send 2 done", "receive 0 done"]
    assert told == [*started, "work on 1", *ended, *started, "work on 0", *ended, "work on 2"]


# --- heads for positions -----------------------------------------------------------------------------------------


def ranges(heads: int, kv: int, size: int) -> tuple[list[slice], list[slice]]:
    """As ``attention_core`` has them, for all heads."""
    whole = Heads(heads, kv)
    queries, key_values = zip(*map(whole.local, whole.shares(size)), strict=True)
    return list(queries), list(key_values)


HEADS = [(6, 3), (6, 1), (5, 5), (2, 1), (12, 4)]


@pytest.mark.mpi
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_exchange(world: Intracomm, heads: int, kv: int, length: int) -> None:
    """There, back, and that each is the adjoint of the other."""
    with Mesh(world, cp=world.size, ulysses=world.size) as mesh:
        comm = mesh["ulysses"]
        here = comm.part(length)
        for n, parts in zip((heads, kv), ranges(heads, kv, comm.size), strict=True):
            x = draw(length, BATCH, n, 2, 3)
            there = PositionsToHeads(comm, parts, lambda: length)
            assert isinstance(there.T, HeadsToPositions) and isinstance(there.T.T, PositionsToHeads)
            mine = there(x[here])
            np.testing.assert_array_equal(mine, x[:, :, parts[comm.rank]])
            copies = sum((np.arange(n) >= r.start) & (np.arange(n) < r.stop) for r in parts)
            np.testing.assert_allclose(there.T(mine), x[here] * copies[:, None, None], rtol=1e-14)
            assert_adjoint(there, x[here].shape)
            assert_adjoint(there.T, mine.shape)


def test_shares_of_heads_tile_them_and_know_what_they_read() -> None:
    for (heads, kv), ranks, again in itertools.product(HEADS, range(1, 5), range(1, 5)):
        for rank in range(ranks):
            mine = Heads(heads, kv, ranks, rank)
            shares = mine.shares(again)
            held = [q for s in shares for q in range(s.queries.start, s.queries.stop)]
            assert held == list(range(mine.queries.start, mine.queries.stop))
            for share in shares:
                queries, key_values = mine.local(share)
                assert list(range(heads))[mine.queries][queries] == list(range(heads))[share.queries]
                assert list(range(kv))[mine.key_values][key_values] == list(range(kv))[share.key_values]


# --- whole layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    heads: int
    kv: int
    dropout: float = 0.0
    rope: bool = False

    def build(self, p: ModelParallel) -> Module:
        return attention(p, self.heads, self.kv, dropout=self.dropout, rope=self.rope)


CASES = [Case(6, 3, 0.3, True), Case(5, 1, 0.3), Case(2, 1, rope=True), Case(12, 4, 0.3)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("length", LENGTHS[:3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.heads} heads of {c.kv}")
def test_layouts(world: Intracomm, case: Case, length: int) -> None:
    """Output, gradient of the input and of every parameter, for every ring x ulysses x tp of the ranks."""
    for sizes in axes(world.size):
        with spread(world, length, **sizes) as (mesh, p):
            equals_serial(case.build, p, draw(length, BATCH, 6), mesh=mesh)


@pytest.mark.mpi
def test_the_core_that_a_layout_takes(world: Intracomm) -> None:
    with spread(world, 8, cp=world.size, ulysses=world.size, tp=1) as (_, p):
        assert type(attention_core(Heads(4, 2), p)) is (CausalAttention if world.size == 1 else HeadExchange)
    with spread(world, 8, cp=world.size, tp=1) as (_, p):
        assert type(attention_core(Heads(4, 2), p)) is CausalAttention


@pytest.mark.mpi(min_size=2)
def test_the_same_bits_in_every_run(world: Intracomm) -> None:
    for sizes in axes(world.size):
        with spread(world, 13, **sizes) as (_, p):
            mine, s = Heads(6, 3, p.tp.size, p.tp.rank), len(p.context())
            core = attention_core(mine, p, 0.2)
            x = draw(s, BATCH, 6, D)[:, :, mine.queries], draw(s, BATCH, 3, 2, D)[:, :, mine.key_values]
            runs = []
            for _ in range(2):
                o, saved = core.forward(x)
                runs.append((o, *core.backward(np.cos(o), saved, wgrad.now)))
            for a, b in zip(*runs, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("name", "epsilon"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_in_single_precision_and_16_bits(world: Intracomm, name: str, epsilon: float) -> None:
    """Blocks merge in single precision: the ring adds a rounding of each block's part and no more."""
    whole = tuple(x.astype(dtype_of(name)) for x in (draw(13, BATCH, 6, D), draw(13, BATCH, 3, 2, D)))

    def run(p: ModelParallel, x: Any) -> list[Any]:
        core = attention_core(Heads(6, 3), p)
        o, saved = core.forward(x)
        return [o, *core.backward(x[0], saved, wgrad.now)]

    exact = run(place(13), tuple(x.astype(np.float64) for x in whole))
    for sizes in axes(world.size):
        if sizes["tp"] == 1:
            with spread(world, 13, **sizes) as (_, p):
                here = p.context()
                for a, b in zip(run(p, tuple(x[here] for x in whole)), exact, strict=True):
                    assert a.dtype == dtype_of(name)
                    error = np.abs(a.astype(np.float64) - b[here]).max(initial=0)
                    assert error <= world.size * epsilon * np.abs(b).max()


@pytest.mark.mpi(min_size=2)
def test_a_ring_keeps_its_own_block_alone(world: Intracomm) -> None:
    with spread(world, 13, cp=world.size, tp=1) as (_, p):
        s = len(p.context())
        _, (q, kv, o, lse, _) = CausalAttention(Heads(2, 2), p, 0.3).forward(
            (draw(s, BATCH, 2, D), draw(s, BATCH, 2, 2, D))
        )
        assert q.size + kv.size + o.size + lse.size == s * BATCH * 2 * (4 * D + 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("grouped", [False, True])
def test_bytes_that_a_rank_sends(world: Intracomm, grouped: bool) -> None:
    """The formulas of docs/context-parallelism.md, with as many key-value heads as ranks, and with one."""
    size, n = world.size, 2 * world.size
    k = 1 if grouped else size
    for sizes in axes(size):
        if sizes["tp"] > 1 or (grouped and sizes["ulysses"] < size):
            continue
        with spread(world, 6 * size, **sizes) as (mesh, p):
            ring, ulysses = mesh["ring"], mesh["ulysses"]
            q, kv = draw(6, BATCH, n, D), draw(6, BATCH, k, 2, D)
            core = attention_core(Heads(n, k), p)
            o, saved = core.forward((q, kv))
            forward = np.array([ring.traffic.sent, ulysses.traffic.sent])
            core.backward(o, saved, wgrad.now)
            backward = np.array([ring.traffic.sent, ulysses.traffic.sent]) - forward
            block, others = 6 * ulysses.size * BATCH * k // ulysses.size * 2 * D * 8, ulysses.size - 1
            exchanged = 2 * q.nbytes * others // ulysses.size + kv.nbytes * others // (1 if grouped else ulysses.size)
            hops = 0 if grouped else (ring.size - 1) * block
            assert [*forward, *backward] == [hops, exchanged, 2 * hops, exchanged]


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_masks_of_blocks_are_blocks_of_the_mask(size: int) -> None:
    cursor, length, like = place(7).cursor, 7, draw(7, BATCH)
    where = Place(3, np.array([7, 4]), length)

    def mask(queries: Any, keys: Any) -> Any:
        found = attention_mask(0.4, "core", cursor, where, queries, keys, slice(1, 3), like)
        return None if found is None else found.keep()

    whole = mask(np.arange(length), np.arange(length))
    for rank, peer in itertools.product(range(size), repeat=2):
        ring = Ring(Peer(rank, size), lambda: length)
        queries, keys, _ = ring.pair(peer)
        here, there = ring.positions(rank)[queries], ring.positions(peer)[keys]
        np.testing.assert_array_equal(mask(here, there), whole[:, :, here][..., there])
    assert mask(np.arange(0), np.arange(3)) is mask(np.arange(3), np.arange(0)) is None
    assert attention_mask(0.4, "", cursor, replace(where, training=False), *[np.arange(3)] * 2, slice(1), like) is None


@pytest.mark.mpi(min_size=2)
def test_rope_turns_by_the_positions_that_are_here(world: Intracomm) -> None:
    for sizes in axes(world.size):
        with spread(world, 13, **sizes) as (_, p):
            q, kv, here = draw(13, BATCH, 3, 6), draw(13, BATCH, 2, 2, 6), p.context()
            found, _ = Rope(p, 6, 100.0).forward((q[here], kv[here]))
            expected, _ = Rope(place(13), 6, 100.0).forward((q, kv))
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b[here], rtol=1e-13, atol=1e-14)
