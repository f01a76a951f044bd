"""Which checkpoints of a run stay, and the removal of the others."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .agree import reason
from .directory import discard, inspect, pointed, scan
from .manifest import Manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when another one is saved.

    every: those of steps that are multiples of it stay for ever, and count for nothing else. newest: of the others so
    many that were saved last. best: of the others so many with the lowest ``held_out_loss`` in their state. Raises
    InputError for numbers that cannot be.
    """

    newest: int = 2
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        for key, value, least in (("keep", self.newest, 1), ("keep_every", self.every, 1), ("keep_best", self.best, 0)):
            if value is not None and value < least:
                raise InputError(f"{key}={value}: the least is {least}")

    @classmethod
    def of(cls, keep: Keep | int) -> Keep:
        """A number alone is that of the newest."""
        return keep if isinstance(keep, Keep) else cls(keep)


def prune(root: Path, keep: Keep, current: Path) -> None:
    """Remove what ``keep`` does not keep of the run that saved ``current``. What goes wrong is logged and ends nothing.

    ``current`` stays, and what ``latest`` names; so do the checkpoints of other runs (those with another ``run`` in
    their state), and those that are not complete.
    """
    try:
        for path in _superfluous(root, keep, current):
            discard(path)
    except Exception as error:  # whatever it is, the checkpoint is there
        _log.warning("cannot look for old checkpoints in %s: %s", root, reason(error))


def _superfluous(root: Path, keep: Keep, current: Path) -> list[Path]:
    def for_ever(step: int) -> bool:
        return keep.every is not None and step % keep.every == 0

    mine, _ = inspect(current)
    found = [] if for_ever(mine.step) else [(current, mine)]
    for path, entry in scan(root, lambda step: step != mine.step and not for_ever(step)):
        if isinstance(entry, Manifest) and entry.state.get("run") == mine.state.get("run"):
            found.append((path, entry))
    ranked = sorted((pair for pair in found if _loss(pair[1]) < math.inf), key=lambda pair: _loss(pair[1]))
    stay = {current, root / pointed(root)[0]}
    stay.update(path for path, _ in found[: keep.newest] + ranked[: keep.best])
    return [path for path, _ in found if path not in stay]


def _loss(found: Manifest) -> float:
    """The held-out loss in its state; infinite if there is none."""
    loss = found.state.get("held_out_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf
