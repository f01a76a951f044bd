"""Proof that a layout gives the serial model's numbers: loss, gradient norm, every gradient and every weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import random
from ..arrays import to_host
from ..comm.mesh import Mesh
from ..data.loader import Batches
from ..data.sampler import Sampler
from ..data.tokens import TokenFile
from ..errors import InputError
from ..module import Index
from ..parallel.bucket import Bucket
from ..parallel.pieces import Piece
from .config import Config, Layout
from .engine import Engine, Result, mesh_for
from .layout import short as short

if TYPE_CHECKING:
    from mpi4py import MPI

#: (step, share of the global batch) -> inputs, targets (S, samples) and the samples' indices within the global batch
Source = Callable[[int, slice], tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]]


@dataclass
class Difference:
    """How far one parameter is from the serial model's, over all steps: the largest relative differences.

    gradient: max |g - g'| / max(max |g'|, 1e-3 G), G the largest gradient of the model, so that a gradient which is
    zero but for rounding is not compared with itself; weight: max |w - w'| / max(max |w'|, 1e-1 W), likewise.
    """

    name: str
    shape: tuple[int, ...]
    gradient: float = 0.0
    weight: float = 0.0


@dataclass
class Report:
    """The outcome for one layout."""

    layout: str
    ranks: int
    parameters: list[Difference] = field(default_factory=list)
    loss: float = 0.0
    norm: float = 0.0

    @property
    def worst(self) -> float:
        """The largest of all differences; infinite if anything is not a number."""
        values = [self.loss, self.norm, *(v for p in self.parameters for v in (p.gradient, p.weight))]
        return max((v if math.isfinite(v) else math.inf for v in values), default=math.inf)


@dataclass
class _Serial:
    """What rank 0 keeps of the serial run."""

    losses: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    weights: list[dict[str, NDArray[Any]]] = field(default_factory=list)


def verify(configs: Sequence[Config], comm: MPI.Intracomm | None, source: Source, *, steps: int = 2) -> list[Report]:
    """Step the serial model and the layout of each configuration ``steps`` times, optimizer included, and compare all.

    The configurations are resolved (see ``resolve``) and differ in layout and microbatch alone. Rank 0 runs the serial
    model; each layout runs on the first ranks of ``comm``. Serial arrays are broadcast one parameter at a time, so that
    a rank other than 0 never holds more than its share and one whole parameter. The reports are the same on every rank.
    InputError if a layout needs more ranks than there are.
    """
    have = 1 if comm is None else comm.size
    for layout in (config.layout for config in configs):
        if layout.ranks > have:
            raise InputError(
                f"layout {short(layout)} needs {layout.ranks} ranks, and there are {have}: mpirun -n {layout.ranks}"
            )
    serial = _run_serial(configs[0], source, steps) if comm is None or comm.rank == 0 else _Serial()
    reports = []
    for config in configs:
        ranks = config.layout.ranks
        part = _first(comm, ranks)
        report = Report(short(config.layout), ranks)
        if comm is None or comm.rank < ranks:
            report = _compare(config, part, source, serial, steps, report)
        if comm is not None:
            report = comm.bcast(report)
            if part is not None and part is not comm:
                part.Free()
        reports.append(report)
    return reports


def _first(comm: MPI.Intracomm | None, ranks: int) -> MPI.Intracomm | None:
    """The first ranks of ``comm`` on those, and the others on the others."""
    if comm is None or comm.size == ranks:
        return comm
    return cast("MPI.Intracomm", comm.Split(int(comm.rank >= ranks), comm.rank))


def resolve(config: Config) -> Config:
    """``config`` as ``verify`` takes it: in float64, and so without FP8, every derived value filled in, ``dp`` 1 unless
    it is given."""
    train = dataclasses.replace(config.train, dtype="float64", fp8="none")
    layout = dataclasses.replace(config.layout, dp=config.layout.dp or 1)
    config, known = dataclasses.replace(config, train=train, layout=layout), {"vocabulary": 257}
    if config.data.path is not None:
        with TokenFile(config.data.path) as data:
            known = {"vocabulary": data.vocabulary, "end_of_document": data.end_of_document}
    return config.resolved(**known)


def source_of(config: Config) -> Source:
    """The batches of ``config``'s data, or random tokens without, where these are kept apart in several documents: the
    same on every layout."""
    model, train = config.model, config.train
    if config.data.path is not None:
        split = TokenFile(config.data.path).split("train")
        sampler = Sampler.over(split, model.sequence, train.seed)
        return lambda step, share: Batches(split, sampler, train.batch, share).read(step)

    def draw(step: int, share: slice) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
        samples = np.arange(share.start, share.stop)
        words = random.bits(random.key(train.seed, "verify"), samples, step, slice(0, model.sequence + 1))
        tokens = (words % np.uint32(model.vocabulary or 1)).astype(np.int64).T
        if config.data.documents == "apart":
            for column, turn in zip(tokens.T, samples + step, strict=True):
                column[_ends(model.sequence, turn)] = config.data.end_of_document
        return tokens[:-1], tokens[1:], samples

    return draw


def _ends(length: int, turn: int) -> NDArray[np.int64]:
    """Where documents end in ``length`` positions: of odd lengths, one token to half of all; others in each turn."""
    lengths = np.roll((1, length // 2 | 1, 3, 1, length // 4 | 1), turn)
    ends = np.cumsum(np.tile(lengths, length)) - 1
    return ends[ends < length]


def _run_serial(config: Config, source: Source, steps: int) -> _Serial:
    layout = Layout(dp=1, sequence_parallel=False)
    out = _Serial()
    with Mesh(device=config.train.device) as mesh:
        train = dataclasses.replace(config.train, microbatch=None)
        engine = Engine(dataclasses.replace(config, layout=layout, train=train), mesh)
        for step in range(steps):
            result = engine.step(step, *source(step, engine.share))
            out.losses.append(_losses(result))
            out.norms.append(result.norm)
            parameters = engine.buckets.parameters
            out.gradients.append({p.name: to_host(p.grad).copy() for p in parameters})
            out.weights.append({p.name: to_host(p.data).copy() for p in parameters})
    return out


def _compare(
    config: Config,
    comm: MPI.Intracomm | None,
    source: Source,
    serial: _Serial,
    steps: int,
    report: Report,
) -> Report:
    with mesh_for(config, comm) as mesh:
        engine = Engine(config, mesh)
        names = _broadcast(comm, [(n, a.shape) for n, a in serial.gradients[0].items()] if serial.gradients else None)
        found = {name: Difference(name, shape) for name, shape in names}
        _check_cover(mesh, engine, dict(names))
        mine = _held(engine)
        for step in range(steps):
            result = engine.step(step, *source(step, engine.share))
            losses, norms = _broadcast(comm, (serial.losses, serial.norms))
            report.loss = max(report.loss, *map(_relative, _losses(result), losses[step]))
            report.norm = max(report.norm, _relative(result.norm, norms[step]))
            for kind, wholes, floor in (("gradient", serial.gradients, 1e-3), ("weight", serial.weights, 1e-1)):
                top = _broadcast(comm, max(map(_size, wholes[step].values())) if wholes else None)
                for name, difference in found.items():
                    whole = _broadcast(comm, wholes[step][name] if wholes else None)
                    scale = max(_size(whole), floor * top)
                    error = max((_error(*held, kind, whole) for held in mine.get(name, ())), default=0.0)
                    error = error / scale if scale else 0.0
                    setattr(difference, kind, max(getattr(difference, kind), _worst(mesh, error)))
        report.parameters = list(found.values())
    return report


def _held(engine: Engine) -> dict[str, list[tuple[Bucket, Piece]]]:
    """What this rank holds of each parameter, by its name."""
    held: dict[str, list[tuple[Bucket, Piece]]] = {}
    for bucket in engine.buckets.buckets:
        for piece in bucket.pieces():
            held.setdefault(piece.parameter.name, []).append((bucket, piece))
    return held


def _error(bucket: Bucket, piece: Piece, kind: str, whole: NDArray[Any]) -> float:
    """The largest difference between this rank's piece and the same elements of ``whole``; of weights, the master's and
    those that the layers use, where they are there."""
    p = piece.parameter
    flats = [bucket.grad if kind == "gradient" else bucket.master]
    pairs = [(flat[piece.place], whole[p.index].reshape(-1)[piece.start : piece.stop]) for flat in flats]
    if kind == "weight" and p.data is not None:
        pairs.append((p.data, whole[p.index]))
    if any(mine.shape != there.shape for mine, there in pairs):
        return math.inf
    return max(_size(to_host(mine) - there) for mine, there in pairs)


def _size(x: NDArray[Any]) -> float:
    """The largest magnitude; infinite if there is any NaN, which no comparison would otherwise see."""
    top = float(np.abs(x).max()) if x.size else 0.0
    return top if math.isfinite(top) else math.inf


def _losses(result: Result) -> list[float]:
    """The loss, and those of routers."""
    return [result.loss, result.balance, result.z, result.dropped]


def _relative(a: float, b: float) -> float:
    difference = abs(a - b) / abs(b) if b else abs(a)
    return difference if math.isfinite(difference) else math.inf  # no maximum would keep a NaN


def _worst(mesh: Mesh, error: float) -> float:
    errors: list[float] = mesh.gather_objects(error if math.isfinite(error) else math.inf)
    return max(errors)


def _broadcast(comm: MPI.Intracomm | None, value: Any) -> Any:
    return value if comm is None else comm.bcast(value)


def _check_cover(mesh: Mesh, engine: Engine, shapes: dict[str, tuple[int, ...]]) -> None:
    """The owned parts of the pieces that the first of all copies hold must tile every parameter once, or norms are
    wrong."""
    owned: list[tuple[str, Index]] = [
        (piece.parameter.name, index)
        for bucket in engine.buckets.buckets
        if bucket.replicas.rank == 0
        for piece in bucket.pieces()
        for index, _ in piece.cut(bucket.grad[piece.place], piece.parameter.owned)
    ]
    counts = {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}
    for name, index in (item for items in mesh.gather_objects(owned) for item in items):
        if name not in counts:
            raise RuntimeError(f"{name} is no parameter of the serial model")
        counts[name][index] += 1
    for name, count in counts.items():
        if (count != 1).any():
            raise RuntimeError(f"{name} is owned {count.min()} to {count.max()} times, not once")
