"""FP8 of a run: whether products of 8 bits make what it multiplies in FP8, or why not. For its log, and the doctor."""

from __future__ import annotations

from typing import NamedTuple

from .. import partition
from ..kernels.cuda.libraries import EIGHT_BITS
from ..layers.heads import Heads
from .config import Config

MULTIPLE = 16  # of which cuBLASLt wants all sizes of a product of 8 bits
_ROUNDED = "numbers are rounded to 8 bits, and multiplied in"


class Verdict(NamedTuple):
    """Whether a run's FP8 is as fast as it can be; that in words, and what would make it so ("" if it is)."""

    good: bool
    value: str
    advice: str = ""


def verdict(config: Config, capability: int = 0, why: str = "") -> Verdict:
    """Of a resolved configuration with ``train.fp8``, on GPUs of a compute capability (see ``libraries.capability``).

    why: cuBLASLt cannot be loaded; "" if it can.
    """
    if config.train.device == "cpu":
        value = f"{_ROUNDED} float32, as there are no others on a CPU: slower than without"
        return Verdict(False, value, "set train.fp8=none, unless it is to be tried out; GPUs have products of 8 bits")
    slow = f"{_ROUNDED} bfloat16, slower than without"
    if why:
        return Verdict(False, f"{slow}: there is no cuBLASLt ({why})", "as for the line `matrix products`")
    if capability < EIGHT_BITS:
        have, need = (f"{number // 10}.{number % 10}" for number in (capability, EIGHT_BITS))
        value = f"{slow}: the GPU has compute capability {have}, and products of 8 bits come with {need}"
        return Verdict(False, value, "set train.fp8=none, or run on GPUs from Ada and Hopper on")
    if found := misfits(config):
        value = f"{slow}, where a size is no multiple of {MULTIPLE}: {', '.join(found)}"
        return Verdict(False, value, "change these numbers, or set train.fp8=none")
    return Verdict(True, "cuBLASLt multiplies 8 bits")


def misfits(config: Config) -> list[str]:
    """The sizes of the linears' matrices, on whichever rank, that are no multiples of 16: what, and how many."""
    m, layout = config.model, config.layout
    assert m.kv_heads is not None and m.head_size is not None and m.ffn is not None  # a resolved configuration
    heads = [Heads(m.heads, m.kv_heads, layout.tp, rank) for rank in range(layout.tp)]
    queries, key_values = ([getattr(each, part) for each in heads] for part in ("queries", "key_values"))
    sizes = {
        "tokens of a microbatch": _tokens(config),
        "hidden of a rank": partition.sizes(m.hidden, layout.tp_y),
        "queries of a rank": [(part.stop - part.start) * m.head_size for part in queries],
        "keys and values of a rank": [2 * (part.stop - part.start) * m.head_size for part in key_values],
        "ffn of a rank": partition.sizes(m.ffn, layout.tp) if not m.experts or m.experts_every > 1 else [],
    }
    odd = {name: sorted({number for number in found if number % MULTIPLE}) for name, found in sizes.items()}
    return [f"{name} ({' or '.join(map(str, numbers))})" for name, numbers in odd.items() if numbers]


def _tokens(config: Config) -> list[int]:
    """How many a linear meets at once; none if it is not known how many ranks there are."""
    layout = config.layout
    if layout.dp is None:
        return []
    ring = layout.cp // layout.ulysses
    lengths = {
        length
        for i in range(ring)
        for length in partition.sizes(len(partition.zigzag(config.model.sequence, ring, i)), layout.ulysses)
    }
    samples = {
        number
        for share in partition.sizes(config.train.batch, layout.dp * layout.tp_z)
        for number in partition.sizes(share, config.microbatches())
    }
    return [length * number for length in lengths for number in samples]
