"""What a checkpoint of a run holds: the model, the optimizer's moments, the tokenizer; and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, Slab
from ..errors import CheckpointError, InputError
from ..parallel.pieces import Piece
from .config import Config
from .engine import Engine

#: What decides the meaning of the weights; dropout and the like may change between runs.
_MODEL = (
    "style layers hidden heads kv_heads head_size ffn vocabulary sequence tied bias norm_epsilon rope_theta "
    "experts experts_every experts_per_token expert_ffn shared_experts router"
).split()


def tensors(engine: Engine) -> Iterator[tuple[str, Piece, Any]]:
    """(name in the checkpoint, piece of a parameter, this rank's flat array of it) for the weights and each state of
    the optimizer."""
    for bucket in engine.buckets.buckets:
        for piece in bucket.pieces():
            yield f"model/{piece.parameter.name}", piece, bucket.master[piece.place]
    for kind, piece, array in engine.optimizer.state():
        yield f"optimizer/{kind}/{piece.parameter.name}", piece, array


def save_slabs(engine: Engine, tokenizer: str) -> Iterator[Slab]:
    """What this rank writes: what it owns, the copies taking turns: all write, and nothing is written twice."""
    copies = {id(p): bucket.replicas for bucket in engine.buckets.buckets for p in bucket.parameters}
    for i, (name, piece, array) in enumerate(tensors(engine)):
        p = piece.parameter
        if i % copies[id(p)].size == copies[id(p)].rank:
            yield from (Slab(name, p.shape, index, part) for index, part in piece.cut(array, p.owned))
    if engine.mesh.rank == 0:
        text = np.frombuffer(tokenizer.encode(), np.uint8)
        yield Slab("tokenizer", text.shape, (slice(0, text.size),), text)


def load_slabs(engine: Engine) -> list[Slab]:
    """What this rank reads: all that it holds; ``Buckets.publish`` then makes weights to compute with of it."""
    return [
        Slab(name, piece.parameter.shape, index, part)
        for name, piece, array in tensors(engine)
        for index, part in piece.cut(array, piece.parameter.index)
    ]


def config_of(checkpoint: Checkpoint) -> Config:
    """The resolved configuration of the run that wrote a checkpoint. Raises CheckpointError if no run did."""
    try:
        return Config.from_dict(checkpoint.state["config"])
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(f"{checkpoint.path} holds no training run of this version: {error}") from None


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raise CheckpointError, naming every key that differs, unless the checkpoint holds this model, and the states of
    this optimizer (whose names alone do not tell: one's momentum is not another's)."""
    written = config_of(checkpoint)
    then = written.model.resolved()  # an older one lacks keys
    pairs = [(f"model.{key}", getattr(then, key), getattr(config.model, key)) for key in _MODEL]
    pairs.append(("optimizer.name", written.optimizer.name, config.optimizer.name))
    different = [f"{key} was {a!r}, now it is {b!r}" for key, a, b in pairs if a != b]
    if different:
        raise CheckpointError(f"{checkpoint.path} holds another run: {'; '.join(different)}")
