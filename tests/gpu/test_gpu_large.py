"""Kernels on a GPU at the sizes of a model: rows of a whole vocabulary, many tokens, flat shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of, to_host
from tests.kernels.test_kernels import SETTINGS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DTYPES = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]
ULP = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5, "float64": 1e-12}


def put(*arrays: Any) -> list[Any]:
    import cupy

    return [cupy.asarray(x) for x in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 65536])
def test_cross_entropy_over_a_vocabulary(vocabulary: int, dtype: Any) -> None:
    draw = np.random.default_rng(0)
    logits, targets = (4 * draw.normal(size=(300, vocabulary))).astype(dtype), draw.integers(-1, vocabulary, 300)
    wide, reference = logits.astype(np.float64), kernels.REFERENCE
    x, t = put(logits, targets)
    expected = reference.cross_entropy_parts(wide, targets, 0)
    for y, z in zip(kernels.of(x).cross_entropy_parts(x, t, 0), expected, strict=True):
        np.testing.assert_allclose(to_host(y), z, rtol=1e-12 if dtype == np.float64 else 1e-5)
    lse = (expected[0] + np.log(expected[1])).astype(np.promote_types(dtype, np.float32))
    scale = np.where(targets >= 0, 1e-2, 0).astype(lse.dtype)
    wanted = reference.cross_entropy_backward(scale.astype(np.float64), wide, targets, 0, lse.astype(np.float64))
    dx = kernels.of(x).cross_entropy_backward(*put(scale), x, t, 0, *put(lse))
    assert dx is x
    np.testing.assert_allclose(to_host(dx).astype(np.float64), wanted, rtol=ULP[dtype.name], atol=2**-24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_an_embedding_with_a_frequent_token(dtype: Any) -> None:
    draw = np.random.default_rng(1)
    wide = np.promote_types(dtype, np.float32)
    ids = np.where(draw.uniform(size=8192) < 0.2, 5, draw.integers(0, 500, 8192))
    dy = (10 ** draw.uniform(-3, 3, (8192, 1032))).astype(dtype)
    expected, found = np.zeros((400, 1032)), []
    for t in np.flatnonzero(ids < 400):
        expected[ids[t]] += dy[t].astype(np.float64)
    for _ in range(3):
        (grad,) = put(np.zeros(expected.shape, wide))
        kernels.of(grad).embedding_backward_weight(grad, *put(ids), 0, *put(dy))
        found.append(to_host(grad))
    np.testing.assert_allclose(found[0], expected, rtol=1e-12 if dtype == np.float64 else 1e-5)
    assert all((grad == found[0]).all() for grad in found)  # in every run the same bits
    table = put(expected.astype(dtype))[0]
    np.testing.assert_array_equal(
        to_host(kernels.of(table).embedding(table, *put(ids), 3)),
        kernels.REFERENCE.embedding(expected.astype(dtype), ids, 3),
    )


@pytest.mark.parametrize("offset", [0, 3])
def test_adamw_over_a_shard(offset: int) -> None:
    draw = np.random.default_rng(2)
    whole = abs(draw.normal(size=(4, 3_000_001))).astype(np.float32)
    out = np.zeros(3_000_001, dtype_of("bfloat16"))
    arrays = put(*whole, out)
    data, grad, m, v, rounded = (x[offset:] for x in arrays)
    kernels.of(data).adamw(data, grad, m, v, **SETTINGS["adamw"], out=rounded)
    kernels.REFERENCE.adamw(*(x[offset:] for x in whole), **SETTINGS["adamw"])
    for y, z in zip(arrays[:4], whole, strict=True):
        np.testing.assert_allclose(to_host(y), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_host(rounded), to_host(data).astype(out.dtype))
    assert not to_host(arrays[4][:offset]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixture_of_experts_rows(dtype: Any) -> None:
    draw = np.random.default_rng(3)
    x, order = draw.normal(size=(4096, 1032)).astype(dtype), draw.permutation(8192)[:7000] // 2
    gates, choices = draw.uniform(size=(1500, 4)).astype(dtype), draw.normal(size=(1500, 4, 1032)).astype(dtype)
    k = kernels.of(put(x)[0])
    np.testing.assert_array_equal(to_host(k.take_rows(*put(x, order))), x[order])
    expected = np.einsum("tk,tkh->th", gates.astype(np.float64), choices.astype(np.float64))
    np.testing.assert_allclose(
        to_host(k.combine(*put(gates, choices))).astype(np.float64), expected, rtol=ULP[dtype.name], atol=1e-5
    )
    expected = np.einsum("th,tkh->tk", choices[:, 0].astype(np.float64), choices.astype(np.float64))
    found = to_host(k.combine_backward_gates(*put(np.ascontiguousarray(choices[:, 0]), choices)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
