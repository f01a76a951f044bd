"""Decoder-only transformers as compositions of layers: GPT-2 style and Llama style, cut into pipeline stages.

GPT-2 (Radford et al., 2019):   x + attention(layer_norm(x)), x + down(gelu(up(layer_norm(x)))), positions, biases
Llama (Touvron et al., 2023):   x + attention(rope, rms_norm(x)), x + down(swiglu(up(rms_norm(x)))), no biases
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import partition
from ..layers.activation import GELU, SwiGLU
from ..layers.attention import Rope, attention_core
from ..layers.dropout import Dropout
from ..layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from ..layers.heads import Heads
from ..layers.linear import ColumnParallelLinear, Output, ParallelHead, RowParallelLinear
from ..layers.mlp import fuse
from ..layers.moe import MixtureOfExperts
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.parallel import ModelParallel
from ..module import Module, Parameter, Residual, Sequential, normal
from .architecture import Architecture


@dataclass(frozen=True)
class Stage:
    """A part of the model: virtual stage ``rank`` of ``size``, in the order in which activations pass them.

    layers: how many blocks each stage has; as even as can be if it is not given. ends: whether the first and the last
    stage lie on different ranks, so that tied weights are copies.
    """

    rank: int = 0
    size: int = 1
    layers: tuple[int, ...] | None = None
    ends: bool | None = None

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether it holds the head and the loss."""
        return self.rank == self.size - 1

    @property
    def copies(self) -> bool:
        """Whether tied weights lie on two ranks."""
        return self.size > 1 if self.ends is None else self.ends

    def blocks(self, layers: int) -> range:
        """The blocks of the stage, of ``layers`` in all."""
        sizes = partition.sizes(layers, self.size) if self.layers is None else self.layers
        if len(sizes) != self.size or sum(sizes) != layers:
            raise ValueError(f"{sizes} does not share {layers} layers among {self.size} stages")
        return range(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))


Wrap = Callable[[Sequential, int], Module]


def build(
    a: Architecture,
    parallel: ModelParallel | None = None,
    stage: Stage | None = None,
    *,
    wrap: Wrap | None = None,
    table: Parameter | None = None,
) -> Sequential:
    """One stage of the model: tokens (first stage) or activations in, activations or logits (last stage) out.

    tokens (S, batch) integers; activations (s, batch, hidden); logits (S, batch, this rank's vocabulary rows).
    Parameters have the same names, shapes and initial values on every layout; they have no arrays yet (see
    ``Module.initialise``). wrap: what becomes of each block, and its number, such as its recomputation, in place of
    ``layers.mlp.fuse``. table: the embedding's table, where another stage on this rank has it already and weights are
    tied.
    """
    parallel, stage = parallel or ModelParallel(), stage or Stage()
    layers: dict[str, Module] = {}
    table = table or embedding_table(a, parallel, stage)
    if stage.first:
        layers["embedding"] = VocabularyParallelEmbedding(parallel, table)
        if a.style == "gpt":
            layers["positions"] = LearnedPositions(parallel, a.sequence, a.hidden, normal(a.init_std))
        layers["dropout"] = Dropout(parallel, a.hidden, a.dropout, "embedding/dropout")
    for i in stage.blocks(a.layers):
        made = block(a, parallel, f"blocks/{i}", experts=a.has_experts(i))
        layers[f"blocks/{i}"] = wrap(made, i) if wrap else fuse(made)
    if stage.last:
        layers["norm"] = _norm(a, parallel)
        layers["head"] = ParallelHead(parallel, table if a.tied else _table(a, parallel, "head/table"))
    return Sequential(**layers)


def build_stages(
    a: Architecture, parallel: ModelParallel, stages: Sequence[Stage], *, wrap: Wrap | None = None
) -> list[Sequential]:
    """The stages that one rank holds, of which the first and the last share a tied table if both are here."""
    shared = any(stage.first for stage in stages) and any(stage.last for stage in stages)
    table = embedding_table(a, parallel, stages[0]) if a.tied and shared else None
    return [build(a, parallel, stage, wrap=wrap, table=table) for stage in stages]


def block(a: Architecture, parallel: ModelParallel, name: str, *, experts: bool = False) -> Sequential:
    """One transformer block, (s, batch, hidden) -> (s, batch, hidden). ``name`` keys its dropout masks.

    experts: whether its MLP is a mixture of experts.
    """
    attention = _attention(a, parallel, f"{name}/attention")
    mlp = (_experts if experts else _mlp)(a, parallel, f"{name}/mlp")
    return Sequential(attention=Residual(**attention), mlp=Residual(**mlp))


def _attention(a: Architecture, parallel: ModelParallel, name: str) -> dict[str, Module]:
    heads = Heads(a.heads, a.kv_heads, parallel.tp.size, parallel.tp.rank)
    outputs = {
        "query": Output((a.heads, a.head_size), part=heads.queries),
        "key_value": Output(
            (a.kv_heads, 2, a.head_size), part=heads.key_values, owned=heads.owned, overlaps=heads.overlaps
        ),
    }
    layers: dict[str, Module] = {
        "norm": _norm(a, parallel),
        "qkv": ColumnParallelLinear(parallel, a.hidden, outputs, bias=a.bias, initial=normal(a.init_std)),
    }
    if a.style == "llama":
        layers["rope"] = Rope(parallel, a.head_size, a.rope_theta)
    layers["core"] = attention_core(heads, parallel, a.dropout, f"{name}/core")
    layers["out"] = RowParallelLinear(
        parallel, (a.heads, a.head_size), a.hidden, bias=a.bias, initial=normal(a.leaving_std)
    )
    layers["out"].input_stays = parallel.ulysses.size == 1  # attention keeps its result
    return layers | _dropout(a, parallel, name)


def _mlp(a: Architecture, parallel: ModelParallel, name: str) -> dict[str, Module]:
    up = Output((2, a.ffn), axis=1) if a.style == "llama" else Output((a.ffn,))
    return {
        "norm": _norm(a, parallel),
        "up": ColumnParallelLinear(parallel, a.hidden, {"weight": up}, bias=a.bias, initial=normal(a.init_std)),
        "activation": SwiGLU() if a.style == "llama" else GELU(),
        "down": RowParallelLinear(parallel, (a.ffn,), a.hidden, bias=a.bias, initial=normal(a.leaving_std)),
        **_dropout(a, parallel, name),
    }


def _experts(a: Architecture, parallel: ModelParallel, name: str) -> dict[str, Module]:
    """In the place of ``_mlp``."""
    mixture = MixtureOfExperts(
        parallel,
        a.hidden,
        a.expert_ffn,
        a.experts,
        a.experts_per_token,
        shared=a.shared_experts,
        gated=a.style == "llama",
        bias=a.bias,
        router=a.router,
        capacity=a.capacity,
        balance_loss=a.balance_loss,
        z_loss=a.z_loss,
        initial=normal(a.init_std),
        leaving=normal(a.leaving_std),
    )
    return {
        "norm": _norm(a, parallel),
        "mixture": mixture,
        **_dropout(a, parallel, name),
    }


def _dropout(a: Architecture, parallel: ModelParallel, name: str) -> dict[str, Module]:
    """None without a rate: the layer before then adds what a residual passes by."""
    return {"dropout": Dropout(parallel, a.hidden, a.dropout, f"{name}/dropout")} if a.dropout else {}


def _norm(a: Architecture, parallel: ModelParallel) -> Module:
    kind = RMSNorm if a.style == "llama" else LayerNorm
    return kind(parallel, a.hidden, a.norm_epsilon)


def embedding_table(a: Architecture, parallel: ModelParallel, stage: Stage) -> Parameter:
    """The (vocabulary, hidden) table of the embedding, and of the head where weights are tied.

    Tied weights live on both ends of the pipeline: the first stage owns them, and the gradients of the two copies owe
    each other a sum.
    """
    table = _table(a, parallel, "embedding/table")
    if a.tied and stage.copies:
        table.shared = ("ends",)
        if not stage.first:
            table.owned = tuple(slice(s.start, s.start) for s in table.owned)
    return table


def _table(a: Architecture, parallel: ModelParallel, name: str) -> Parameter:
    return parallel.sharded(a.vocabulary, a.hidden, axis=0, hidden=1, initial=normal(a.init_std), name=name)
