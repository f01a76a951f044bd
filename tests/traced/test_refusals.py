"""Nothing is lost in silence: what has no rule or would drop a gradient raises TypeError and says what to do."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcmp.traced import Traced

kept: list[Any] = []
plain = np.ones((2, 2))
REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("unknown function", lambda x: np.linalg.inv(x), "inv is not traced .* write a Module"),
    ("unknown ufunc", lambda x: np.arctan2(x, 1.0), "arctan2 is not traced .* write a Module"),
    ("unknown method", lambda x: x.prod(), "prod is not traced"),
    ("sort", lambda x: x.sort(), "sort is not traced"),
    ("ufunc method", lambda x: np.add.reduce(x), "add.reduce is not traced"),
    ("remainder", lambda x: x % 2, "remainder is not traced"),
    ("unknown keyword", lambda x: np.sum(x, where=plain > 0), "sum with these arguments is not traced .*where"),
    ("ufunc keyword", lambda x: np.exp(x, dtype=np.float64), "exp with these arguments is not traced"),
    ("tracer keyword", lambda x: np.clip(x, a_min=x, a_max=None), "clip: pass traced arrays by position"),
    ("clip to a tracer", lambda x: np.clip(1.0, x, None), "clip with respect to one"),
    ("condition", lambda x: np.where(x, plain, x), "where with respect to one"),
    ("concatenate one", lambda x: np.concatenate(x), "concatenate with respect to one"),
    ("concatenate flat", lambda x: np.concatenate([x, x], axis=None), "concatenate .*axis=None"),
    ("repeated index", lambda x: np.einsum("ii->i", x), "einsum .*repeats an index"),
    ("einsum lists", lambda x: np.einsum(x, [0, 1], [1, 0]), "einsum .*must be a string"),
    ("integer sum", lambda x: x.sum(dtype=int), "sum gave int64"),
    ("complex", lambda x: x.astype(complex), "complex128 are not traced"),
    ("asarray", lambda x: np.asarray(x), "cannot become a plain array"),
    ("array of", lambda x: np.array([x[0, 0], x[0, 1]]), "cannot become a plain array"),
    ("sum of a list", lambda x: np.sum([x, x]), "cannot become a plain array"),
    ("method of an array", lambda x: plain.dot(x), "cannot become a plain array"),
    ("random", lambda x: np.random.default_rng(0).normal(x), "cannot become a plain array"),
    ("full", lambda x: np.full((2, 2), x), "cannot become a plain array"),
    ("full_like", lambda x: np.full_like(plain, x), "copyto is not traced"),
    ("vectorize", lambda x: np.vectorize(lambda v: v)(x), "cannot become a plain array"),
    ("index", lambda x: plain[x], "cannot become a plain array"),
    ("float", lambda x: float(x[0, 0]), "cannot become a plain array"),
    ("int", lambda x: int(x[0, 0]), "cannot become a plain array"),
    ("bool", lambda x: x if x[0, 0] else -x, "cannot become a plain array"),
    ("item", lambda x: x.item(), "ndarray.item is not traced"),
    ("tolist", lambda x: x.tolist(), "ndarray.tolist is not traced"),
    ("out", lambda x: np.exp(x, out=plain.copy()), "in place"),
    ("sum out", lambda x: np.sum(x, out=plain.copy()), "in place"),
    ("into an array", lambda x: operator.iadd(plain.copy(), x), "in place"),
    ("copyto", lambda x: np.copyto(plain.copy(), x), "copyto is not traced"),
    ("add.at", lambda x: np.add.at(plain.copy(), 0, x), "add.at is not traced"),
    ("set item", lambda x: operator.setitem(x, 0, 1.0), "in place"),
    ("traced inside traced", lambda x: Traced(np.exp).forward(x), "x must be an array .*, not Tracer"),
    ("from another call", lambda x: x + kept[0], "kept from another call"),
    ("from another call, returned", lambda x: kept[0], "kept from another call"),
    *((f"in-place {f.__name__}", lambda x, f=f: f(x, 1.0), "in place") for f in (
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul
    )),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_nothing_is_lost_in_silence(fn: Callable[[Any], Any], message: str) -> None:
    kept.clear()
    x = np.array([[1.0, 2.0], [3.0, 4.0]])

    def keep(x: Any) -> Any:
        kept.append(x)
        return x

    Traced(keep).forward(x)
    with pytest.raises(TypeError, match=message):
        Traced(fn).forward(x)
