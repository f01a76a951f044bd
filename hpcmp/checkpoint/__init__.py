"""Checkpoints: one logical view of every tensor in its global shape, saved and loaded by any number of ranks.

``save`` writes one, ``open_checkpoint`` finds and checks the newest, ``checkpoints`` lists all. What lies on disk is
described in docs/checkpoints.md.
"""

from .directory import checkpoints
from .load import Checkpoint, open_checkpoint
from .lock import Lock
from .repack import repack
from .retention import Keep
from .save import CheckpointSaveError, Saved, Saver, save
from .slab import Slab
from .storage import Storage

__all__ = [
    "Checkpoint",
    "CheckpointSaveError",
    "Keep",
    "Lock",
    "Saved",
    "Saver",
    "Slab",
    "Storage",
    "checkpoints",
    "open_checkpoint",
    "repack",
    "save",
]
