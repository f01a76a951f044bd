"""Pullbacks of the two general products, matmul and einsum."""

from __future__ import annotations

from collections import Counter
from string import ascii_letters
from typing import Any

import numpy as np

from ..arrays import Array
from .shapes import Pullback


def matmul(y: Array, a: Array, b: Array) -> tuple[Pullback, Pullback]:
    """Y = A B: dA = dY B^T, dB = A^T dY. A vector stands for a row on the left and for a column on the right.

    A matrix shared by a batch is one large product in the pullback, not a batch of products and a sum over them.
    """
    a_shape, b_shape = a.shape, b.shape
    a = a if a.ndim > 1 else a[None, :]
    b = b if b.ndim > 1 else b[:, None]
    y_shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])

    def da(dy: Array) -> Array:
        dy = dy.reshape(y_shape)
        if len(b_shape) <= 2:
            return np.tensordot(dy, b, (-1, -1)).reshape(a_shape)
        if len(a_shape) <= 2:
            return _contract(dy, b, -1).reshape(a_shape)
        return dy @ np.swapaxes(b, -1, -2)

    def db(dy: Array) -> Array:
        dy = dy.reshape(y_shape)
        if len(b_shape) <= 2:
            return _contract(a, dy, -2).reshape(b_shape)
        return np.swapaxes(a, -1, -2) @ dy

    return da, db


def _contract(p: Array, q: Array, axis: int) -> Array:
    """The sum over all batch axes and over one of the two matrix axes: a matrix."""
    axes = (*range(p.ndim - 2), axis)
    return np.tensordot(p, q, (axes, axes))


def einsum(y: Array, subscripts: str, *operands: Array, optimize: bool | str = False) -> tuple[Any, ...]:
    """y = sum of the product of the operands: the pullback of one operand is an einsum of dy with all the others.

    The operand's indices that occur nowhere else were only summed over: along them its gradient is constant.
    """
    inputs, output = _labels(subscripts, operands)

    def pullback(i: int) -> Pullback:
        others, shape, mine = operands[:i] + operands[i + 1 :], operands[i].shape, inputs[i]
        elsewhere = [output, *inputs[:i], *inputs[i + 1 :]]
        known = "".join(label for label in mine if any(label in term for term in elsewhere))
        summed = tuple(axis for axis, label in enumerate(mine) if label not in known)

        def pull(dy: Array) -> Array:
            dx = np.einsum(f"{','.join(elsewhere)}->{known}", dy, *others, optimize=optimize)
            dx = np.expand_dims(dx, summed)
            return np.broadcast_to(dx, np.broadcast_shapes(dx.shape, shape))

        return pull

    return (None, *(pullback(i) for i in range(len(operands))))


def _labels(subscripts: str, operands: tuple[Array, ...]) -> tuple[list[str], str]:
    """The labels of each operand and of the result, with ellipses and an implicit result written out."""
    if not isinstance(subscripts, str):
        raise TypeError("the subscripts must be a string")
    left, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if any(max(Counter(term.replace(".", "")).values(), default=0) > 1 for term in terms):
        raise TypeError(f"{subscripts!r} repeats an index inside one operand")
    if not arrow:
        letters = Counter(left.replace(",", "").replace(".", ""))
        output = "..." * ("." in left) + "".join(sorted(label for label, n in letters.items() if n == 1))
    hidden = [x.ndim - len(term.replace(".", "")) for term, x in zip(terms, operands, strict=True)]
    free = "".join(letter for letter in ascii_letters if letter not in subscripts)[: max(hidden)]
    inputs = [term.replace("...", free[len(free) - n :]) for term, n in zip(terms, hidden, strict=True)]
    return inputs, output.replace("...", free)
