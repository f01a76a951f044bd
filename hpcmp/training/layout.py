"""The layout of a run over ranks: its section of the configuration, the check against the ranks, the short form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from .schema import POSITIVE, SIZE, Section, checked, derived, fill, nearest, option
from .toml import literal


@dataclass(frozen=True)
class Layout(Section):
    """How the model and the batch are spread over ranks: dp x pp x tp ranks. It never changes the mathematics."""

    dp: int = derived("ranks / (pp tp)", "data-parallel replicas", SIZE)
    pp: int = option(1, "pipeline stages", SIZE)
    tp: int = option(1, "ranks that share each layer (tensor parallelism)", SIZE)
    sequence_parallel: bool = derived("true when tp > 1", "share the sequence between the layers' sharded parts too")
    schedule: Literal["1f1b", "gpipe", "zb-h1"] = option("1f1b", "order of a stage's work on microbatches")
    recompute: bool = option(False, "keep each block's input alone and run its forward pass again in the backward pass")
    bucket_mb: float = option(4.0, "gradients summed over replicas in one message, in MB", POSITIVE)

    @property
    def ranks(self) -> int:
        """How many ranks the layout needs: exactly so many when ``dp`` is given, else any multiple."""
        return (self.dp or 1) * self.pp * self.tp

    def resolved(self, ranks: int | None = None) -> Layout:
        """With derived values filled in; ``dp`` only if the number of ranks is known."""
        layout: Layout = fill(self, sequence_parallel=self.tp > 1)
        return layout if ranks is None else check_layout(layout, ranks)


def check_layout(layout: Layout, ranks: int) -> Layout:
    """``layout`` with ``dp`` filled in for ``ranks`` ranks. Raises InputError, with what would fit, if it cannot be."""
    inner = layout.pp * layout.tp
    if layout.dp is None and ranks % inner == 0:
        return dataclasses.replace(layout, dp=ranks // inner)
    if layout.dp is not None and layout.ranks == ranks:
        return layout
    if layout.dp is None:
        problem = f"layout.tp x layout.pp = {inner} does not divide the {ranks} ranks"
    else:
        problem = f"layout.dp x layout.pp x layout.tp = {layout.ranks}, and there are {ranks} ranks"
    raise InputError(f"{problem}; {' or '.join(_fitting(layout, ranks))} would fit")


def _fitting(layout: Layout, ranks: int) -> list[str]:
    """Up to three layouts of ``ranks`` ranks, the nearest to ``layout`` first."""
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    fits = [(tp, pp) for tp in divisors for pp in divisors if ranks % (tp * pp) == 0]
    fits.sort(key=lambda fit: abs(math.log(fit[0] / layout.tp)) + abs(math.log(fit[1] / layout.pp)))
    dp = "" if layout.dp is None else "dp={},"
    return [dp.format(ranks // (tp * pp)) + f"tp={tp},pp={pp}" for tp, pp in fits[:3]]


_KEYS = {
    "dp": "dp",
    "pp": "pp",
    "tp": "tp",
    "sp": "sequence_parallel",
    "schedule": "schedule",
    "recompute": "recompute",
}


def parse_layout(text: str, base: Layout) -> Layout:
    """The layout that ``text`` names; what else there is in a Layout is ``base``'s.

    Keys: dp (what is left of the ranks if not named), pp and tp (1 if not named), sp (0 or 1), schedule, recompute
    (0 or 1), and micro, which is no part of a Layout and is taken by ``config.with_layout``. Example:
    "tp=2,pp=2,sp=1,schedule=zb-h1,micro=3". Raises InputError naming the key.
    """
    return read_layout(text, base)[0]


def read_layout(text: str, base: Layout) -> tuple[Layout, int | None]:
    """The layout that ``text`` names (see ``parse_layout``), and the value of ``micro`` in it."""
    changes: dict[str, Any] = {"dp": None, "pp": 1, "tp": 1}
    micro = None
    for item in text.split(","):
        name, _, word = (part.strip() for part in item.partition("="))
        value: Any = int(word) if word.isascii() and word.isdigit() else word
        try:
            if name == "micro":
                if not isinstance(value, int) or value < 1:
                    raise InputError(f"micro: expected an integer of at least 1, found {literal(value)}")
                micro = value
            elif name in _KEYS:
                if name in ("sp", "recompute"):
                    value = {0: False, 1: True}.get(value, value)
                changes[_KEYS[name]] = checked(Layout, _KEYS[name], value)
            else:
                raise InputError(f"unknown key {name!r}" + nearest(name, [*_KEYS, "micro"]))
        except InputError as error:
            raise InputError(f"--layout {text}: {error}") from None
    return dataclasses.replace(base, **changes), micro
