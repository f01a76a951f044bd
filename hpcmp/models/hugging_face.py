"""Hugging Face's names for GPT-2 and Llama: which of their tensors holds what of ours, as arithmetic of axes.

A row of the tables below such as

    self_attn.k_proj.weight   (k d) h   attention/qkv/key_value: h k 0 d -> k d h

says: their tensor has the axes (k d), a product in C order, and h; in it lies, of our tensor of axes h, k, 2, d, what
is at 0 of the third, with its axes in the order k, d, h. A digit behind the arrow is likewise a place on an axis of
theirs, where several of ours share one of theirs. With no axes of its own, ours has theirs. Letters are those of
``sizes``. Nothing else happens to the numbers: rotary positions pair (x_i, x_{i + d/2}) there as here.

Sources: transformers, models/gpt2/modeling_gpt2.py (whose Conv1D keeps (in, out)) and models/llama/modeling_llama.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import InputError
from .architecture import Architecture

_GPT2 = """
wte.weight               v h         embedding/table
wpe.weight               s h         positions/weight
ln_f.weight              h           norm/weight
ln_f.bias                h           norm/bias
h.*.ln_1.weight          h           attention/norm/weight
h.*.ln_1.bias            h           attention/norm/bias
h.*.attn.c_attn.weight   h (3 n d)   attention/qkv/query: h n d -> h 0 n d
                                     attention/qkv/key_value: h n 0 d -> h 1 n d
                                     attention/qkv/key_value: h n 1 d -> h 2 n d
h.*.attn.c_attn.bias     (3 n d)     attention/qkv/query_bias: n d -> 0 n d
                                     attention/qkv/key_value_bias: n 0 d -> 1 n d
                                     attention/qkv/key_value_bias: n 1 d -> 2 n d
h.*.attn.c_proj.weight   (n d) h     attention/out/weight
h.*.attn.c_proj.bias     h           attention/out/bias
h.*.ln_2.weight          h           mlp/norm/weight
h.*.ln_2.bias            h           mlp/norm/bias
h.*.mlp.c_fc.weight      h f         mlp/up/weight
h.*.mlp.c_fc.bias        f           mlp/up/bias
h.*.mlp.c_proj.weight    f h         mlp/down/weight
h.*.mlp.c_proj.bias      h           mlp/down/bias
"""

_LLAMA = """
embed_tokens.weight                        v h       embedding/table
norm.weight                                h         norm/weight
layers.*.input_layernorm.weight            h         attention/norm/weight
layers.*.self_attn.q_proj.weight           (n d) h   attention/qkv/query: h n d -> n d h
layers.*.self_attn.k_proj.weight           (k d) h   attention/qkv/key_value: h k 0 d -> k d h
layers.*.self_attn.v_proj.weight           (k d) h   attention/qkv/key_value: h k 1 d -> k d h
layers.*.self_attn.o_proj.weight           h (n d)   attention/out/weight: n d h -> h n d
layers.*.post_attention_layernorm.weight   h         mlp/norm/weight
layers.*.mlp.gate_proj.weight              f h       mlp/up/weight: h 0 f -> f h
layers.*.mlp.up_proj.weight                f h       mlp/up/weight: h 1 f -> f h
layers.*.mlp.down_proj.weight              h f       mlp/down/weight: f h -> h f
"""

_LLAMA_BIASES = """
layers.*.self_attn.q_proj.bias   (n d)   attention/qkv/query_bias
layers.*.self_attn.k_proj.bias   (k d)   attention/qkv/key_value_bias: k 0 d -> k d
layers.*.self_attn.v_proj.bias   (k d)   attention/qkv/key_value_bias: k 1 d -> k d
layers.*.self_attn.o_proj.bias   h       attention/out/bias
layers.*.mlp.gate_proj.bias      f       mlp/up/bias: 0 f -> f
layers.*.mlp.up_proj.bias        f       mlp/up/bias: 1 f -> f
layers.*.mlp.down_proj.bias      h       mlp/down/bias
"""

_HEAD = "lm_head.weight"

#: Their tensors that hold nothing of the model: masks and frequencies, which older files have.
_CONSTANTS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class Part:
    """What of a tensor of ours lies in one of theirs: the axes of both by letters, digits for places on an axis."""

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One of their tensors: its shape, that with its products of axes taken apart, and the parts, which tile it."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    parts: tuple[Part, ...]


def tensors(a: Architecture) -> Iterator[Tensor]:
    """Their tensors of a model. Raises InputError, naming the key, if they cannot hold it."""
    check(a)
    numbers = sizes(a)
    prefix, table = ("transformer.", _GPT2) if a.style == "gpt" else ("model.", _LLAMA + _LLAMA_BIASES * a.bias)
    rows = list(_rows(table))
    for name, axes, parts in rows:
        if "*" not in name:
            yield _tensor(prefix + name, axes, parts, "", numbers)
    for i in range(a.layers):
        for name, axes, parts in rows:
            if "*" in name:
                yield _tensor(prefix + name.replace("*", str(i)), axes, parts, f"blocks/{i}/", numbers)
    if not a.tied:
        yield _tensor(_HEAD, "v h", ["head/table"], "", numbers)


def ours(a: Architecture) -> dict[str, tuple[tuple[int, ...], list[tuple[Tensor, Part]]]]:
    """Our tensors of a model: name -> its shape, and the parts of theirs that tile it. Raises as ``tensors`` does."""
    held: dict[str, list[tuple[Tensor, Part]]] = {}
    for tensor in tensors(a):
        for part in tensor.parts:
            held.setdefault(part.name, []).append((tensor, part))
    numbers = sizes(a)
    found: dict[str, tuple[tuple[int, ...], list[tuple[Tensor, Part]]]] = {}
    for name, parts in held.items():
        columns = zip(*(part.ours for _, part in parts), strict=True)
        shape = (numbers.get(axes[0]) or 1 + max(map(int, axes)) for axes in columns)
        found[name] = tuple(shape), parts
    return found


def sizes(a: Architecture) -> dict[str, int]:
    """What the letters stand for: vocabulary, sequence, hidden, heads (n), key-value heads, head_size (d), ffn."""
    values = a.vocabulary, a.sequence, a.hidden, a.heads, a.kv_heads, a.head_size, a.ffn
    return dict(zip("vshnkdf", values, strict=True))


def find(name: str, names: Collection[str]) -> str:
    """Their tensor ``name`` as it is called among ``names``: a model saved without its head has no prefix."""
    bare = re.sub(r"^(transformer|model)\.", "", name)
    return bare if name not in names and bare in names else name


def is_weight(name: str, a: Architecture) -> bool:
    """Whether a tensor of that name in their files is a weight: not a constant, nor a copy of the tied table."""
    return not _CONSTANTS.fullmatch(name) and not (a.tied and name == _HEAD)


def check(a: Architecture) -> None:
    """Raise InputError, naming the key, unless their GPT-2 or Llama can be the model."""
    wrong = {"model.experts": f"{a.experts}, where there can be none"} if a.experts else {}
    if a.style == "gpt":
        if not a.bias:
            wrong["model.bias"] = "false, where there must be biases"
        if a.kv_heads != a.heads:
            wrong["model.kv_heads"] = f"{a.kv_heads}, where there must be as many as heads, {a.heads}"
        if a.heads * a.head_size != a.hidden:
            wrong["model.head_size"] = f"{a.head_size}, where it must be hidden / heads = {a.hidden} / {a.heads}"
    for key, why in wrong.items():
        raise InputError(f"{key} = {why}, in the {'GPT-2' if a.style == 'gpt' else 'Llama'} of Hugging Face")


def _rows(table: str) -> Iterator[tuple[str, str, list[str]]]:
    """(name, axes, parts) of each row of a table; a line without a name has one more part of the row before it."""
    for row in re.split(r"\n+(?=\S)", table.strip()):
        name, axes, *parts = re.split(r"\n? {2,}", row)
        yield name, axes, parts


def _tensor(name: str, axes: str, parts: list[str], block: str, numbers: dict[str, int]) -> Tensor:
    groups = [re.findall(r"\w", group) for group in re.findall(r"\([^)]*\)|\w", axes)]
    lengths = [[int(axis) if axis.isdigit() else numbers[axis] for axis in group] for group in groups]
    split = tuple(axis for group in groups for axis in group)
    view = tuple(length for group in lengths for length in group)
    return Tensor(name, tuple(map(math.prod, lengths)), view, tuple(_part(part, split, block) for part in parts))


def _part(text: str, axes: tuple[str, ...], block: str) -> Part:
    name, _, arrow = text.partition(": ")
    ours, _, theirs = arrow.partition(" -> ")
    return Part(block + name, tuple(ours.split()) or axes, tuple(theirs.split()) or axes)
