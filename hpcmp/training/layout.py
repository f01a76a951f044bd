"""The layout of a run over ranks: its section of the configuration, the check against the ranks, the short form."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from .. import partition
from ..comm.fit import check_cuts, divisors
from ..errors import InputError
from ..parallel.schedules import Schedule, make_schedule
from .schema import POSITIVE, SIZE, Section, checked, derived, fill, nearest, option
from .toml import literal


@dataclass(frozen=True)
class Layout(Section):
    """How the model and the batch are spread over dp x pp x cp x tp_z x tp_y x tp ranks. It never changes the
    mathematics."""

    dp: int = derived("ranks / the others", "data-parallel replicas", SIZE)
    pp: int = option(1, "pipeline stages", SIZE)
    cp: int = option(1, "ranks that share each sequence (context parallelism)", SIZE)
    tp: int = option(1, "ranks that share each layer (tensor parallelism)", SIZE)
    tp_y: int = option(1, "3-D tensor parallelism: ranks that share the inner axis of each weight", SIZE)
    tp_z: int = option(1, "3-D tensor parallelism: ranks that share samples and weights (`zero` = 3)", SIZE)
    ep: int = option(1, "ranks, of dp x cp x tp_z, that share the experts (expert parallelism)", SIZE)
    ulysses: int = option(1, "ranks, of cp, that exchange heads for positions; the others form a ring", SIZE)
    sequence_parallel: bool = derived("true when tp > 1", "share the sequence between the layers' sharded parts too")
    schedule: str = option(
        "1f1b", "order of work: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, or `file:PATH` (docs/schedules.md)"
    )
    virtual: int = option(1, "virtual stages of each pipeline rank, for `interleaved`", SIZE)
    stages: str = option("even", 'blocks of each virtual stage: `even`, `measured`, or numbers such as "3+2+2"')
    zero: int = option(0, "shard over dp x cp: 1 optimizer states, 2 gradients too, 3 weights too", "[0, 3]")
    zero_group: int = derived("dp x cp", "ranks that share what `zero` shards; copies of it lie on the others", SIZE)
    recompute: Literal["none", "full", "attention", "activations"] = option(
        "none", "what the backward pass makes again: blocks, attention alone, or norms and activations"
    )
    recompute_every: int = option(1, "recompute in one block of so many", SIZE)
    offload: Literal["none", "activations", "optimizer", "both"] = option("none", "what waits in the host's memory")
    bucket_mb: float = option(4.0, "gradients summed over replicas in one message, in MB", POSITIVE)

    @property
    def inner(self) -> int:
        """The ranks of one replica."""
        return self.pp * self.cp * self.tp_z * self.tp_y * self.tp

    @property
    def ranks(self) -> int:
        """How many ranks the layout needs: exactly so many when ``dp`` is given, else any multiple."""
        return (self.dp or 1) * self.inner

    @property
    def data(self) -> int:
        """The ranks over which weights are copied, or sharded by ZeRO."""
        return (self.dp or 1) * self.cp * self.tp_z

    @property
    def shard(self) -> int:
        """The ranks that share what ZeRO shards: 1 without it."""
        return (self.zero_group or self.data) if self.zero else 1

    def pipeline(self) -> Schedule:
        """The schedule of ``pp`` ranks. Raises InputError if there is none such."""
        try:
            made = make_schedule(self.schedule, self.virtual)
            made(0, self.pp, 0)  # that of a file is for one number of ranks
        except InputError as error:
            raise InputError(f"layout.schedule: {error}") from None
        return made

    def blocks(self, layers: int) -> tuple[int, ...]:
        """How many of ``layers`` blocks each virtual stage has; as even as can be unless ``stages`` gives numbers.

        Raises InputError if those are not one a virtual stage, or do not sum to ``layers``.
        """
        stages = self.pipeline().stages(self.pp)
        if self.stages in ("even", "measured"):
            return tuple(partition.sizes(layers, stages))
        words = self.stages.split("+")
        if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
            raise InputError(f'layout.stages = "{self.stages}": expected even, measured, or numbers such as "3+2+2"')
        sizes = tuple(int(word) for word in words)
        if len(sizes) != stages or sum(sizes) != layers:
            raise InputError(
                f'layout.stages = "{self.stages}" are {len(sizes)} stages of {sum(sizes)} blocks in all; there are '
                f"{stages} virtual stages and model.layers = {layers}"
            )
        return sizes

    def resolved(self, ranks: int | None = None) -> Layout:
        """With derived values filled in; ``dp`` only if the number of ranks is known. Raises InputError."""
        self.pipeline()
        layout: Layout = fill(self, sequence_parallel=self.tp > 1)
        if self.tp_z > 1:
            layout = _with_z(layout)
        layout = layout if ranks is None else check_layout(layout, ranks)
        known = layout.dp is not None
        check_cuts(
            **{axis: getattr(layout, axis) or 1 for axis in ("dp", "cp", "tp_z", "ulysses")},
            ep=layout.ep if known else 1,
            shard=layout.shard if known else 1,
        )
        return layout


def _with_z(layout: Layout) -> Layout:
    """The z of a 3-D grid: each rank of tp_z holds a part of the weights and takes other samples, which is ``zero`` = 3
    over tp_z (or more ranks). Raises InputError for another ``zero``."""
    if layout.zero not in (0, 3):
        raise InputError(f"layout.zero = {layout.zero}: layout.tp_z = {layout.tp_z} shares the weights; 3 would fit")
    if (layout.zero_group or layout.tp_z) % layout.tp_z:
        raise InputError(
            f"layout.zero_group = {layout.zero_group} is no multiple of layout.tp_z = {layout.tp_z}, whose ranks share"
            f" the weights; {layout.tp_z} would fit"
        )
    return dataclasses.replace(layout, zero=3, zero_group=layout.zero_group or layout.tp_z)


def check_layout(layout: Layout, ranks: int) -> Layout:
    """``layout`` with ``dp`` filled in for ``ranks`` ranks. Raises InputError, with what would fit, if it cannot be."""
    inner = layout.inner
    if layout.dp is None and ranks % inner == 0:
        return dataclasses.replace(layout, dp=ranks // inner)
    if layout.dp is not None and layout.ranks == ranks:
        return layout
    used = [axis for axis in ("pp", "cp", "tp_z", "tp_y", "tp") if getattr(layout, axis) > 1 or axis in ("pp", "tp")]
    product = " x ".join(f"layout.{axis}" for axis in reversed(used))
    if layout.dp is None:
        problem = f"{product} = {inner} does not divide the {ranks} ranks"
    else:
        problem = f"layout.dp x {product} = {layout.ranks}, and there are {ranks} ranks"
    fits = " or ".join(_fitting(layout, ranks)) or "nothing with this layout.schedule and layout.stages"
    raise InputError(f"{problem}; {fits} would fit")


def _fitting(layout: Layout, ranks: int) -> list[str]:
    """Up to three layouts of ``ranks`` ranks, the nearest to ``layout`` first, as ``--layout`` takes them. Of the axes
    beyond pp and tp as much is kept as divides the ranks; what is named is named because ``layout`` has it too."""
    kept: dict[str, Any] = {}
    left = ranks
    for axis in ("cp", "tp_z", "tp_y"):
        kept[axis] = math.gcd(getattr(layout, axis), left)
        left //= kept[axis]
    pairs = [(tp, pp) for tp in divisors(left) for pp in divisors(left // tp)]
    pairs.sort(key=lambda pair: abs(math.log(pair[0] / layout.tp)) + abs(math.log(pair[1] / layout.pp)))
    fits = (dataclasses.replace(layout, dp=left // (tp * pp), tp=tp, pp=pp, **kept) for tp, pp in pairs)
    return [_in_words(layout, fit) for fit in itertools.islice(filter(_runs, fits), 3)]


def _runs(layout: Layout) -> bool:
    """Whether there is such a schedule, and ``stages``, where it is numbers, has one for each virtual stage."""
    try:
        stages = layout.pipeline().stages(layout.pp)
    except InputError:
        return False
    return layout.stages in ("even", "measured") or layout.stages.count("+") + 1 == stages


def _in_words(layout: Layout, fit: Layout) -> str:
    """The axes of ``fit``, with the nearest cuts of them that are possible, as far as ``layout`` has them."""
    ep = _nearest(layout.ep, divisors(fit.data))
    groups = [n for n in divisors(fit.data) if n % fit.tp_z == 0 and (n % ep == 0 or ep % n == 0)]
    named = {"dp": fit.dp} if layout.dp else {}
    named |= {"tp": fit.tp, "pp": fit.pp}
    named |= {axis: getattr(fit, axis) for axis in ("cp", "tp_z", "tp_y") if getattr(layout, axis) > 1}
    named |= {"ulysses": _nearest(layout.ulysses, divisors(fit.cp))} if layout.ulysses > 1 else {}
    named |= {"ep": ep} if layout.ep > 1 else {}
    named |= {"zero_group": _nearest(layout.zero_group, groups)} if layout.zero and layout.zero_group else {}
    return ",".join(f"{key}={n}" for key, n in named.items())


def _nearest(value: int, fits: list[int]) -> int:
    return min(fits, key=lambda n: abs(math.log(n / value)))


#: The axes, which ``--layout`` sets to 1 where it does not name them (dp: to what is left of the ranks).
_AXES = ("dp", "pp", "cp", "tp", "tp_y", "tp_z", "ep", "ulysses")
_KEYS = {key: key for key in _AXES} | {
    "sp": "sequence_parallel",
    **{key: key for key in ("schedule", "virtual", "stages", "zero", "zero_group")},
    **{key: key for key in ("recompute", "recompute_every", "offload")},
}


def parse_layout(text: str, base: Layout) -> Layout:
    """The layout that ``text`` names; what else there is in a Layout is ``base``'s.

    Keys: dp (what is left of the ranks if not named), pp, cp, tp, tp_y, tp_z, ep and ulysses (1 if not named), sp (0 or
    1), every other key of a Layout but bucket_mb, and micro, which is no part of a Layout and is taken by
    ``config.with_layout``. Example: "tp=2,pp=2,sp=1,schedule=zb-h1,micro=3". Raises InputError naming the key.
    """
    return read_layout(text, base)[0]


def read_layout(text: str, base: Layout) -> tuple[Layout, int | None]:
    """The layout that ``text`` names (see ``parse_layout``), and the value of ``micro`` in it."""
    changes: dict[str, Any] = dict.fromkeys(_AXES, 1) | {"dp": None}
    micro = None
    for item in text.split(","):
        name, _, word = (part.strip() for part in item.partition("="))
        value: Any = int(word) if word.isascii() and word.isdigit() and name != "stages" else word
        try:
            if name == "micro":
                if not isinstance(value, int) or value < 1:
                    raise InputError(f"micro: expected an integer of at least 1, found {literal(value)}")
                micro = value
            elif name in _KEYS:
                if name == "sp":
                    value = {0: False, 1: True}.get(value, value)
                changes[_KEYS[name]] = checked(Layout, _KEYS[name], value)
            else:
                raise InputError(f"unknown key {name!r}" + nearest(name, [*_KEYS, "micro"]))
        except InputError as error:
            raise InputError(f"--layout {text}: {error}") from None
    return dataclasses.replace(base, **changes), micro


def short(layout: Layout) -> str:
    """A layout as ``--layout`` takes it."""
    default, text = Layout(), f"dp={layout.dp or 1},pp={layout.pp},tp={layout.tp}"
    for key, name in _KEYS.items():
        value = getattr(layout, name)
        said = value not in (None, False, getattr(default, name))
        said = said or {"sp": layout.tp, "schedule": layout.pp}.get(key, 1) > 1
        if said and key not in ("dp", "pp", "tp"):
            text += f",{key}={int(value) if isinstance(value, bool) else value}"
    return text
