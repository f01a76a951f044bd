"""The optimizers' kernels against their papers, number by number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of
from hpcmp.kernels import update

RNG = np.random.default_rng


def test_adamw_is_the_papers_algorithm() -> None:
    """Number by number, over three steps from zero moments."""
    rng, decay, rate, (b1, b2) = RNG(3), 0.1, 0.02, (0.9, 0.95)
    data, m, v = rng.normal(size=5), np.zeros(5), np.zeros(5)
    expected = [(float(x), 0.0, 0.0) for x in data]
    for step in (1, 2, 3):
        grad = rng.normal(size=5)
        update.adamw(data, grad, m, v, step=step, rate=rate, betas=(b1, b2), epsilon=1e-8, decay=decay, grad_scale=0.5)
        for i, (w, mi, vi) in enumerate(expected):
            g = 0.5 * grad[i]
            mi, vi = b1 * mi + (1 - b1) * g, b2 * vi + (1 - b2) * g * g
            direction = (mi / (1 - b1**step)) / (math.sqrt(vi / (1 - b2**step)) + 1e-8)
            expected[i] = w - rate * (direction + decay * w), mi, vi
        np.testing.assert_allclose(np.stack([data, m, v], 1), expected, rtol=1e-13)


@pytest.mark.parametrize(
    "kernel_set", [kernels.CPU, kernels.NUMPY, kernels.REFERENCE], ids=["cpu", "numpy", "reference"]
)
def test_adamw_rounds_the_weights_beside_their_masters(kernel_set: Any) -> None:
    data, grad, m, v = abs(RNG(1).normal(size=(4, 70001))).astype(np.float32)
    out, settings = np.zeros(70001, dtype_of("bfloat16")), {"step": 2, "betas": (0.9, 0.95), "epsilon": 1e-8}
    kernel_set.adamw(data, grad, m, v, rate=0.1, decay=0.1, grad_scale=1.0, out=out, **settings)
    np.testing.assert_array_equal(out, data.astype(out.dtype))


def test_sgd_with_momentum() -> None:
    """Three steps from zero momentum: w - rate (sum of the gradients, each times momentum to its age)."""
    rng = RNG(1)
    data, m, grads = rng.normal(size=5), np.zeros(5), rng.normal(size=(3, 5))
    expected = data.copy()
    for step in range(3):
        update.sgd(data, grads[step], m, rate=0.1, momentum=0.9, decay=0.01, grad_scale=2.0)
        velocity = sum(0.9 ** (step - i) * 2 * grads[i] for i in range(step + 1))
        expected = expected - 0.1 * (velocity + 0.01 * expected)
        np.testing.assert_allclose(data, expected, rtol=1e-13)


def test_nesterov_looks_a_step_ahead() -> None:
    m, g = np.array([2.0, -1.0]), np.array([0.5, 4.0])
    ahead = update.nesterov(g, m, momentum=0.5, grad_scale=1.0)
    np.testing.assert_array_equal(m, [1.5, 3.5])
    np.testing.assert_array_equal(ahead, [0.5 + 0.75, 4 + 1.75])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    x = RNG(shape).normal(size=shape)
    y = update.orthogonalise(x)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    inner = u.T @ y @ vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-12)
    assert (np.diag(inner) > 0.6).all() and (np.diag(inner) < 1.3).all()


def test_orthogonalise_of_nothing_is_nothing() -> None:
    assert not update.orthogonalise(np.zeros((3, 4))).any()
    assert update.orthogonalise(np.zeros((0, 4))).shape == (0, 4)


#: What is read, and what the factor is then: the norm is the root of the first number over ``scale`` = 2.
FACTORS = [
    ((64.0, 1.0), 1.0, 8.0, 0.5),  # a norm of 4, under the limit
    ((64.0, 1.0), 0.3, 4.0, 0.5),  # on it; what was there before does not matter
    ((64.0, 1.0), 1.0, 1.0, 0.125),
    ((64.0, 1.0), 1.0, None, 0.5),
    ((0.0, 1.0), 1.0, 1.0, 0.5),
    ((math.inf, 1.0), 1.0, 1.0, math.nan),
    ((math.nan, 1.0), 1.0, None, math.nan),
    ((64.0, math.inf), 1.0, 1.0, math.nan),
    ((64.0, math.nan), 1.0, 1.0, math.nan),
    ((64.0, 1.0), math.nan, 1.0, math.nan),  # and so it stays
]
SETS = {"reference": kernels.REFERENCE, "numpy": kernels.NUMPY, "cpu": kernels.CPU}


@pytest.mark.parametrize(("sums", "before", "clip", "factor"), FACTORS)
def test_clip_factor(sums: tuple[float, float], before: float, clip: float | None, factor: float) -> None:
    found = np.array([before])
    update.clip_factor(np.array([*sums, math.nan]), found, clip=clip, scale=2.0)
    np.testing.assert_array_equal(found, [factor])


def arrays(dtype: Any) -> list[np.ndarray]:
    """Weights, gradient, moments; and weights of 16 bits."""
    data, grad, m, v = abs(RNG(1).normal(size=(4, 1029))).astype(dtype)
    return [data, grad, m, v, np.zeros(1029, dtype_of("bfloat16"))]


ADAM = {"step": 2, "betas": (0.9, 0.95), "epsilon": 1e-8}
#: How many arrays a kernel has, what it is told, and by what name it is given the number that may be an array.
STEPS = {
    "adamw": (4, ADAM | {"rate": 0.1, "decay": 0.1}, "grad_scale"),
    "adam_update": (3, ADAM, "grad_scale"),
    "sgd": (3, {"rate": 0.1, "momentum": 0.9, "decay": 0.1}, "grad_scale"),
    "nesterov": (2, {"momentum": 0.9}, "grad_scale"),
    "descend": (2, {"decay": 0.1}, "rate"),
}


def assert_an_array_is_as_good_as_a_number(kernel_set: Any, dtype: Any) -> None:
    """The same bits; and NaN, either way, changes nothing, and makes zeros."""
    for name, (count, settings, key) in STEPS.items():
        for scale in (1 / 3, math.nan):
            found = []
            for given in (scale, np.array([scale])):
                *flat, out = arrays(dtype)
                more = settings | {key: given} | ({"out": out} if name == "adamw" else {})
                made = getattr(kernel_set, name)(*flat[:count], **more)
                found.append([*flat, out, np.zeros(0) if made is None else made])
            for x, y, before in zip(*found, [*arrays(dtype), 0 * found[0][-1]], strict=True):
                np.testing.assert_array_equal(x, y)
                if math.isnan(scale):
                    np.testing.assert_array_equal(x, before)
            assert math.isnan(scale) or any(
                not np.array_equal(x, y) for x, y in zip(found[0], arrays(dtype), strict=False)
            )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_set", SETS.values(), ids=SETS)
def test_an_array_is_as_good_as_a_number(kernel_set: Any, dtype: Any) -> None:
    assert_an_array_is_as_good_as_a_number(kernel_set, dtype)
