"""8 bits on a GPU: codes are the reference's, bit for bit; products by tensor cores; a model learns as on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import to_host
from hpcmp.kernels import CUDA, REFERENCE
from hpcmp.kernels.cuda import fp8
from hpcmp.kernels.cuda.libraries import EIGHT_BITS, capability
from hpcmp.kernels.cuda.multiply import adds_biases
from hpcmp.kernels.fp8 import SUMMED
from tests.kernels.test_cuda_fp8 import FORMATS, PRODUCTS, SIZES, SOURCES, draw, largest_of, operands
from tests.layouts import engine, small
from tests.training.test_engine import CURVE, affine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def put(*xs: Any) -> list[Any]:
    import cupy

    return [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in xs]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_codes_are_the_references_bit_for_bit(dtype: Any, format: str) -> None:
    for size in (*SIZES, (1000, 3000)):
        x = draw(dtype, *size)
        record, wanted = np.full((2, 1), 0.5, np.float32)
        sums = np.zeros((-(-size[0] // SUMMED), size[1]), np.float32)
        given, largest, noted, found = put(x, np.zeros(1, np.float32), record, sums)
        expected = REFERENCE.quantise(x, largest_of(x), format, True, True, wanted, sums=sums)
        for each in (given, given[:, ::-1][:, ::-1]):
            CUDA.add_amax(largest, each)
            assert to_host(largest) == largest_of(x)
            codes = CUDA.quantise(each, largest, format, True, True, noted, sums=found)
            for y, z in zip(codes, expected, strict=True):
                np.testing.assert_array_equal(to_host(y), z)
            np.testing.assert_allclose(to_host(found), sums, rtol=1e-5, atol=2e-3)
            assert to_host(noted) == wanted


@pytest.mark.parametrize("format", FORMATS)
def test_every_float16_is_rounded_as_in_the_reference(format: str) -> None:
    """By the instruction of the GPU, where it has one."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    for largest in np.array([[0.0], [3.0], [65504.0]], np.float32):
        expected = REFERENCE.quantise(x, largest, format, True, True)
        for y, z in zip(CUDA.quantise(*put(x, largest), format, True, True), expected, strict=True):
            np.testing.assert_array_equal(to_host(y), z)


@pytest.mark.parametrize("sizes", [(32, 48, 64), (512, 768, 2048), (31, 48, 64), (1, 1, 1)])
@pytest.mark.parametrize("formats", PRODUCTS)
def test_products(formats: tuple[str, str], sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if adds_biases() and capability() >= EIGHT_BITS and not any(n % 16 for n in sizes):
        monkeypatch.setattr(fp8, "_widened", lambda *arguments: pytest.fail("not by cuBLASLt"))
    (m, n, k), given = sizes, operands(*sizes, formats)
    rng = np.random.default_rng(5)
    for dtype in SOURCES:
        before, bias = rng.normal(size=(m, n)).astype(dtype), rng.normal(size=n).astype(dtype)
        for settings in ({}, {"bias": bias}, {"accumulate": True}):
            expected, (found,) = before.astype(np.float64), put(before)
            REFERENCE.fp8_product(expected, *given, **settings)
            CUDA.fp8_product(found, *put(*given), **{key: put(value)[0] for key, value in settings.items()})
            ulp = {"float32": 2e-4, "float16": 2**-10, "bfloat16": 2**-7}[dtype.name]  # Hopper's sums have fewer bits
            np.testing.assert_allclose(to_host(found).astype(np.float64), expected, rtol=ulp, atol=ulp * k**0.5)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_a_model_learns_as_on_the_cpu(scaling: str, graphs: bool) -> None:
    settings: dict[str, Any] = CURVE | {"steps": 30, "dtype": "bfloat16", "fp8": scaling}
    losses = []
    for device in ("cpu", "cuda"):
        config = small(**settings, device=device, cuda_graphs=graphs and device == "cuda")
        with engine(config) as e:
            source = affine(config)
            losses.append([e.step(step, *source(step, e.share)).loss for step in range(30)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)
    assert losses[1][-1] < 0.95 * losses[1][0]
