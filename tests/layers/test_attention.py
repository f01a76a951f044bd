"""Attention: which heads a rank computes, rotary positions, and the layer in every layout."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hpcmp import partition, random, wgrad
from hpcmp.arrays import Array
from hpcmp.layers.attention import CausalAttention, Rope, attention_core
from hpcmp.layers.heads import Heads
from hpcmp.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from hpcmp.layers.norm import RMSNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Recompute, Residual, Sequential, normal

from .common import BATCH, Case, Copied, draw, place

D = 4
COMBINATIONS = [
    (heads, kv, ranks)
    for heads in range(1, 13)
    for kv in range(1, heads + 1)
    if heads % kv == 0
    for ranks in range(1, 13)
]


# --- heads -------------------------------------------------------------------------------------------------------


def every_rank(heads: int, kv: int, ranks: int) -> list[Heads]:
    return [Heads(heads, kv, ranks, rank) for rank in range(ranks)]


def test_heads_tile_and_are_owned_exactly_once() -> None:
    for heads, kv, ranks in COMBINATIONS:
        group = every_rank(heads, kv, ranks)
        assert [h.queries for h in group] == partition.split(heads, ranks)
        owned = np.zeros(kv, int)
        for h in group:
            owned[h.owned] += 1
            if h.owned.stop > h.owned.start:
                assert h.key_values.start <= h.owned.start and h.owned.stop <= h.key_values.stop
        assert (owned == 1).all(), (heads, kv, ranks)


def test_a_rank_holds_the_key_value_heads_that_its_queries_read_and_no_other() -> None:
    for heads, kv, ranks in COMBINATIONS:
        for h in every_rank(heads, kv, ranks):
            read = sorted({query // (heads // kv) for query in range(h.queries.start, h.queries.stop)})
            assert list(range(kv))[h.key_values] == read


def test_overlaps_tells_whether_two_ranks_hold_one_head() -> None:
    for heads, kv, ranks in COMBINATIONS:
        group = every_rank(heads, kv, ranks)
        held = [k for h in group for k in range(h.key_values.start, h.key_values.stop)]
        assert {h.overlaps for h in group} == {len(held) > len(set(held))}


def test_blocks_pair_every_query_head_with_the_one_it_reads() -> None:
    for heads, kv, ranks in COMBINATIONS:
        for h in every_rank(heads, kv, ranks):
            pairs = []
            blocks = h.blocks()
            assert len(blocks) <= 3
            for qs, ks in blocks:
                group, rest = divmod(qs.stop - qs.start, ks.stop - ks.start)
                assert rest == 0 and group > 0
                pairs += [
                    (h.queries.start + query, h.key_values.start + ks.start + (query - qs.start) // group)
                    for query in range(qs.start, qs.stop)
                ]
            assert pairs == [(query, query // (heads // kv)) for query in range(h.queries.start, h.queries.stop)]


# --- the layer in every layout -----------------------------------------------------------------------------------


def attention(p: ModelParallel, heads: int, kv: int, *, dropout: float = 0.0, rope: bool = False) -> Module:
    """As a model has it: norm, queries, keys and values, attention over this rank's heads, and back."""
    h = Heads(heads, kv, p.tp.size, p.tp.rank)
    outputs = {
        "query": Output((heads, D), part=h.queries),
        "key_value": Output((kv, 2, D), part=h.key_values, owned=h.owned, overlaps=h.overlaps),
    }
    layers: dict[str, Module] = {
        "norm": RMSNorm(p, 6),
        "qkv": ColumnParallelLinear(p, 6, outputs, bias=True, initial=normal(0.5)),
        "core": attention_core(h, p, dropout, "core"),
        "out": RowParallelLinear(p, (heads, D), 6, bias=True, initial=normal(0.3)),
    }
    if rope:
        layers = {
            k: v for name in ("norm", "qkv", "rope", "core", "out") for k, v in [(name, layers.get(name, Rope(p, D)))]
        }
    return Residual(**layers)


CASES = {
    "6 heads of 3": Case(lambda p: attention(p, 6, 3)),
    "6 heads of 3, rotary, dropout": Case(lambda p: attention(p, 6, 3, rope=True, dropout=0.3)),
    "5 heads of 1, rotary": Case(lambda p: attention(p, 5, 1, rope=True)),
    "5 heads, dropout": Case(lambda p: attention(p, 5, 5, dropout=0.3)),
    "12 heads of 4": Case(lambda p: attention(p, 12, 4)),
    "2 heads of 1, dropout, recomputed": Case(lambda p: Recompute(attention(p, 2, 1, dropout=0.3))),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    CASES[name].check_serial()
    CASES[name].check_dtype()
    CASES[name].check_weight_gradients()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)


@pytest.mark.mpi
def test_gradients_on_ranks(parallel: ModelParallel) -> None:
    CASES["6 heads of 3, rotary, dropout"].check_gradients(parallel)


# --- the core alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv", "ranks", "rank"), [(6, 3, 1, 0), (6, 3, 4, 1), (5, 1, 3, 2), (12, 4, 5, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_core_gradients_of_any_rank(heads: int, kv: int, ranks: int, rank: int, dropout: float) -> None:
    """Without a communicator: the core of one rank, whose blocks differ in their group sizes."""
    h = Heads(heads, kv, ranks, rank)
    queries, groups = h.queries.stop - h.queries.start, h.key_values.stop - h.key_values.start
    Case(
        lambda p: CausalAttention(h, p, dropout, "core"),
        x=lambda s: (draw(s, BATCH, queries, D), draw(s, BATCH, groups, 2, D)),
    ).check_serial()


def expected_attention(q: Array, kv: Array, group: int, mask: Array) -> Array:
    """Row by row, with ``mask`` (batch, heads, S, S) on the probabilities."""
    o = np.zeros_like(q)
    for t, i, head in np.ndindex(*q.shape[:3]):
        k, v = kv[: t + 1, i, head // group, 0], kv[: t + 1, i, head // group, 1]
        scores = k @ q[t, i, head] / math.sqrt(q.shape[-1])
        p = np.exp(scores) / np.exp(scores).sum() * mask[i, head, t, : t + 1]
        o[t, i, head] = p @ v
    return o


def test_core_is_softmax_attention() -> None:
    q, kv = draw(5, BATCH, 6, D), draw(5, BATCH, 3, 2, D)
    core = CausalAttention(Heads(6, 3), place(5))
    np.testing.assert_allclose(
        core.forward((q, kv))[0], expected_attention(q, kv, 2, np.ones((BATCH, 6, 5, 5))), rtol=1e-12, atol=1e-14
    )


def test_core_dropout_is_by_sample_head_query_and_key() -> None:
    """The element for query t and key c of head e of sample i follows word(key(seed, name, step), t, i, c, e)."""
    q, kv = draw(5, BATCH, 6, D), draw(5, BATCH, 3, 2, D)
    p = place(5)  # samples 7 and 4, step 3, seed 11
    mask = np.zeros((BATCH, 6, 5, 5))
    key = random.key(11, "core", 3)
    for (i, sample), head, t, c in itertools.product(enumerate((7, 4)), range(6), range(5), range(5)):
        word = random.bits(key, np.array(t), np.array(sample), slice(c, c + 1), head)[0]
        mask[i, head, t, c] = (word >= 0.3 * 2**32) / 0.7
    assert 0 < (mask == 0).mean() < 1
    core = CausalAttention(Heads(6, 3), p, 0.3, "core")
    np.testing.assert_allclose(core.forward((q, kv))[0], expected_attention(q, kv, 2, mask), rtol=1e-12, atol=1e-14)


def test_core_dropout_only_in_training() -> None:
    q, kv = draw(5, BATCH, 6, D), draw(5, BATCH, 3, 2, D)
    plain = CausalAttention(Heads(6, 3), place(5)).forward((q, kv))[0]
    evaluated = CausalAttention(Heads(6, 3), place(5, training=False), 0.3).forward((q, kv))[0]
    np.testing.assert_array_equal(evaluated, plain)


def test_backward_uses_the_mask_of_its_own_forward() -> None:
    """The pipeline moves the cursor to other microbatches between a forward and its backward."""
    q, kv, dy = draw(5, BATCH, 6, D), draw(5, BATCH, 3, 2, D), draw(5, BATCH, 6, D)
    p, other = place(5), place(5, step=4, samples=np.array([1, 2]))
    core = CausalAttention(Heads(6, 3), p, 0.3)
    expected = core.backward(dy, core.forward((q, kv))[1], wgrad.now)
    _, saved = core.forward((q, kv))
    p.cursor.place = other.cursor.place
    for a, b in zip(core.backward(dy, saved, wgrad.now), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_position_sees_a_later_one() -> None:
    module = Sequential(attention(place(7), 6, 3, rope=True))
    module.initialise(0, np.float64)
    x = draw(7, BATCH, 6)
    changed = x.copy()
    changed[4] += 1
    y, z = module.forward(x)[0], module.forward(changed)[0]
    np.testing.assert_array_equal(y[:4], z[:4])
    assert (y[4:] != z[4:]).any((1, 2)).all()


def test_core_keeps_nothing_of_the_size_of_its_scores() -> None:
    s = 64
    core = CausalAttention(Heads(2, 2), place(s), 0.3)
    _, (q, kv, o, lse, _) = core.forward((draw(s, BATCH, 2, D), draw(s, BATCH, 2, 2, D)))
    assert lse.size == s * BATCH * 2
    assert q.size + kv.size + o.size == s * BATCH * 2 * D * 4


# --- rotary positions --------------------------------------------------------------------------------------------


def test_rope_turns_pairs_by_their_position() -> None:
    q, kv = draw(5, BATCH, 3, 6), draw(5, BATCH, 2, 2, 6)
    (turned, turned_kv), _ = Rope(place(5), 6, 100.0).forward((q.copy(), kv.copy()))
    for x, y in ((q, turned), (kv[..., 0, :], turned_kv[..., 0, :])):
        for t, pair in itertools.product(range(5), range(3)):
            angle = t * 100.0 ** (-2 * pair / 6)
            z = (x[t, ..., pair] + 1j * x[t, ..., pair + 3]) * np.exp(1j * angle)
            np.testing.assert_allclose(y[t, ..., pair] + 1j * y[t, ..., pair + 3], z, rtol=1e-12)
    np.testing.assert_array_equal(turned_kv[..., 1, :], kv[..., 1, :])  # values pass


def test_rope_depends_on_distances_alone() -> None:
    q, k = np.tile(draw(1, 1, 1, 8), (9, 1, 1, 1)), np.tile(draw(8), (9, 1, 1, 2, 1))
    (q, kv), _ = Rope(place(9), 8).forward((q, k))
    scores = q[:, 0, 0] @ kv[:, 0, 0, 0].T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-11, atol=1e-12)


def test_rope_gradients() -> None:
    Case(
        lambda p: Sequential(Copied(), Rope(p, 6, 100.0), Copied()),
        x=lambda s: (draw(s, BATCH, 3, 6), draw(s, BATCH, 2, 2, 6)),
    ).check_serial()


def test_rope_turns_queries_and_keys_where_they_lie() -> None:
    rope = Rope(place(5), 6, 100.0)
    for turn in (lambda x: rope.forward(x)[0], lambda x: rope.backward(x, None, wgrad.now)):
        q, kv = draw(5, BATCH, 3, 6), draw(5, BATCH, 2, 2, 6)
        # as an exchange of heads leaves them
        by_head = [np.moveaxis(np.moveaxis(x, 2, 0).copy(), 0, 2) for x in (q, kv)]
        found = turn((q, kv))
        assert found[0] is q and np.shares_memory(found[1], kv)
        for a, b in zip(found, turn(tuple(by_head)), strict=True):
            np.testing.assert_array_equal(a, b)
