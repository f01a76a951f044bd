"""The CUDA kernels of a mixture of experts, on the CPU: what the cases of every kernel leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

DTYPES = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 37, 4104])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_a_tokens_sum_is_in_the_order_of_its_choices(experts: int, width: int, dtype: Any) -> None:
    """Rounded once: the sums are those of float32, to its last bit or so."""
    draw = np.random.default_rng(width)
    gates, choices = draw.uniform(size=(9, experts)).astype(dtype), draw.normal(size=(9, experts, width)).astype(dtype)
    wide = np.promote_types(dtype, np.float32)
    expected = np.zeros((9, width), wide)
    for j in range(experts):
        expected += gates[:, j, None].astype(wide) * choices[:, j].astype(wide)
    with emulated():
        found = kernels.CUDA_HALF.combine(gates, choices)
    np.testing.assert_array_equal(found, expected.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 37, 4104])
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_the_gradient_of_the_gates(experts: int, width: int, dtype: Any) -> None:
    draw = np.random.default_rng(experts)
    dy, choices = draw.normal(size=(9, width)).astype(dtype), draw.normal(size=(9, experts, width)).astype(dtype)
    with emulated():
        found = kernels.CUDA_HALF.combine_backward_gates(dy, choices)
    assert found.dtype == np.promote_types(dtype, np.float32)
    expected = np.einsum("th,tkh->tk", dy.astype(np.float64), choices.astype(np.float64))
    tolerance = 1e-13 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * width**0.5 * 10)


def test_no_tokens() -> None:
    with emulated():
        k = kernels.CUDA
        assert k.combine(np.zeros((0, 3)), np.zeros((0, 3, 5))).shape == (0, 5)
        assert k.combine_backward_gates(np.zeros((4, 0)), np.zeros((4, 2, 0))).tolist() == [[0.0, 0.0]] * 4
