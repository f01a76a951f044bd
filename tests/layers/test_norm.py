"""LayerNorm and RMSNorm."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmp.layers.norm import LayerNorm, RMSNorm
from hpcmp.layers.parallel import ModelParallel

from .common import Case, draw, place

CASES = {"layer": Case(lambda p: LayerNorm(p, 6)), "rms": Case(lambda p: RMSNorm(p, 6, 1e-3))}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    CASES[name].check_serial()
    CASES[name].check_dtype()
    CASES[name].check_weight_gradients()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)
    CASES[name].check_gradients(parallel)


def test_layer_norm_starts_as_normalisation() -> None:
    module = LayerNorm(place(5), 6)
    weight, bias = module.initialise(0, np.float64)
    y = module.forward(3 + 2 * draw(5, 2, 6))[0]
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-4)
    assert (weight.decay, bias.decay) == (False, False)


def test_rms_norm_starts_as_normalisation() -> None:
    module = RMSNorm(place(5), 6)
    (weight,) = module.initialise(0, np.float64)
    y = module.forward(3 + 2 * draw(5, 2, 6))[0]
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-4)
    assert not weight.decay
