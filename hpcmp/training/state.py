"""What a checkpoint of a run holds: the model, the optimizer's moments, the tokenizer; and whether it fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, Slab, open_checkpoint
from ..checkpoint.agree import agreed
from ..errors import CheckpointError, InputError
from ..parallel.pieces import Piece
from .config import Config
from .engine import LAYERS, Engine

log = logging.getLogger("hpcmp")

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
    if engine.mesh[LAYERS].rank == 0:
        yield from _magnitudes(engine)
    if engine.mesh.rank == 0:
        text = np.frombuffer(tokenizer.encode(), np.uint8)
        yield Slab("tokenizer", text.shape, (slice(0, text.size),), text)


def load_slabs(engine: Engine, *, states: bool = True) -> list[Slab]:
    """What this rank reads: all that it holds, or the weights alone; ``Buckets.publish`` then makes weights to compute
    with of it."""
    return [
        Slab(name, piece.parameter.shape, index, part)
        for name, piece, array in tensors(engine)
        if states or name.startswith("model/")
        for index, part in piece.cut(array, piece.parameter.index)
    ]


def _magnitudes(engine: Engine) -> list[Slab]:
    """What the linears keep from step to step, the same on all ranks that share them."""
    return [
        Slab(name, array.shape, tuple(slice(0, n) for n in array.shape), array)
        for name, array in engine.parallel.products.state()
    ]


def resume(checkpoint: Checkpoint, engine: Engine, config: Config) -> None:
    """Give ``engine`` the weights, optimizer states and loss scale of a checkpoint of any layout and precision.

    Master weights and states are those that were saved, rounded only where float64 goes on in less. Those of another
    optimizer (see ``check_same_model``) are left out: the new one's begin at zero. A loss scale goes on from float16 to
    float16 alone: to others it says nothing. Collective. Raises CheckpointError, the same on every rank.
    """
    then = config_of(checkpoint)
    same = then.optimizer.name == config.optimizer.name
    magnitudes = _magnitudes(engine)
    complete = all(slab.name in checkpoint.tensors for slab in magnitudes)  # else written without delayed FP8
    checkpoint.load([*load_slabs(engine, states=same), *(magnitudes if complete else ())])
    engine.buckets.publish()
    engine.parallel.products.loaded(complete)
    if same:
        engine.optimizer.steps = checkpoint.state["optimizer_steps"]
    elif engine.mesh.rank == 0:
        names = checkpoint.path, then.optimizer.name, config.optimizer.name
        log.info("checkpoint.fresh_optimizer: %s holds states of %s; those of %s begin at zero", *names)
    if then.train.dtype == "float16" and "loss_scale" in checkpoint.state:  # else written before there was one
        engine.loss_scale.load(checkpoint.state["loss_scale"])


def begin_anew(engine: Engine) -> None:
    """Give ``engine`` the state of a run that has not begun, whatever was loaded into a part of it. Collective."""
    engine.buckets.initialise(engine.config.train.seed)
    engine.parallel.products.loaded(False)
    for _, _, array in engine.optimizer.state():
        array[...] = 0


def config_of(checkpoint: Checkpoint) -> Config:
    """The resolved configuration of the run that wrote a checkpoint. Raises CheckpointError if no run did."""
    try:
        return Config.from_dict(checkpoint.state["config"])
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(f"{checkpoint.path} holds no training run of this version: {error}") from None


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raise CheckpointError, naming every key that differs, unless the checkpoint holds this model, and the states of
    this optimizer (whose names alone do not tell: one's momentum is not another's) or ``checkpoint.fresh_optimizer``
    is set."""
    written = config_of(checkpoint)
    if "sampler" not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.path} holds a model and no run to go on with: checkpoint.initial takes it")
    different = _different(written, config, _MODEL)
    a, b = written.optimizer.name, config.optimizer.name
    if a != b and not config.checkpoint.fresh_optimizer:
        different.append(
            f"optimizer.name was {a!r}, now it is {b!r} (checkpoint.fresh_optimizer = true: its states begin at zero)"
        )
    if different:
        raise CheckpointError(f"{checkpoint.path} holds another run: {'; '.join(different)}")


def load_initial(path: str, engine: Engine, tokenizer: str) -> None:
    """Give ``engine`` the weights alone of the checkpoint at ``path``, of a run or of an imported model; the optimizer
    begins as in a new run. Collective. Raises CheckpointError, the same on every rank, unless it holds this model.

    tokenizer: the definition of that of the data; another one in the checkpoint is worth a warning.
    """
    config = engine.config
    try:
        checkpoint = open_checkpoint(path, engine.mesh)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.initial: {error}") from None
    with agreed(engine.mesh, lambda who, why: CheckpointError(why)):
        keys = [key for key in _MODEL if key != "sequence" or config.model.style == "gpt"]  # llama learns no positions
        if different := _different(config_of(checkpoint), config, keys):
            raise CheckpointError(f"checkpoint.initial: {checkpoint.path} holds another model: {'; '.join(different)}")
        strange = engine.mesh.rank == 0 and "tokenizer" in checkpoint.tensors
        strange = strange and checkpoint.read("tokenizer").tobytes() != tokenizer.encode()
    checkpoint.load(load_slabs(engine, states=False))
    engine.buckets.publish()
    if engine.mesh.rank == 0:
        log.info("checkpoint.initial: the weights are those of %s", checkpoint.path)
    if strange:
        log.warning("%s: its tokenizer is not that of the data: the same numbers stand for other text", checkpoint.path)


def _different(written: Config, config: Config, keys: Sequence[str]) -> list[str]:
    """The keys of the section ``model`` that differ, each with both values."""
    then = written.model.resolved()  # an older one lacks keys
    pairs = [(f"model.{key}", getattr(then, key), getattr(config.model, key)) for key in keys]
    return [f"{key} was {a!r}, now it is {b!r}" for key, a, b in pairs if a != b]
