"""ModelParallel: how activations and parameters lie over the group."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmp.collectives import AllGather, AllReduce, Copy, ReduceScatter
from hpcmp.comm.base import Communicator
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module
from hpcmp.testing import assert_adjoint, assert_owned_once

from .common import place


@pytest.mark.mpi
def test_enter_and_leave(parallel: ModelParallel) -> None:
    kinds = (AllGather, ReduceScatter) if parallel.sequence else (Copy, AllReduce)
    assert (type(parallel.enter), type(parallel.leave)) == kinds
    length, here = parallel.cursor.place.length, parallel.positions()
    assert_adjoint(parallel.enter, (len(here), 3))
    assert_adjoint(parallel.leave, (length, 3))
    # Leaving what one rank has entered with is a sum over the ranks.
    x = np.random.default_rng(0).normal(size=(length, 3))[here]
    np.testing.assert_allclose(parallel.leave(parallel.enter(x)), parallel.tp.size * x, rtol=1e-14)


@pytest.mark.mpi
def test_positions_tile_the_sequence(parallel: ModelParallel) -> None:
    here, length = parallel.positions(), parallel.cursor.place.length
    if parallel.sequence:
        np.testing.assert_array_equal(here, np.array_split(np.arange(length), parallel.tp.size)[parallel.tp.rank])
    else:
        np.testing.assert_array_equal(here, np.arange(length))


@pytest.mark.mpi
def test_parameters_are_owned_once(parallel: ModelParallel) -> None:
    parameters = [
        parallel.replicated(4, 3),
        parallel.sharded(7, 2, axis=0),
        parallel.sharded(2, 3, axis=1),
    ]
    for p in parameters:
        p.name = str(p.shape)
    for p in parameters:
        p.data = np.zeros(p.local_shape)
    assert_owned_once(parameters, parallel.tp)
    assert [p.shared for p in parameters] == [("tp",) if parallel.sequence else (), (), ()]
    assert parameters[0].local_shape == (4, 3)


@pytest.mark.mpi(min_size=2)
def test_owned_twice_or_never_is_found(tp: Communicator) -> None:
    for owned in (slice(0, 4), slice(0, 0)):
        p = place(5, tp).sharded(4, axis=0, part=slice(0, 4), owned=owned, overlaps=True, name="w")
        p.data = np.zeros(4)
        with pytest.raises(AssertionError, match="not owned exactly once: w"):
            assert_owned_once([p], tp)
    p = place(5, tp).sharded(4, axis=0, part=slice(0, 1), owned=tp.part(4), overlaps=True, name="w")
    p.data = np.zeros(1)
    with pytest.raises(AssertionError, match="w: owned .* is not inside"):
        assert_owned_once([p], tp)


def test_without_a_group_it_is_the_serial_case() -> None:
    parallel = ModelParallel()
    assert (parallel.tp.size, parallel.tp.rank, parallel.sequence) == (1, 0, False)
    x = np.ones((3, 2))
    assert parallel.enter(x) is x and parallel.leave(x) is x
    assert isinstance(parallel.enter, Module)
