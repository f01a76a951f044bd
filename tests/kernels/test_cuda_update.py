"""The CUDA kernels of optimizers, on the CPU: shards that begin anywhere, weights of 16 bits beside their masters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of
from tests.kernels.emulation.backend import emulated, needs_gxx
from tests.kernels.test_kernels import SETTINGS
from tests.kernels.test_update import FACTORS, assert_an_array_is_as_good_as_a_number

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

#: How many flat arrays a kernel has, and whether it makes one.
KERNELS = {
    "adamw": (4, False),
    "adam_update": (3, True),
    "sgd": (3, False),
    "nesterov": (2, True),
    "descend": (2, False),
}


def shards(offsets: tuple[int, ...], size: int, dtype: Any) -> list[np.ndarray]:
    """Parts of larger arrays, each from its offset on; the last of them positive, as second moments are."""
    draw = np.random.default_rng(size)
    found = [draw.normal(size=offset + size + 3).astype(dtype) for offset in offsets]
    found[-1] = abs(found[-1])
    return [x[offset : offset + size] for x, offset in zip(found, offsets, strict=True)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("odd", [None, 0, 1, 2, 3, slice(None)], ids=str)
@pytest.mark.parametrize("size", [1, 1024, 1029])
@pytest.mark.parametrize("name", KERNELS)
def test_a_shard_that_begins_anywhere(name: str, size: int, odd: Any, dtype: Any) -> None:
    """All of its arrays, or one, between the addresses from which a GPU moves several numbers at once."""
    count, makes = KERNELS[name]
    places = np.full(4, 4)
    if odd is not None:
        places[odd] = 1
    offsets = tuple(places[:count].tolist())
    given, wanted = (shards(offsets, size, dtype) for _ in range(2))
    with emulated():
        made = getattr(kernels.CUDA, name)(*given, **SETTINGS[name])
    expected = getattr(kernels.REFERENCE, name)(*wanted, **SETTINGS[name])
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    assert (made is not None) == makes
    for y, z in zip([*given, made], [*wanted, expected], strict=True):
        if z is not None:
            np.testing.assert_allclose(y, z, rtol=tolerance, atol=tolerance)
    for y, z, offset in zip(given, wanted, offsets, strict=True):
        np.testing.assert_array_equal(y.base[:offset], z.base[:offset])  # what lies beside it is as it was
        np.testing.assert_array_equal(y.base[offset + size :], z.base[offset + size :])


@pytest.mark.parametrize("place", [0, 1, 8])
@pytest.mark.parametrize("weights", ["bfloat16", "float16", "float32"])
def test_adamw_rounds_the_weights_beside_their_masters(weights: str, place: int) -> None:
    data, grad, m, v = shards((0, 0, 0, 0), 1029, np.float32)
    whole = np.full(1040, 7, dtype_of(weights))
    out = whole[place : place + 1029]
    with emulated():
        kernels.CUDA.adamw(data, grad, m, v, **SETTINGS["adamw"], out=out)
    np.testing.assert_array_equal(out, data.astype(out.dtype))
    assert (whole[:place] == 7).all() and (whole[place + 1029 :] == 7).all()
    expected = shards((0, 0, 0, 0), 1029, np.float32)
    kernels.REFERENCE.adamw(*expected, **SETTINGS["adamw"])
    np.testing.assert_allclose(data, expected[0], rtol=1e-6, atol=1e-6)


def test_nothing_to_step() -> None:
    nothing = [np.zeros(0, np.float32) for _ in range(4)]
    with emulated():
        kernels.CUDA.adamw(*nothing, **SETTINGS["adamw"])
        assert kernels.CUDA.nesterov(*nothing[:2], **SETTINGS["nesterov"]).shape == (0,)


@pytest.mark.parametrize(("sums", "before", "clip", "factor"), FACTORS)
def test_clip_factor(sums: tuple[float, float], before: float, clip: float | None, factor: float) -> None:
    found = np.array([before])
    with emulated():
        kernels.CUDA.clip_factor(np.array([*sums, np.nan]), found, clip=clip, scale=2.0)
    np.testing.assert_array_equal(found, [factor])


def test_clip_factor_has_the_bits_of_the_reference() -> None:
    """So that a host that decides, and a GPU, take the same step."""
    draw = np.random.default_rng(0)
    for squares, clip, scale in np.exp(draw.normal(size=(50, 3)) * 4):
        found, wanted = np.ones(1), np.ones(1)
        with emulated():
            kernels.CUDA.clip_factor(np.array([squares, 1.0]), found, clip=clip, scale=scale)
        kernels.REFERENCE.clip_factor(np.array([squares, 1.0]), wanted, clip=clip, scale=scale)
        assert found == wanted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_is_as_good_as_a_number(dtype: Any) -> None:
    with emulated():
        assert_an_array_is_as_good_as_a_number(kernels.CUDA, dtype)
