"""What a checkpoint of a run holds: the model, the optimizer's moments, the tokenizer; and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, Slab
from ..errors import CheckpointError, InputError
from ..module import Parameter
from .config import Config
from .engine import Engine

#: What decides the meaning of the weights; dropout and the like may change between runs.
_MODEL = (
    "style layers hidden heads kv_heads head_size ffn vocabulary sequence tied bias norm_epsilon rope_theta".split()
)


def tensors(engine: Engine) -> Iterator[tuple[str, Parameter, Any]]:
    """(name in the checkpoint, parameter, this rank's array) for the weights and each moment."""
    for p in engine.buckets.parameters:
        yield f"model/{p.name}", p, p.data
    for kind, p, array in engine.optimizer.state():
        yield f"optimizer/{kind}/{p.name}", p, array


def save_slabs(engine: Engine, tokenizer: str) -> Iterator[Slab]:
    """What this rank writes: what it owns, the replicas taking turns: all write, and nothing is written twice."""
    dp = engine.mesh["dp"]
    for i, (name, p, array) in enumerate(tensors(engine)):
        if i % dp.size == dp.rank and math.prod(s.stop - s.start for s in p.owned):
            yield Slab(name, p.shape, p.owned, array[p.owned_local])
    if engine.mesh.rank == 0:
        text = np.frombuffer(tokenizer.encode(), np.uint8)
        yield Slab("tokenizer", text.shape, (slice(0, text.size),), text)


def load_slabs(engine: Engine) -> list[Slab]:
    """What this rank reads: all that it holds."""
    return [Slab(name, p.shape, p.index, array) for name, p, array in tensors(engine)]


def config_of(checkpoint: Checkpoint) -> Config:
    """The resolved configuration of the run that wrote a checkpoint. Raises CheckpointError if no run did."""
    try:
        return Config.from_dict(checkpoint.state["config"])
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(f"{checkpoint.path} holds no training run of this version: {error}") from None


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raise CheckpointError, naming every key that differs, unless the checkpoint holds this model."""
    then, now = config_of(checkpoint).model, config.model
    pairs = [(key, getattr(then, key), getattr(now, key)) for key in _MODEL]
    different = [f"model.{key} was {a!r}, now it is {b!r}" for key, a, b in pairs if a != b]
    if different:
        raise CheckpointError(f"{checkpoint.path} holds another model: {'; '.join(different)}")
