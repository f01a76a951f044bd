"""Layers where documents are kept apart: each document is computed as if it were alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array, dtype_of
from hpcmp.documents import beginnings
from hpcmp.layers.attention import CausalAttention
from hpcmp.layers.context import Ring, documents
from hpcmp.layers.embedding import LearnedPositions
from hpcmp.layers.heads import Heads
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import normal
from hpcmp.testing import gradcheck

from .common import BATCH, draw, place
from .test_context import Peer, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

D = 4
ENDS = ((0, 3, 9), (5, 6))  # of documents, in each of two samples


def begins(length: int) -> Array:
    """(BATCH, length): documents of one token, of some, and an open one at the end; other ones in each sample."""
    tokens = np.zeros((length, BATCH), int)
    for i, ends in enumerate(ENDS):
        tokens[[end for end in ends if end < length], i] = 1
    return beginnings(tokens, 1)


def apart(length: int) -> ModelParallel:
    p = place(length)
    return place(length, documents=documents(p, begins(length), np))


def alone(length: int) -> list[tuple[int, slice]]:
    """(sample, positions) of each document."""
    cuts = [[0, *(end + 1 for end in ends if end + 1 < length), length] for ends in ENDS]
    return [(i, slice(a, b)) for i, ends in enumerate(cuts) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [13, 5, 2, 1])
def test_over_a_ring_a_query_sees_the_keys_of_its_document_up_to_itself_once(size: int, length: int) -> None:
    seen = np.zeros((BATCH, length, length), int)
    for rank, peer in itertools.product(range(size), repeat=2):
        ring = Ring(Peer(rank, size), lambda: length)
        queries, keys, causal = ring.pair(peer)
        here, there = ring.positions(rank)[queries], ring.positions(peer)[keys]
        first = ring.first(peer, begins(length))
        assert first.shape == (BATCH, len(here)) and (np.diff(first) >= 0).all()
        for (i, row), start in np.ndenumerate(first):
            assert not causal or start <= row
            seen[i, here[row], there[start : row + 1 if causal else None]] += 1
    for i, query, key in np.ndindex(seen.shape):
        assert seen[i, query, key] == (begins(length)[i, query] <= key <= query)


@pytest.mark.parametrize("length", [13, 5])
def test_attention_of_a_document_is_that_of_it_alone(length: int) -> None:
    q, kv, dy = draw(length, BATCH, 6, D), draw(length, BATCH, 3, 2, D), draw(length, BATCH, 6, D, 1)[..., 0]
    core = CausalAttention(Heads(6, 3), apart(length))
    o, saved = core.forward((q, kv))
    found = o, *core.backward(dy, saved, wgrad.now)
    for i, where in alone(length):
        one = np.s_[where, i : i + 1]
        core = CausalAttention(Heads(6, 3), place(where.stop - where.start))
        o, saved = core.forward((q[one], kv[one]))
        for a, b in zip(found, (o, *core.backward(dy[one], saved, wgrad.now)), strict=True):
            np.testing.assert_allclose(a[one], b, rtol=1e-12, atol=1e-13)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("length", "computed"), [(1, 1), (26, None)])
def test_a_block_of_which_no_query_sees_a_key_goes_on_without_being_computed(
    world: Intracomm, monkeypatch: pytest.MonkeyPatch, length: int, computed: int | None
) -> None:
    """Documents of one token: a rank computes its own block; of 26 at 26 positions: every block."""
    calls = []
    for name in ("attention", "attention_backward"):
        right = getattr(kernels.CPU, name)
        monkeypatch.setattr(kernels.CPU, name, lambda *x, name=name, right=right: (calls.append(name), right(*x))[1])
    with spread(world, 26, cp=world.size, tp=1) as (_, p):
        begins = np.tile(np.arange(26) // length * length, (BATCH, 1))
        p.cursor.place = replace(p.cursor.place, documents=documents(p, begins, np))
        s = len(p.context())
        core = CausalAttention(Heads(2, 2), p)
        o, saved = core.forward((draw(s, BATCH, 2, D), draw(s, BATCH, 2, 2, D)))
        core.backward(o, saved, wgrad.now)
    count = computed or world.size
    assert calls == ["attention"] * count + ["attention_backward"] * count


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_attention(dropout: float) -> None:
    core = CausalAttention(Heads(6, 3), apart(11), dropout)
    gradcheck(core, (draw(11, BATCH, 6, D), draw(11, BATCH, 3, 2, D)), elementwise=0)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_attention_in_16_bits_is_that_in_32_rounded_once(name: str) -> None:
    first = apart(11).cursor.place.documents.blocks[0]  # type: ignore[union-attr]
    q, kv, do = (x.astype(dtype_of(name)) for x in (draw(11, 2, 6, D), draw(11, 2, 3, 2, D), draw(11, 2, 6, D)))

    def run(cast: Any) -> tuple[Array, ...]:
        x, y, dy = cast(q), cast(kv), cast(do)
        k = kernels.of(x)
        o, lse = k.attention(x, y, 0.5, None, True, first)
        return o, lse, *k.attention_backward(dy, x, y, cast(q), lse, 0.5, None, True, first=first)

    for a, b in zip(run(lambda x: x), run(lambda x: x.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


@pytest.mark.parametrize("length", [13, 5])
def test_learnt_positions_are_counted_from_the_beginning_of_each_document(length: int) -> None:
    module = LearnedPositions(apart(length), 16, 6, normal(0.3))
    module.initialise(0, np.float64)
    within = np.arange(length) - begins(length)
    x, dy = draw(length, BATCH, 6), draw(length, BATCH, 6, 1)[..., 0]
    y, saved = module.forward(x)
    np.testing.assert_array_equal(y, x + module.weight.data[within.T])
    np.testing.assert_array_equal(module.backward(dy, saved, wgrad.now), dy)
    expected = np.zeros((16, 6))
    np.add.at(expected, within.T, dy)
    np.testing.assert_allclose(module.weight.grad, expected, rtol=1e-13, atol=1e-14)


def test_what_is_made_of_documents_is_made_for_what_a_rank_holds() -> None:
    found = documents(place(13), begins(13), np)
    assert len(found.blocks) == 1 and found.positions.dtype == np.int32 and found.positions.shape == (13, BATCH)
    np.testing.assert_array_equal(found.blocks[0].rows, begins(13))
    np.testing.assert_array_equal(found.positions.T, np.arange(13) - begins(13))
