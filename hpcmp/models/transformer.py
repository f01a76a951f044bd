"""Decoder-only transformers as compositions of layers: GPT-2 style and Llama style, cut into pipeline stages.

GPT-2 (Radford et al., 2019):   x + attention(layer_norm(x)), x + down(gelu(up(layer_norm(x)))), positions, biases
Llama (Touvron et al., 2023):   x + attention(rope, rms_norm(x)), x + down(swiglu(up(rms_norm(x)))), no biases
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import partition
from ..layers.activation import GELU, SwiGLU
from ..layers.attention import CausalAttention, Heads, Rope
from ..layers.dropout import Dropout
from ..layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from ..layers.linear import ColumnParallelLinear, Output, ParallelHead, RowParallelLinear
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.parallel import ModelParallel
from ..module import Module, Parameter, Recompute, Residual, Sequential, normal


@dataclass(frozen=True)
class Architecture:
    """What fixes the mathematics of a model; nothing here depends on the layout."""

    style: str  # "gpt" or "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    sequence: int  # the longest sequence
    dropout: float = 0.0
    tied: bool = True
    bias: bool = True
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        heads, d, h = self.heads + 2 * self.kv_heads, self.head_size, self.hidden
        up = self.ffn * (2 if self.style == "llama" else 1)
        norm = h * (2 if self.style == "gpt" else 1)
        block = h * heads * d + self.heads * d * h + h * up + self.ffn * h + 2 * norm
        if self.bias:
            block += heads * d + h + up + h
        positions = self.sequence * h if self.style == "gpt" else 0
        return self.layers * block + norm + positions + self.vocabulary * h * (1 if self.tied else 2)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a forward and backward, a token: 6 a weight that is multiplied, and attention.

        Causal attention over ``length`` positions costs 6 layers * heads * head_size * length (half of the square).
        Counted as in Narayanan et al., "Efficient large-scale language model training", SC 2021, appendix.
        """
        lookups = (self.sequence * self.hidden if self.style == "gpt" else 0) + (
            0 if self.tied else self.vocabulary * self.hidden
        )
        return 6.0 * (self.parameters - lookups) + 6.0 * self.layers * self.heads * self.head_size * length


@dataclass(frozen=True)
class Stage:
    """Which part of the model a pipeline rank holds: stage ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether it holds the head and the loss."""
        return self.rank == self.size - 1


def build(
    a: Architecture, parallel: ModelParallel | None = None, stage: Stage | None = None, *, recompute: bool = False
) -> Sequential:
    """One stage of the model: tokens (first stage) or activations in, activations or logits (last stage) out.

    tokens (S, batch) integers; activations (s, batch, hidden); logits (S, batch, this rank's vocabulary rows). Layers
    are shared by the stages as evenly as can be, the first ones having one more. Parameters have the same names, shapes
    and initial values on every layout; they have no arrays yet (see ``Module.initialise``).
    """
    parallel, stage = parallel or ModelParallel(), stage or Stage()
    layers: dict[str, Module] = {}
    table = _table(a, parallel, stage, "embedding/table")
    if stage.first:
        layers["embedding"] = VocabularyParallelEmbedding(parallel, table)
        if a.style == "gpt":
            layers["positions"] = LearnedPositions(parallel, a.sequence, a.hidden, normal(a.init_std))
        layers["dropout"] = Dropout(parallel, a.dropout, "embedding/dropout")
    here = partition.part(a.layers, stage.size, stage.rank)
    for i in range(here.start, here.stop):
        made = block(a, parallel, f"blocks/{i}")
        layers[f"blocks/{i}"] = Recompute(made) if recompute else made
    if stage.last:
        layers["norm"] = _norm(a, parallel)
        layers["head"] = ParallelHead(parallel, table if a.tied else _table(a, parallel, stage, "head/table"))
    return Sequential(**layers)


def block(a: Architecture, parallel: ModelParallel, name: str) -> Sequential:
    """One transformer block, (s, batch, hidden) -> (s, batch, hidden). ``name`` keys its dropout masks."""
    heads = Heads(a.heads, a.kv_heads, parallel.tp.size, parallel.tp.rank)
    outputs = {
        "query": Output((a.heads, a.head_size), part=heads.queries),
        "key_value": Output(
            (a.kv_heads, 2, a.head_size), part=heads.key_values, owned=heads.owned, overlaps=heads.overlaps
        ),
    }
    initial, leaving = normal(a.init_std), normal(a.init_std / (2 * a.layers) ** 0.5)
    attention: dict[str, Module] = {
        "norm": _norm(a, parallel),
        "qkv": ColumnParallelLinear(parallel, a.hidden, outputs, bias=a.bias, initial=initial),
    }
    if a.style == "llama":
        attention["rope"] = Rope(a.head_size, a.rope_theta)
    attention["core"] = CausalAttention(heads, parallel.cursor, a.dropout, f"{name}/attention/core")
    attention["out"] = RowParallelLinear(parallel, (a.heads, a.head_size), a.hidden, bias=a.bias, initial=leaving)
    attention["dropout"] = Dropout(parallel, a.dropout, f"{name}/attention/dropout")
    up = Output((2, a.ffn), axis=1) if a.style == "llama" else Output((a.ffn,))
    mlp: dict[str, Module] = {
        "norm": _norm(a, parallel),
        "up": ColumnParallelLinear(parallel, a.hidden, {"weight": up}, bias=a.bias, initial=initial),
        "activation": SwiGLU() if a.style == "llama" else GELU(),
        "down": RowParallelLinear(parallel, (a.ffn,), a.hidden, bias=a.bias, initial=leaving),
        "dropout": Dropout(parallel, a.dropout, f"{name}/mlp/dropout"),
    }
    return Sequential(attention=Residual(**attention), mlp=Residual(**mlp))


def _norm(a: Architecture, parallel: ModelParallel) -> Module:
    kind = RMSNorm if a.style == "llama" else LayerNorm
    return kind(parallel, a.hidden, a.norm_epsilon)


def _table(a: Architecture, parallel: ModelParallel, stage: Stage, name: str) -> Parameter:
    """A (vocabulary, hidden) table. Tied weights live on both ends of the pipeline: the first stage owns them, and the
    gradients of the two copies owe each other a sum."""
    table = parallel.sharded(a.vocabulary, a.hidden, axis=0, initial=normal(a.init_std), name=name)
    if a.tied and stage.size > 1:
        table.shared = ("ends",)
        if not stage.first:
            table.owned = tuple(slice(s.start, s.start) for s in table.owned)
    return table
