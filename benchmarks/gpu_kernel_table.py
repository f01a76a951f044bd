"""The kernels that gpu_kernels.py times: for each its arguments, and what it must read and write, or its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmp import kernels
from hpcmp.arrays import wide
from hpcmp.documents import First
from hpcmp.random import DropoutMask

TOKENS, HIDDEN, FFN, HEADS, HEAD, VOCABULARY = 8192, 4096, 11008, 32, 128, 32000
SEQUENCE, PARAMETERS = 4096, 1 << 26  # of attention, of the optimizer


class Draw:
    """Arrays of normally distributed numbers of a dtype; ``sums`` in the dtype that sums have. xp: CuPy."""

    def __init__(self, dtype: Any, xp: Any) -> None:
        self.dtype, self.xp = dtype, xp

    def __call__(self, *shape: int) -> Any:
        return self.xp.random.standard_normal(shape).astype(self.dtype)

    def sums(self, *shape: int) -> Any:
        return self.xp.random.standard_normal(shape).astype(wide(self.dtype))

    def whole(self, below: int, *shape: int) -> Any:
        return self.xp.random.randint(0, below, shape)


def nbytes(*arrays: Any) -> int:
    return sum(array.nbytes for array in arrays)


#: By kernel, or ``KERNEL_documents``, what makes its arguments, its settings and the bytes that it must move, or for
#: "FLOP" its operations.
TABLE: dict[str, Callable[[Draw], tuple[list[Any], dict[str, Any], int, str]]] = {}


def kernel(make: Callable[[Draw], Any]) -> Callable[[Draw], Any]:
    """Enter a kernel of the specification into the table, under the name of the function that makes its arguments. That
    returns the arguments and the bytes, and perhaps settings and a unit: {"step": 3, ...}, "FLOP"."""

    def complete(draw: Draw) -> tuple[list[Any], dict[str, Any], int, str]:
        arguments, amount, *others = make(draw)
        settings, unit = (*others, *({}, "B")[len(others) :])
        return arguments, settings, amount, unit

    TABLE[make.__name__] = complete
    return make


def _norm(draw: Draw, backward: bool, rms: bool, weight: bool = False) -> Any:
    x, dy, w, b = draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN), draw(HIDDEN), draw(HIDDEN)
    k = kernels.CUDA
    if not backward:
        return [x, w, 1e-5] if rms else [x, w, b, 1e-5], 2 * nbytes(x)
    statistics = k.rms_norm(x, w, 1e-5)[1:] if rms else k.layer_norm(x, w, b, 1e-5)[1:]
    return ([dy, x, *statistics], 2 * nbytes(x)) if weight else ([dy, x, w, *statistics], 3 * nbytes(x))


for name in ("rms_norm", "layer_norm"):
    for backward, end in ((False, ""), (True, "_backward"), (True, "_backward_weight")):

        def made(draw: Draw, rms: bool = name == "rms_norm", backward: bool = backward, end: str = end) -> Any:
            return _norm(draw, backward, rms, "weight" in end)

        made.__name__ = name + end
        kernel(made)


@kernel
def add(draw: Draw) -> Any:
    x, y = draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN)
    return [x, y], 3 * nbytes(x)


@kernel
def add_rows(draw: Draw) -> Any:
    dy = draw(TOKENS, HIDDEN)
    return [draw.sums(HIDDEN), dy], nbytes(dy)


@kernel
def gelu(draw: Draw) -> Any:
    x = draw(TOKENS, FFN)
    return [x], 2 * nbytes(x)


@kernel
def gelu_backward(draw: Draw) -> Any:
    x = draw(TOKENS, FFN)
    return [x, x.copy()], 3 * nbytes(x)


@kernel
def swiglu(draw: Draw) -> Any:
    x = draw(TOKENS, 2, FFN)
    return [x], nbytes(x) * 3 // 2


@kernel
def swiglu_backward(draw: Draw) -> Any:
    x = draw(TOKENS, 2, FFN)
    return [draw(TOKENS, FFN), x], nbytes(x) * 5 // 2


@kernel
def dropout(draw: Draw) -> Any:
    x = draw(TOKENS, 1, HIDDEN)
    rows = draw.xp.arange(TOKENS)[:, None], draw.xp.arange(1)
    return [x, DropoutMask(0.1, (1, 2), *rows, (slice(0, HIDDEN),)), x.copy()], 3 * nbytes(x)


@kernel
def rope(draw: Draw) -> Any:
    x, angle = draw(TOKENS, 1, HEADS, HEAD), draw(TOKENS, 1, 1, HEAD // 2)
    return [x, draw.xp.cos(angle), draw.xp.sin(angle)], 2 * nbytes(x)


@kernel
def add_amax(draw: Draw) -> Any:
    x = draw(TOKENS, HIDDEN)
    return [draw.xp.zeros(1, np.float32), x], nbytes(x)


@kernel
def quantise(draw: Draw) -> Any:
    x = draw(TOKENS, HIDDEN)
    return [x, draw.xp.ones(1, np.float32), "e5m2", True, True], nbytes(x) + 2 * x.size


@kernel
def fp8_product(draw: Draw) -> Any:
    a, b = (draw.whole(64, n, HIDDEN).astype(np.uint8) for n in (TOKENS, FFN))
    inverse = draw.xp.ones(1, np.float32)
    settings = {"formats": ("e4m3", "e4m3")}
    return [draw(TOKENS, FFN), a, b, inverse, inverse], 2 * TOKENS * FFN * HIDDEN, settings, "FLOP"


@kernel
def assign(draw: Draw) -> Any:
    x, target = draw.sums(TOKENS, HIDDEN), draw(TOKENS, HIDDEN)
    return [target, x], nbytes(x, target)


@kernel
def add_square_sum(draw: Draw) -> Any:
    x = draw(TOKENS, 4 * HIDDEN)
    return [draw.xp.zeros(1), x], nbytes(x)


@kernel
def embedding(draw: Draw) -> Any:
    table, ids = draw(VOCABULARY, HIDDEN), draw.whole(VOCABULARY, TOKENS, 1)
    return [table, ids, 0], 2 * TOKENS * HIDDEN * table.itemsize


@kernel
def embedding_backward_weight(draw: Draw) -> Any:
    grad, ids, dy = draw.sums(VOCABULARY, HIDDEN), draw.whole(VOCABULARY, TOKENS, 1), draw(TOKENS, 1, HIDDEN)
    return [grad, ids, 0, dy], nbytes(dy) + 2 * grad.itemsize * TOKENS * HIDDEN


@kernel
def cross_entropy_parts(draw: Draw) -> Any:
    logits = draw(TOKENS, VOCABULARY)
    return [logits, draw.whole(VOCABULARY, TOKENS), 0], nbytes(logits)


@kernel
def cross_entropy_backward(draw: Draw) -> Any:
    logits, targets = draw(TOKENS, VOCABULARY), draw.whole(VOCABULARY, TOKENS)
    scale, lse = draw.sums(TOKENS), 20 + abs(draw.sums(TOKENS))
    return [scale, logits, targets, 0, lse], 2 * nbytes(logits)


@kernel
def matmul(draw: Draw) -> Any:
    return [draw(TOKENS, HIDDEN), draw(HIDDEN, FFN)], 2 * TOKENS * HIDDEN * FFN, {}, "FLOP"


@kernel
def matmul_transposed(draw: Draw) -> Any:
    return [draw(TOKENS, FFN), draw(HIDDEN, FFN)], 2 * TOKENS * HIDDEN * FFN, {}, "FLOP"


@kernel
def add_outer(draw: Draw) -> Any:
    arguments = [draw.sums(HIDDEN, FFN), draw(TOKENS, HIDDEN), draw(TOKENS, FFN)]
    return arguments, 2 * TOKENS * HIDDEN * FFN, {}, "FLOP"


def _attention(draw: Draw, backward: bool, documents: int = 1) -> Any:
    """With so many documents a sample that do not see each other."""
    s, b, length = SEQUENCE, 2, SEQUENCE // documents
    q, kv = draw(s, b, HEADS, HEAD), draw(s, b, HEADS, 2, HEAD)
    flop = 4 * b * HEADS * s * length * HEAD // 2  # two products, of which the causal mask leaves half
    begins = np.repeat(np.arange(s)[None] // length * length, b, 0)
    settings = {"first": First.of(begins, draw.xp)} if documents > 1 else {}
    if not backward:
        return [q, kv, HEAD**-0.5], flop, settings, "FLOP"
    o, lse = kernels.CUDA.attention(q, kv, HEAD**-0.5, **settings)
    return [draw(*q.shape), q, kv, o, lse, HEAD**-0.5], flop * 5 // 2, settings, "FLOP"


@kernel
def attention(draw: Draw) -> Any:
    return _attention(draw, False)


@kernel
def attention_backward(draw: Draw) -> Any:
    return _attention(draw, True)


@kernel
def attention_documents(draw: Draw) -> Any:
    return _attention(draw, False, 8)


@kernel
def attention_backward_documents(draw: Draw) -> Any:
    return _attention(draw, True, 8)


@kernel
def merge_attention(draw: Draw) -> Any:
    o, lse = draw.sums(SEQUENCE, 2, HEADS, HEAD), draw.sums(2, HEADS, SEQUENCE)
    return [o, lse, o.copy(), lse.copy()], 3 * nbytes(o)


@kernel
def adamw(draw: Draw) -> Any:
    state = [draw.sums(PARAMETERS) for _ in range(3)]
    settings: dict[str, Any] = {"step": 3, "betas": (0.9, 0.95), "epsilon": 1e-8, "grad_scale": 0.5, "rate": 1e-3}
    settings |= {"decay": 0.1, "out": draw(PARAMETERS)}  # the weights that the layers use, beside their masters
    return [*state, state[0] ** 2], 7 * nbytes(state[0]) + nbytes(settings["out"]), settings


@kernel
def sgd(draw: Draw) -> Any:
    state = [draw.sums(PARAMETERS) for _ in range(3)]
    return state, 5 * nbytes(state[0]), {"rate": 1e-3, "momentum": 0.9, "decay": 0.1, "grad_scale": 0.5}


@kernel
def take_rows(draw: Draw) -> Any:
    x, index = draw(TOKENS, HIDDEN), draw.xp.random.permutation(2 * TOKENS) // 2
    return [x, index, draw(2 * TOKENS)], 3 * nbytes(x)


@kernel
def combine(draw: Draw) -> Any:
    choices = draw(TOKENS, 2, HIDDEN)
    return [draw(TOKENS, 2), choices], nbytes(choices) * 3 // 2


@kernel
def combine_backward_gates(draw: Draw) -> Any:
    choices = draw(TOKENS, 2, HIDDEN)
    return [draw(TOKENS, HIDDEN), choices], nbytes(choices) * 3 // 2


def called(name: str) -> Callable[..., Any]:
    """The kernel that an entry of the table is about."""
    found: Callable[..., Any] = getattr(kernels.CUDA, name.removesuffix("_documents"))
    return found
