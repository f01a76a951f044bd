"""What cuBLAS is asked for a product of strided matrices: sizes, transpositions and leading dimensions, from shapes and
strides alone.

cuBLAS counts a matrix column by column. A row-major matrix is its own transpose to it, and (a b)^T = b^T a^T: so b is
cuBLAS's first operand, a its second, and neither is copied.
"""

from __future__ import annotations

from typing import NamedTuple

from ...arrays import Array

_LARGEST = 2**31 - 1  # what cuBLAS can count to
_ALIGNMENT = 16  # bytes: the widest access of a GPU


class Product(NamedTuple):
    """d = op(a) op(b), + d if ``accumulate`` or + c if ``onto``, + the bias on every column if ``bias``; column-major;
    and its epilogue.

    d (m, n), op(a) (m, k), op(b) (k, n), the bias (m,). op transposes what lies in memory: a is (k, m) where
    ``transpose_a``, with ``lda`` numbers from one column to the next. dtype is that of a and b, out that of d and the
    bias. alignment: the power of two, of bytes, at most 16, of which each address (a, b, d) is a multiple.

    epilogue: "" for none; "gelu": d = gelu(z), and z, which would be d, is written to aux; "dgelu": d times gelu'(aux);
    "sums": the sums of the rows of op(a) are written to where the bias is. gelu: its tanh form. aux (m, n) is packed,
    of the dtype ``out``.

    c lies as d does, elsewhere.

    dtype_b: that of b where it is not a's: of 8 bits, whose scales come with the launch.
    """

    m: int
    n: int
    k: int
    dtype: str
    out: str
    transpose_a: bool
    transpose_b: bool
    lda: int
    ldb: int
    ldd: int
    accumulate: bool
    bias: bool
    alignment: tuple[int, int, int]
    epilogue: str = ""
    dtype_b: str = ""
    onto: bool = False


class Lines(NamedTuple):
    """How a matrix lies: in rows of adjacent numbers or, ``transposed``, in columns of such; ``leading`` numbers from
    one to the next."""

    transposed: bool
    leading: int


def lines(x: Array) -> Lines | None:
    """How a matrix lies; None where no axis is contiguous, or lines overlap or run backwards."""
    (rows, columns), (down, across), size = x.shape, x.strides, x.itemsize
    ways = (False, rows, columns, down, across), (True, columns, rows, across, down)
    for transposed, count, length, stride, unit in ways:
        leading = length if count == 1 else stride // size
        if (unit == size or length == 1) and length <= leading <= _LARGEST and (count == 1 or stride % size == 0):
            return Lines(transposed, leading)
    return None


def product(
    a: Array,
    b: Array,
    out: Array,
    at: tuple[int, int, int],
    *,
    accumulate: bool = False,
    bias: bool = False,
    onto: bool = False,
) -> tuple[Product, bool] | None:
    """out = a b, + out or + what lies as it does, + bias (n,) on every row, as cuBLAS is asked for it; None for what
    cuBLAS cannot address.

    a (m, k), b (k, n), out (m, n), none of them empty; ``at``: their addresses. cuBLAS's first operand is b; it is a if
    the second result is true, for an ``out`` that lies in columns (which takes no bias). ValueError for sizes that do
    not fit each other or are beyond 2^31.
    """
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k or out.shape != (m, n) or max(m, n, k) > _LARGEST:
        raise ValueError(f"no product of {a.shape} and {b.shape} into {out.shape}")
    x, y, z = lines(a), lines(b), lines(out)
    if x is None or y is None or z is None or (z.transposed and bias):
        return None
    if z.transposed:  # out^T = b^T a^T lies in rows
        turned = product(b.T, a.T, out.T, (at[1], at[0], at[2]), accumulate=accumulate, onto=onto)
        return turned and (turned[0], True)
    sizes, leading, turns = (n, m, k), (y.leading, x.leading, z.leading), (y.transposed, x.transposed)
    alignment = _alignment(at[1]), _alignment(at[0]), _alignment(at[2])
    asked = Product(*sizes, a.dtype.name, out.dtype.name, *turns, *leading, accumulate, bias, alignment, onto=onto)
    return asked, False


def _alignment(address: int) -> int:
    return min(address & -address or _ALIGNMENT, _ALIGNMENT)
