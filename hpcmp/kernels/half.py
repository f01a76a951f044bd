"""Kernels for arrays of 16 bits: widened to float32, computed by another set's kernel, and rounded once.

A kernel adds up hundreds of numbers: in 16 bits each partial sum would be rounded (256 + 1 is 256 in bfloat16), so none
computes in them. What other ranks or a backward go on computing with (log-sum-exp, mean, 1/standard deviation, sums of
exponentials, gradients of weights) stays float32. Micikevicius et al., "Mixed precision training", 2018, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import is_half
from . import composed, update

#: Kernels that only move numbers, or round once as they are.
EXACT = {"assign", "rows", "embedding", "membership", "within_capacity", "take_rows"}
EXACT |= {"add_amax", "quantise", "fp8_product", "shift_history"}

#: Of which results only the first (0) or none are 16-bit numbers again; all those of every other kernel are.
ROUNDED: dict[str, tuple[int, ...]] = {
    "layer_norm": (0,),
    "rms_norm": (0,),
    "attention": (0,),
    "merge_attention": (0,),
    "layer_norm_backward_weight": (),
    "rms_norm_backward_weight": (),
    "combine_backward_gates": (),
    "cross_entropy_parts": (),
    "square_sum": (),
    "router_scores": (),
}

#: Kernels whose result takes the place of an argument, and of which.
OVERWRITTEN = {"cross_entropy_backward": 1, "rope": 0}


class Half:
    """The kernels of ``wide`` for 16-bit arrays: the same names, shapes and meaning; results have the dtype of the
    first 16-bit argument, or float32 (see ``ROUNDED``).

    ``native`` names kernels that serve 16-bit arrays as they are, accumulating in float32 (a GPU's matrix products).
    A kernel that works in place has a float32 target: TypeError otherwise. Optimizers' updates, which work on master
    weights, are not here.
    """

    def __init__(self, wide: Any, native: frozenset[str] = frozenset()) -> None:
        for name, kernel in vars(wide).items():
            if hasattr(composed, name) and name not in native:
                setattr(self, name, functools.partial(getattr(composed, name), self))
            elif not hasattr(update, name):
                setattr(self, name, kernel if name in EXACT | native else widened(name, kernel))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no kernel {name!r}")


def widened(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    rounded, over = ROUNDED.get(name), OVERWRITTEN.get(name)

    @functools.wraps(kernel)
    def call(*args: Any, **settings: Any) -> Any:
        halves = [_is_half(a) for a in args]
        found = kernel(
            *(a.astype(np.float32) if half else a for a, half in zip(args, halves, strict=True)),
            **{key: a.astype(np.float32) if _is_half(a) else a for key, a in settings.items()},
        )
        if found is None:
            if halves[0]:
                raise TypeError(f"{name}: adding up in {args[0].dtype} loses what is added; give it a float32 array")
            return None
        if over is not None and halves[over]:
            args[over][...] = found
            return args[over]
        dtype = args[halves.index(True)].dtype
        results = found if isinstance(found, tuple) else (found,)
        results = tuple(
            r.astype(dtype) if (rounded is None or i in rounded) and r.dtype == np.float32 else r
            for i, r in enumerate(results)
        )
        return results if isinstance(found, tuple) else results[0]

    return call


def _is_half(x: Any) -> bool:
    return isinstance(getattr(x, "dtype", None), np.dtype) and is_half(x.dtype)
