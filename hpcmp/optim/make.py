"""The optimizer that a configuration names."""

from __future__ import annotations

from typing import Any

from ..offload import Host
from ..parallel.buckets import Buckets
from .adamw import AdamW
from .base import Optimizer
from .lamb import LAMB
from .muon import Muon
from .sgd import SGD

_CLASSES: dict[str, tuple[type[Optimizer], tuple[str, ...]]] = {
    "adamw": (AdamW, ("betas", "epsilon")),
    "sgd": (SGD, ("momentum",)),
    "lamb": (LAMB, ("betas", "epsilon")),
    "muon": (Muon, ("momentum", "betas", "epsilon")),
}


def make_optimizer(
    name: str, buckets: Buckets, *, weight_decay: float, clip: float | None, host: Host | None = None, **settings: Any
) -> Optimizer:
    """``adamw``, ``sgd``, ``lamb`` or ``muon`` with those of ``settings`` that it has a use for."""
    made, wanted = _CLASSES[name]
    return made(buckets, weight_decay=weight_decay, clip=clip, host=host, **{key: settings[key] for key in wanted})
