"""One line a rule: a function of arrays, whose gradient the tests compare with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hpcmp.module import Parameter


class Case(NamedTuple):
    """fn of operands: a shape stands for float64 numbers of that shape, an array for itself."""

    name: str
    fn: Callable[..., Any]
    operands: tuple[Any, ...]
    positive: bool = False

    def arrays(self) -> tuple[Any, ...]:
        """Operands with magnitudes in [0.5, 2), away from the kinks at 0 and, being random, from ties."""
        draw = np.random.default_rng(len(self.name))
        return tuple(number(draw, a, self.positive) if isinstance(a, tuple) else a for a in self.operands)


def number(draw: np.random.Generator, shape: tuple[int, ...], positive: bool = False) -> Any:
    return np.asarray(draw.uniform(0.5, 2, shape) * (1 if positive else draw.choice([-1, 1], shape)))


MASK = np.array([[True, False, True], [False, True, True]])
ROWS = np.array([2, 0, 2, 2])

CASES = [
    Case("add", lambda a, b: a + b, ((2, 3), (3,))),
    Case("add scalar", lambda a: 2 + a + 1.5, ((2, 3),)),
    Case("subtract", lambda a, b: a - b, ((2, 1), (1, 3))),
    Case("subtract from scalar", lambda a: 1 - a, ((3,),)),
    Case("multiply", lambda a, b: a * b, ((4, 1, 3), (2, 1))),
    Case("multiply by itself", lambda a: a * a * a, ((3,),)),
    Case("divide", lambda a, b: a / b, ((), (2, 3))),
    Case("divide scalar", lambda a: 2 / a, ((2, 3),)),
    Case("empty broadcast", lambda a, b: a * b, ((1, 3), (0, 3))),
    Case("power", lambda a, b: np.power(a, b), ((2, 3), (3,)), positive=True),
    Case("power operator", lambda a, b: a**b, ((2, 3), (3,)), positive=True),
    Case("power scalars", lambda a: a**3 + a**-1 + a**0 + a**1, ((2, 3),)),
    Case("power of a scalar", lambda a: 2.0**a, ((2, 3),)),
    Case("power by integers", lambda n, a: a**n, (np.array([0, 1, 3]), (3,))),
    Case("root", lambda a: a**0.5, ((2, 3),), positive=True),
    Case("unary", lambda a: -(+a), ((2, 3),)),
    Case("abs", lambda a: abs(a) + np.abs(a), ((2, 3),)),
    Case("square", lambda a: np.square(a), ((2, 3),)),
    Case("sqrt", lambda a: np.sqrt(a), ((2, 3),), positive=True),
    Case("reciprocal", lambda a: np.reciprocal(a), ((2, 3),)),
    Case("exp", lambda a: np.exp(a), ((2, 3),)),
    Case("expm1", lambda a: np.expm1(a), ((2, 3),)),
    Case("log", lambda a: np.log(a), ((2, 3),), positive=True),
    Case("log1p", lambda a: np.log1p(a), ((2, 3),), positive=True),
    Case("tanh", lambda a: np.tanh(a), ((2, 3),)),
    Case("sin", lambda a: np.sin(a), ((2, 3),)),
    Case("cos", lambda a: np.cos(a), ((2, 3),)),
    Case("maximum", lambda a, b: np.maximum(a, b), ((2, 3), (2, 1))),
    Case("minimum", lambda a, b: np.minimum(a, b), ((2, 3), (2, 1))),
    Case("relu", lambda a: np.maximum(a, 0), ((2, 3),)),
    Case("logaddexp", lambda a, b: np.logaddexp(a, b), ((2, 3), (3,))),
    Case("clip", lambda a: np.clip(a, -1, 1) + a.clip(0), ((4, 5),)),
    Case("where", lambda m, a, b: np.where(m, a, b), (MASK, (2, 3), (3,))),
    Case("where scalar", lambda m, a: np.where(m, a, -np.inf)[m] + np.where(m, 0, a)[m], (MASK, (2, 3))),
    Case("where compared", lambda a: np.where(a > 0, a, 0.1 * a), ((4, 5),)),
    Case("astype", lambda a: a.astype(np.float64) * 2, ((3,),)),
    Case("copy", lambda a: a.copy() + np.copy(a), ((3,),)),
    Case("matmul vectors", lambda a, b: a @ b, ((3,), (3,))),
    Case("matmul vector matrix", lambda a, b: a @ b, ((3,), (3, 2))),
    Case("matmul matrix vector", lambda a, b: a @ b, ((2, 3), (3,))),
    Case("matmul", lambda a, b: np.matmul(a, b), ((2, 3), (3, 4))),
    Case("matmul batch matrix", lambda a, b: a @ b, ((2, 5, 1, 3), (3, 4))),
    Case("matmul matrix batch", lambda a, b: a @ b, ((2, 3), (5, 2, 3, 4))),
    Case("matmul batch vector", lambda a, b: a @ b, ((2, 4, 3), (3,))),
    Case("matmul vector batch", lambda a, b: a @ b, ((3,), (2, 3, 4))),
    Case("matmul batches", lambda a, b: a @ b, ((2, 1, 4, 3), (5, 3, 2))),
    Case("matmul empty", lambda a, b: a @ b, ((2, 0, 3), (3, 4))),
    Case("matmul over nothing", lambda a, b: a @ b, ((2, 0), (0, 4))),
    Case("matmul no batch", lambda a, b: a @ b, ((0, 2, 3), (1, 3, 4))),
    Case("einsum", lambda a, b: np.einsum("bij,bjk->bik", a, b), ((2, 3, 4), (2, 4, 5))),
    Case("einsum implicit", lambda a, b: np.einsum("ij,jk", a, b), ((2, 3), (3, 4))),
    Case("einsum three", lambda a, b, c: np.einsum("ij,jk,k->i", a, b, c), ((2, 3), (3, 4), (4,))),
    Case("einsum optimised", lambda a, b: np.einsum("ij,jk->ki", a, b, optimize=True), ((2, 3), (3, 4))),
    Case("einsum transpose", lambda a: np.einsum("ijk->kij", a), ((2, 3, 4),)),
    Case("einsum sum", lambda a: np.einsum("ij->", a) * np.einsum("ij->j", a), ((2, 3),)),
    Case("einsum summed alone", lambda a, b: np.einsum("ijm,jk->ik", a, b), ((2, 3, 4), (3, 2))),
    Case("einsum length 1", lambda a, b: np.einsum("ij,ij->i", a, b), ((2, 1), (2, 3))),
    Case("einsum ellipsis", lambda a, b: np.einsum("...ij,jk->...ki", a, b), ((5, 2, 2, 3), (3, 4))),
    Case("einsum ellipses", lambda a, b: np.einsum("...i,j...", a, b), ((5, 1, 3), (4, 2))),
    Case("einsum scalar", lambda a, b: np.einsum(",i->i", a, b), ((), (3,))),
    *(
        Case(
            f"{f} {axis} {keep}",
            lambda a, f=f, axis=axis, keep=keep: getattr(a, f)(axis=axis, keepdims=keep),
            ((2, 3, 4),),
        )
        for f in ("sum", "mean", "max", "min", "var", "std")
        for axis in (None, 1, -2, (0, -1))
        for keep in (False, True)
    ),
    Case("sum over no axis", lambda a: np.sum(a, ()) + np.sum(a, -1, keepdims=True), ((2, 3),)),
    Case("sum empty", lambda a: a.sum(1) + a.sum(), ((2, 0),)),
    Case("amax", lambda a: np.amax(a, 1) * np.amin(a, 1), ((2, 3),)),
    Case("max empty", lambda a: a.max(1), ((0, 2),)),
    Case("var ddof", lambda a: a.var(1, ddof=1) + np.std(a, -1, ddof=0.5), ((2, 3),)),
    Case("cumsum", lambda a: np.cumsum(a, axis=-2) + a.cumsum(1), ((2, 3),)),
    Case("cumsum flattened", lambda a: a.cumsum(), ((2, 3),)),
    Case("reshape", lambda a: a.reshape(3, 2) + a.reshape((3, -1)) + np.reshape(a, (3, 2)), ((2, 3),)),
    Case("ravel", lambda a: a.ravel() + a.flatten() + a.reshape(-1), ((2, 3),)),
    Case("squeeze", lambda a: a.squeeze(1) + np.squeeze(a), ((2, 1, 3),)),
    Case("expand_dims", lambda a: np.expand_dims(a, (0, -1)), ((2, 3),)),
    Case("broadcast_to", lambda a: np.broadcast_to(a, (4, 2, 3)), ((2, 1),)),
    Case("transpose", lambda a: a.transpose(2, 0, 1) + np.transpose(a, (-1, 0, 1)), ((2, 3, 4),)),
    Case("transpose all", lambda a: a.T + a.transpose(), ((2, 3, 4),)),
    Case("swapaxes", lambda a: a.swapaxes(0, -1) + np.swapaxes(a, 2, 0), ((2, 3, 4),)),
    Case("moveaxis", lambda a: np.moveaxis(a, 0, -1) + np.moveaxis(a, (1, 2), (0, 1)), ((2, 3, 4),)),
    Case("flip", lambda a: np.flip(a, -1) * np.flip(a), ((2, 3),)),
    Case("tril", lambda a: np.tril(a) + np.tril(a, -1), ((3, 3),)),
    Case("triu", lambda a: np.triu(a) + np.triu(a, 1), ((3, 3),)),
    Case("concatenate", lambda a, b: np.concatenate([a, b, a], axis=-1), ((2, 3), (2, 0))),
    Case("concatenate 0", lambda a, b: np.concatenate((a, np.zeros_like(a), b)), ((2, 3), (1, 3))),
    Case("stack", lambda a, b: np.stack([a, b, a], axis=-1) * np.stack((a, b, b), 2), ((2, 3), (2, 3))),
    Case("index basic", lambda a: a[0] + a[1:, None, ..., 2] + a[-1, ::-1], ((2, 3, 3),)),
    Case("index scalar", lambda a: a[1, 2], ((2, 3),)),
    Case("index mask", lambda m, a: a[m], (MASK, (2, 3))),
    Case("index mask of rows", lambda m, a: a[m[0]], (MASK, (3, 2))),
    Case("index duplicates", lambda i, a: a[i] * 2, (ROWS, (3, 2))),
    Case("index pairs", lambda i, a: a[i, i - 1] + a[..., i][0], (ROWS, (3, 4))),
    Case("index list", lambda a: a[[0, 0, 1]] + a[[1, 1, 0], 0:1], ((2, 3),)),
    Case("index negative", lambda i, a: a[:, -i], (ROWS, (2, 3))),
    Case("unpacked", lambda a: sum(row * (n + 1) for n, row in enumerate(a)), ((3, 2),)),
    Case("take", lambda i, a: np.take(a, i, axis=-2) + a.take(i, 0), (ROWS, (3, 2))),
    Case("take flattened", lambda i, a: np.take(a, i) + a.take(-i), (ROWS, (2, 3))),
    Case("take_along_axis", lambda i, a: np.take_along_axis(a, i, 1), (np.array([[0, 0], [2, 2]]), (2, 3))),
    Case("take_along_axis -2", lambda i, a: np.take_along_axis(a, i, -2), (np.array([[[1], [1]]]), (2, 2, 3))),
    Case("take_along_axis flattened", lambda i, a: np.take_along_axis(a, i, None), (ROWS, (2, 3))),
]


def parameter(value: Any) -> Parameter:
    p = Parameter(value.shape)
    p.data, p.grad = value, value * 0
    return p
