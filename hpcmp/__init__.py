"""hpcmp: train and run transformers too large for one device, as a batch job under mpirun or srun.

The names below are loaded when they are first used: ``import hpcmp`` itself imports neither MPI nor HDF5 nor CuPy.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import open_checkpoint as open_checkpoint
    from .comm.mesh import Mesh as Mesh
    from .module import Module as Module
    from .module import Parameter as Parameter
    from .module import Recompute as Recompute
    from .module import Residual as Residual
    from .module import Sequential as Sequential
    from .traced import Traced as Traced
    from .training.config import Config as Config
    from .training.config import load_config as load_config
    from .training.generate import Generator as Generator
    from .training.recovery import Recovery as Recovery
    from .training.trainer import Trainer as Trainer

_PLACES = {
    "open_checkpoint": "checkpoint",
    "Mesh": "comm.mesh",
    "Module": "module",
    "Parameter": "module",
    "Recompute": "module",
    "Residual": "module",
    "Sequential": "module",
    "Traced": "traced",
    "Config": "training.config",
    "load_config": "training.config",
    "Generator": "training.generate",
    "Recovery": "training.recovery",
    "Trainer": "training.trainer",
}
__all__ = ["__version__", *_PLACES]

logging.getLogger("hpcmp").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hpcmp' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
