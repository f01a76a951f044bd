"""Offload and 16-bit kernels on a GPU: real copies on side streams, under real computation."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of, to_host
from hpcmp.offload import Host
from hpcmp.training.verify import source_of
from tests.layouts import engine, small

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_arrays_come_back_as_they_were() -> None:
    import cupy

    host = Host(cupy)
    handles = [host.put(cupy.full(1 << 20, i, cupy.float32)) for i in range(8)]
    for handle in handles:
        handle.settle()
    coming = [handle.fetch() for handle in handles]
    assert [float(pending.wait().min()) for pending in coming] == list(range(8))
    handles[0].store(coming[0].wait() + 5)
    assert (handles[0].host() == 5).all()


def test_a_model_that_offloads_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmp.offload.CudaCopies.smallest", 0)
    found = []
    for offload in ("none", "both"):
        config = small(device="cuda", offload=offload, dropout=0.1, layers=4, microbatch=2)
        with engine(config) as e:
            for step in range(2):
                e.step(step, *source_of(config)(step, e.share))
            found.append({p.name: to_host(p.data) for p in e.buckets.parameters})
    for name, weight in found[0].items():
        np.testing.assert_array_equal(found[1][name], weight, name)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_matrix_products_of_16_bits(name: str) -> None:
    """Accumulated in float32: 3000 ones are 3000."""
    import cupy

    one = cupy.ones((3000, 8), dtype_of(name))
    product = kernels.of(one).matmul(one.T, one)
    assert product.dtype == one.dtype
    assert float(product.astype(cupy.float32)[0, 0]) == float(np.float32(3000).astype(dtype_of(name)))
