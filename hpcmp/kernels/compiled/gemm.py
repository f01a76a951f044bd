"""CBLAS's matrix products, called inside compiled loops by their address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..cblas import AS_IT_IS, ROW_MAJOR, TRANSPOSED

NO, T = AS_IT_IS, TRANSPOSED


@intrinsic
def gemm_at(
    context: Any, address: Any, ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any,
    ldb: Any, beta: Any, c: Any, ldc: Any,
) -> Any:  # fmt: skip
    """C = alpha op(A) op(B) + beta C, of float32 or float64 as alpha is; a, b and c addresses, sizes in 64 bits (see
    ``cblas.Library``)."""
    whole, real = types.int64, alpha
    signature = types.void(*(whole,) * 6, real, *(whole,) * 4, real, whole, whole)

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        order = ir.Constant(ir.IntType(64), ROW_MAJOR)
        values = [order, *args[1:]]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return target.get_dummy_value()

    return signature, generate
