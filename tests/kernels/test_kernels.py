"""Every kernel of every set against the reference in double precision, at odd and empty sizes, at large numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import Array
from hpcmp.documents import First
from hpcmp.kernels import attention, reference
from hpcmp.kernels.half import OVERWRITTEN
from hpcmp.random import DropoutMask

RNG = np.random.default_rng


class Sizes:
    """Draws arrays of one dtype, with axes of ``s`` and ``f``, which may be zero."""

    def __init__(self, s: int, f: int, dtype: Any = np.float64) -> None:
        self.s, self.f, self.dtype, self.rng = s, f, dtype, RNG((s, f))

    def real(self, *shape: int) -> Array:
        return self.rng.normal(size=shape).astype(self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> Array:
        return self.rng.integers(low, high, shape)


def norm_arguments(d: Sizes, rms: bool) -> dict[str, Array]:
    x, weight = d.real(d.s, 2, 7), d.real(7)
    if rms:
        return {"dy": d.real(d.s, 2, 7), "x": x, "weight": weight, "rstd": reference.rms_norm(x, weight, 1e-5)[1]}
    _, mean, rstd = reference.layer_norm(x, weight, weight, 1e-5)
    return {"dy": d.real(d.s, 2, 7), "x": x, "weight": weight, "mean": mean, "rstd": rstd}


def onto(d: Sizes, *shape: int) -> list[Array]:
    """The array that a kernel adds its result to, for some of the sizes."""
    return [d.real(d.s, *shape)] if d.s in (3, 5) else []


def norm_backward_arguments(d: Sizes, rms: bool) -> list[Any]:
    return [*norm_arguments(d, rms).values(), reference._means, *onto(d, 2, 7)]


def attention_mask(s: int, b: int, n: int, t: int) -> DropoutMask:
    """Of (b, n, s, t): the keys in two runs, as on a ring."""
    runs = slice(2, 2 + t // 2), slice(9 + t // 2, 9 + t)
    return DropoutMask(0.3, (5, 6), np.arange(s) + 3, np.arange(b)[:, None, None], runs, np.arange(n)[:, None])


def first_keys(s: int, b: int, t: int, causal: bool) -> First:
    """Documents of one key and of several, others in each sample; if not causal, the last queries see none."""
    last = np.arange(s) if causal else np.arange(s) * (t + 1) // max(1, s - 1) + 1
    often = 0.3 ** (1 + 2 * np.arange(b))[:, None]  # a key begins a document
    begins = np.random.default_rng(s + t).random((b, t + 2)) < often
    begins = np.maximum.accumulate(np.where(begins, np.arange(t + 2), 0), 1)
    return First.of(begins[:, np.minimum(last, t + 1)], np)


def attention_arguments(d: Sizes, backward: bool) -> list[Array]:
    s, t, causal = d.s % 11, d.f % 11, d.s == 5
    t = s if causal else t
    q, kv = d.real(s, 2, 6, 4), d.real(t, 2, 3, 2, 4)
    keep = attention_mask(s, 2, 6, t)
    if not backward:
        return [q, kv, 0.5, keep, causal]
    o, lse = attention.attention(q, kv, 0.5, keep, causal)
    return [d.real(s, 2, 6, 4), q, kv, o, lse, 0.5, keep, causal]


def cross_entropy_arguments(d: Sizes) -> list[Any]:
    """Logits, targets of which some lie elsewhere and some are ignored, and the first column."""
    return [d.real(d.s, 2, d.f), d.whole(-1, d.f + 9, d.s, 2), 4]


def chosen(d: Sizes) -> Array:
    """Three different experts of seven for each of (s, 2) tokens."""
    return d.rng.permuted(np.broadcast_to(np.arange(7), (d.s, 2, 7)), axis=-1)[..., :3]


def adamw_arguments(d: Sizes) -> list[Array]:
    return [d.real(d.s * d.f), d.real(d.s * d.f), d.real(d.s * d.f), d.real(d.s * d.f) ** 2]


ADAM: dict[str, Any] = {"step": 3, "betas": (0.9, 0.95), "epsilon": 1e-8, "grad_scale": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "adam_update": ADAM,
    "clip_factor": {"clip": 2.5, "scale": 2.0},
    "adamw": ADAM | {"rate": 0.1, "decay": 0.1},
    "sgd": {"rate": 0.1, "momentum": 0.9, "decay": 0.1, "grad_scale": 0.5},
    "nesterov": {"momentum": 0.9, "grad_scale": 0.5},
    "descend": {"rate": 0.1, "decay": 0.2},
}

CALLS: dict[str, Callable[[Sizes], list[Any]]] = {
    "rows": lambda d: [d.real(d.s, 2, d.f)],
    "matmul": lambda d: [d.real(d.s, 2, d.f), d.real(d.f, 5), d.real(5)],
    "matmul_transposed": lambda d: [d.real(d.s, 2, 5), d.real(d.f, 5)],
    "add_outer": lambda d: [d.real(d.f, 5), d.real(d.s, 2, d.f), d.real(d.s, 2, 5)],
    "add_rows": lambda d: [d.real(d.f), d.real(d.s, 70, d.f)],
    "add_outer_and_rows": lambda d: [d.real(d.f, 5), d.real(5), d.real(d.s, 2, d.f), d.real(d.s, 2, 5)],
    "matmul_onto": lambda d: [d.real(d.s, 2, d.f), d.real(d.f, 16), d.real(d.s, 2, 16), d.real(16)],
    "matmul_gelu": lambda d: [d.real(d.s, 2, d.f), d.real(d.f, 16), d.real(16)],
    "matmul_gelu_backward": lambda d: [d.real(d.s, 2, d.f), d.real(16, d.f), d.real(d.s, 2, 16)],
    "gelu": lambda d: [d.real(d.s, 2, d.f)],
    "dropout": lambda d: [
        d.real(d.s, 2, d.f),
        DropoutMask(0.2, (3, 4), np.arange(d.s)[:, None], np.array([7, 2]), (slice(5, 5 + d.f),)),
        *onto(d, 2, d.f),
    ],
    "add": lambda d: [d.real(d.s, 2, d.f), d.real(d.s, 2, d.f)],
    "assign": lambda d: [d.real(d.s, 2, d.f), d.real(d.s, 2, d.f)],
    "gelu_backward": lambda d: [d.real(d.s, 2, d.f), d.real(d.s, 2, d.f)],
    "swiglu": lambda d: [d.real(d.s, 2, 2, d.f)],
    "swiglu_backward": lambda d: [d.real(d.s, 2, d.f), d.real(d.s, 2, 2, d.f)],
    "layer_norm": lambda d: [d.real(d.s, 2, 7), d.real(7), d.real(7), 1e-5],
    "layer_norm_backward": lambda d: norm_backward_arguments(d, False),
    "layer_norm_backward_weight": lambda d: [v for k, v in norm_arguments(d, False).items() if k != "weight"],
    "rms_norm": lambda d: [d.real(d.s, 2, 7), d.real(7), 1e-5],
    "rms_norm_backward": lambda d: norm_backward_arguments(d, True),
    "rms_norm_backward_weight": lambda d: [v for k, v in norm_arguments(d, True).items() if k != "weight"],
    "rope": lambda d: [d.real(d.s, 2, 3, 8 + d.f % 4), d.real(d.s, 1, 1, 4), d.real(d.s, 1, 1, 4)],
    "attention": lambda d: attention_arguments(d, False),
    "attention_backward": lambda d: attention_arguments(d, True),
    "merge_attention": lambda d: [d.real(*n) for _ in range(2) for n in ((d.s, 2, 6, 4), (2, 6, d.s))],
    "embedding": lambda d: [d.real(d.f, 5), d.whole(0, d.f + 9, d.s, 2), 4],
    "embedding_backward_weight": lambda d: [d.real(d.f, 5), d.whole(0, d.f + 9, d.s, 2), 4, d.real(d.s, 2, 5)],
    "cross_entropy_parts": cross_entropy_arguments,
    "cross_entropy_backward": lambda d: [abs(d.real(d.s, 2)), *cross_entropy_arguments(d), 3 + d.real(d.s, 2)],
    "square_sum": lambda d: [d.real(d.s, 2, d.f)],
    "add_square_sum": lambda d: [np.ones(1), d.real(d.s, 2, d.f)],
    "add_amax": lambda d: [abs(d.real(1)), d.real(d.s, 2, d.f)],
    "quantise": lambda d: [d.real(d.s, d.f), abs(d.real(1)), "e5m2", True, True],
    "fp8_product": lambda d: [
        d.real(d.s, 5),
        *(d.whole(0, 64, n, d.f).astype(np.uint8) for n in (d.s, 5)),
        *np.ones((2, 1), d.dtype) / 4,
        ("e4m3", "e5m2"),
        d.real(5),
    ],
    "shift_history": lambda d: [abs(d.real(d.s, 16)), *abs(d.real(2, d.s)), d.real(1)],
    "router_scores": lambda d: [d.real(d.s, 2, 7), "softmax"],
    "router_scores_backward": lambda d: [d.real(d.s, 2, 7), abs(d.real(d.s, 2, 7)), "sigmoid"],
    "top_k": lambda d: [d.real(d.s, 2, 7), 3],
    "membership": lambda d: [chosen(d), 7],
    "within_capacity": lambda d: [chosen(d), 7, 2],
    "take_rows": lambda d: [d.real(d.s, d.f), d.whole(-1, d.s, 2 * d.s + 1), d.real(2 * d.s + 1)],
    "combine": lambda d: [d.real(d.s, 3), d.real(d.s, 3, d.f)],
    "combine_backward_gates": lambda d: [d.real(d.s, d.f), d.real(d.s, 3, d.f)],
    "clip_factor": lambda d: [np.array([300.0, 5.0, 1.0]), np.ones(1)],
    "adamw": adamw_arguments,
    "adam_update": lambda d: adamw_arguments(d)[1:],
    "sgd": lambda d: adamw_arguments(d)[1:],
    "nesterov": lambda d: adamw_arguments(d)[2:],
    "descend": lambda d: adamw_arguments(d)[:2],
    "orthogonalise": lambda d: [d.real(d.s % 50, d.f % 50)],
}


def lay(x: Any, contiguous: bool) -> Any:
    """A copy of an array; if not contiguous, of every second number of one with its axes in the opposite order."""
    if not isinstance(x, np.ndarray) or contiguous:
        return np.array(x) if isinstance(x, np.ndarray) else x
    wide = np.repeat(x.T, 2, 0)
    return wide[::2].T


def run(kernel_set: Any, name: str, arguments: list[Any], contiguous: bool = True) -> list[Array]:
    """What a kernel returns, then its arguments as it leaves them."""
    arguments = [lay(value, contiguous) for value in arguments]
    result = getattr(kernel_set, name)(*arguments, **SETTINGS.get(name, {}))
    results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    return [*results, *(value for value in arguments if isinstance(value, np.ndarray))]


def test_every_kernel_is_here() -> None:
    assert set(vars(kernels.REFERENCE)) == set(CALLS)


SIZES = [(5, 7), (1, 1), (3, 8193), (11, 3), (0, 3), (3, 0)]

SETS = {"reference": kernels.REFERENCE, "numpy": kernels.NUMPY}
if (found := kernels.with_numba()) is not None:
    SETS["compiled"] = found[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_set_does_as_the_reference_in_double_precision(
    name: str, size: tuple[int, int], contiguous: bool, dtype: Any
) -> None:
    """On odd and empty sizes, contiguous or not. Results keep the dtype, and what is not a result its value."""
    arguments = CALLS[name](Sizes(*size, dtype))
    wide = [v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype == dtype else v for v in arguments]
    expected = run(kernels.REFERENCE, name, wide)
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    for kernel_set in SETS.values():
        for y, z in zip(run(kernel_set, name, arguments, contiguous), expected, strict=True):
            assert np.shape(y) == np.shape(z)
            if isinstance(y, np.ndarray) and y.dtype.kind == "f":
                assert y.dtype == dtype or name in ("add_square_sum", "clip_factor")
            scale = max(1.0, float(np.abs(z).max(initial=0)))
            np.testing.assert_allclose(y, z, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kernel_set", SETS.values(), ids=SETS)
def test_large_numbers_stay_finite_in_single_precision(kernel_set: Any) -> None:
    x = np.array([-1e4, -90, -20, 0, 20, 90, 1e4], np.float32)
    one = np.ones_like(x)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(kernel_set.gelu(x), np.maximum(x, 0), atol=1e-6)
        np.testing.assert_allclose(kernel_set.gelu_backward(one, x), (np.sign(x) + 1) / 2, atol=1e-6)
        np.testing.assert_allclose(kernel_set.swiglu(np.stack([x, one])), np.maximum(x, 0), atol=1e-6)
        dx = kernel_set.swiglu_backward(one, np.stack([x, one]))
        np.testing.assert_allclose(dx, [(np.sign(x) + 1) / 2, np.maximum(x, 0)], atol=1e-6)
    q = 1e3 * RNG(0).normal(size=(5, 1, 2, 4)).astype(np.float32)
    kv = np.stack([q, q], -2)
    o, lse = kernel_set.attention(q, kv, 0.5)
    assert np.isfinite(o).all() and np.isfinite(lse).all()
    for gradient in kernel_set.attention_backward(np.ones_like(q), q, kv, o, lse, 0.5):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kernel_set", SETS.values(), ids=SETS)
def test_results_that_take_the_place_of_an_argument(kernel_set: Any) -> None:
    for name, place in OVERWRITTEN.items():
        for contiguous in (True, False):
            arguments = CALLS[name](Sizes(5, 7))
            arguments[place] = lay(arguments[place], contiguous)
            assert getattr(kernel_set, name)(*arguments) is arguments[place]


@pytest.mark.parametrize("kernel_set", SETS.values(), ids=SETS)
def test_logits_of_minus_infinity(kernel_set: Any) -> None:
    """One, and all of a shard of the vocabulary: their exponentials are zero."""
    logits = np.array([[[1.0, -np.inf, 2.0]], [[-np.inf] * 3]])
    with np.errstate(invalid="raise"):
        top, total, chosen = kernel_set.cross_entropy_parts(logits, np.array([[2], [9]]), 0)
    np.testing.assert_array_equal(top[:, 0], [2, -np.inf])
    np.testing.assert_allclose(total[:, 0], [1 + np.exp(-1), 0], rtol=1e-15)
    np.testing.assert_array_equal(chosen[:, 0], [2, 0])


def test_the_set_for_an_array() -> None:
    assert kernels.of(np.zeros(3)) is kernels.CPU
    assert kernels.NUMPY.gelu is not reference.gelu  # overridden
    assert kernels.NUMPY.swiglu is reference.swiglu  # not overridden
    with pytest.raises(AttributeError, match="no kernel 'gelu_forward'"):
        _ = kernels.CPU.gelu_forward
    with pytest.raises(AttributeError, match="no attribute 'GPU'"):
        _ = kernels.GPU
