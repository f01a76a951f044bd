"""``layout.stages = "measured"``: how many blocks each virtual stage gets, by what they cost on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ..arrays import module_for, to_host
from ..comm.mesh import Mesh
from ..cursor import Place
from ..errors import InputError
from ..layers.loss import VocabularyParallelCrossEntropy
from ..layers.parallel import ModelParallel
from ..models.architecture import Architecture
from ..models.transformer import Stage, Wrap, build
from ..module import Module
from ..parallel.balance import balance
from ..wgrad import now
from .config import Config
from .toml import read_toml

_REPEATS = 5


class Costs(NamedTuple):
    """Seconds of a forward and backward: of every block; of what stands before the first; of what comes after the last,
    the loss included."""

    blocks: list[float]
    first: float
    last: float


def measured_stages(mesh: Mesh, stages: int, costs: Costs) -> str:
    """``layout.stages`` for ``stages`` virtual stages by the costs that rank 0 measured. Collective over the mesh."""
    mine = balance(costs.blocks, stages, costs.first, costs.last)
    return "+".join(map(str, mesh.gather_objects(mine)[0]))


def measured_before(config: Config, mesh: Mesh, path: Path | None) -> Config:
    """``config`` with the numbers of blocks in the resolved configuration ``path``, if ``layout.stages`` is "measured",
    and there is such a file, and its numbers fit: a run that is continued keeps the stages that it began with.

    Rank 0 reads. Collective over the mesh.
    """
    layout = config.layout
    if layout.stages == "measured" and mesh.rank == 0 and path is not None:
        with suppress(InputError):
            then = Config.from_dict(read_toml(path)).layout
            found = dataclasses.replace(layout, stages=then.stages)
            found.blocks(config.model.layers)
            if all(getattr(then, key) == getattr(layout, key) for key in ("pp", "schedule", "virtual")):
                layout = found
    stages = mesh.gather_objects(layout.stages)[0]
    return dataclasses.replace(config, layout=dataclasses.replace(config.layout, stages=stages))


def measure(
    a: Architecture,
    parallel: ModelParallel,
    samples: int,
    dtype: Any,
    device: str,
    wrap: Wrap | None = None,
    kind: Callable[[int], Hashable] = lambda block: None,
) -> Costs:
    """What this rank's share of the model costs for a microbatch of ``samples`` samples of full length.

    Each part is built, timed a few times after a warm-up, and freed; the median counts. Blocks of the same ``kind`` are
    timed once. wrap: what the layout makes of a block. Collective over the groups of ``parallel``.
    """
    cursor, xp = parallel.cursor, module_for(device)
    before = cursor.place
    cursor.place = Place(samples=np.arange(samples), length=a.sequence)
    loss = VocabularyParallelCrossEntropy(parallel, a.vocabulary)
    tokens = xp.asarray((np.arange(samples) + parallel.context()[:, None]) % a.vocabulary)
    hidden = parallel.tp_y.part(a.hidden)
    shape = len(parallel.positions()), samples, hidden.stop - hidden.start
    x = xp.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)

    def part(rank: int, block: int) -> Module:
        made = build(
            a, parallel, Stage(rank, 3, (block, 1, a.layers - block - 1) if rank == 1 else (0, a.layers, 0)), wrap=wrap
        )
        made.initialise(0, dtype, xp)
        return made

    def through(module: Module, into: Any) -> None:
        y, saved = module.forward(into)
        module.backward(y, saved, now)

    def to_loss(module: Module, into: Any) -> None:
        y, saved = module.forward(into)
        _, from_loss = loss.forward((y, tokens))
        module.backward(loss.backward(1.0, from_loss, now)[0], saved, now)

    kinds: dict[Hashable, float] = {}
    for i in range(a.layers):
        if kind(i) not in kinds:
            kinds[kind(i)] = _seconds(through, part(1, i), x, x)
    first, last = _seconds(through, part(0, 0), tokens, x), _seconds(to_loss, part(2, 0), x, x)
    cursor.place = before
    cursor.losses.clear()
    return Costs([kinds[kind(i)] for i in range(a.layers)], first, last)


def _seconds(run: Callable[[Module, Any], None], module: Module, into: Any, like: Any) -> float:
    """The median time of ``run``; copying a number of ``like`` to the host waits for a GPU to be done."""
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        run(module, into)
        to_host(like.reshape(-1)[:1])
        times.append(time.perf_counter() - start)
    return median(times[1:])
