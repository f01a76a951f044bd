"""Checkpoints: one logical view of every tensor in its global shape, saved and loaded by any number of ranks.

``save`` writes one, ``open_checkpoint`` finds and checks one. What lies on disk is described in docs/checkpoints.md.
"""

from .load import Checkpoint, open_checkpoint
from .save import CheckpointSaveError, save
from .slab import Slab

__all__ = ["Checkpoint", "CheckpointSaveError", "Slab", "open_checkpoint", "save"]
