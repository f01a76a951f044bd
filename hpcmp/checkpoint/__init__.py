"""Checkpoints: one logical view of every tensor in its global shape, saved and loaded by any number of ranks.

``save`` writes one, ``open_checkpoint`` finds and checks the newest, ``checkpoints`` lists all. What lies on disk is
described in docs/checkpoints.md.
"""

from .directory import checkpoints
from .load import Checkpoint, open_checkpoint
from .save import CheckpointSaveError, save
from .slab import Slab

__all__ = ["Checkpoint", "CheckpointSaveError", "Slab", "checkpoints", "open_checkpoint", "save"]
