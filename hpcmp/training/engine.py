"""Engine: a model on a mesh, ready to step. The trainer, ``verify`` and a user's own loop all drive this."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels, partition
from ..arrays import Array, dtype_of, module_for, to_host
from ..captured import Captured, Graphs, chain
from ..comm.base import Communicator
from ..comm.mesh import Mesh
from ..cursor import Cursor, Place
from ..kernels import blas
from ..layers.context import documents
from ..layers.fp8 import Fp8
from ..layers.loss import VocabularyParallelCrossEntropy
from ..layers.mlp import fuse
from ..layers.parallel import ModelParallel
from ..models.architecture import Architecture
from ..models.transformer import Stage, build_stages
from ..module import Module, Sequential
from ..offload import Host, Offload
from ..optim.make import make_optimizer
from ..optim.rate import warmup_cosine
from ..parallel.buckets import Buckets
from ..parallel.pipeline import Microbatch, Pipeline
from ..parallel.schedules import Schedule
from ..process import keep_memory
from ..recompute import recompute
from .config import Config, Layout
from .measure import measure, measured_stages
from .outcome import Result as Result
from .outcome import Running, summed
from .phases import Phases
from .scaler import LossScale

if TYPE_CHECKING:
    from mpi4py import MPI


#: The axes whose ranks share the layers of one of them: all but ``pp``.
LAYERS = tuple(axis for axis in Mesh.axes if axis != "pp")


class Engine:
    """One optimizer step at a time on any layout; every layout gives the same numbers.

    config must be resolved, with the vocabulary known and ``layout`` equal to the mesh; where
    ``layout.stages`` is "measured", ``self.config`` has the numbers. Each rank holds its pipeline stages' and its
    tensor-parallel rank's share of the parameters, gradients and moments.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        layout, train = config.layout, config.train
        self.architecture = architecture(config)
        self.xp = module_for(train.device)
        blas.select(train.blas)
        kernels.use(train.kernels)
        keep_memory()
        self.cursor, self.phases = Cursor(train.seed), Phases()
        self.parallel = ModelParallel(
            mesh["tp"],
            self.cursor,
            sequence=bool(layout.sequence_parallel),
            tp_y=mesh["tp_y"],
            ring=mesh["ring"],
            ulysses=mesh["ulysses"],
            cp=mesh["cp"],
            ep=mesh["ep"],
        )
        pp = mesh["pp"]
        self.dtype, self.host = dtype_of(train.dtype), Host(self.xp)
        self.graphs = Graphs(self.cursor, mesh["tp", "tp_y", "cp"]) if train.cuda_graphs else None
        self.loss_scale = LossScale(train.loss_scale, window=train.loss_scale_window, dynamic=train.dtype == "float16")
        schedule = layout.pipeline()
        if layout.stages == "measured":
            self.config, layout = self._measure(schedule.stages(pp.size))
        if train.fp8 != "none":
            self.parallel.products = Fp8(mesh[LAYERS], self.xp, delayed=train.fp8 == "delayed")
        places = stages_of(schedule, pp, layout.blocks(self.architecture.layers))
        self.stages = build_stages(self.architecture, self.parallel, places, wrap=self._wrap)
        for stage in self.stages:
            chain(stage)
        size = layout.bucket_mb * 2**20
        self.buckets = Buckets(self.stages, mesh, zero=layout.zero, size=size, dtype=self.dtype, xp=self.xp)
        self.buckets.initialise(train.seed)
        o = config.optimizer
        settings = {key: getattr(o, key) for key in ("weight_decay", "clip", "betas", "epsilon", "momentum")}
        host = self.host if layout.offload in ("optimizer", "both") else None
        self.optimizer = make_optimizer(o.name, self.buckets, host=host, **settings)
        self.factor = self.xp.ones(1)  # of the gradient: see ``kernels.update.clip_factor``
        loss = VocabularyParallelCrossEntropy(self.parallel, self.architecture.vocabulary)
        self.pipeline = Pipeline(
            self.stages, loss, pp, schedule, self.cursor, self._shape, self.xp.empty(0, self.dtype)
        )
        schedule(pp.rank, pp.size, self.microbatches())  # one from a file refuses too many
        #: Called when a step is about to change the weights and the optimizer's state, which it has not done so far.
        self.before_update: Callable[[], None] = lambda: None

    @property
    def share(self) -> slice:
        """The samples of the global batch that this rank's replica takes."""
        return self.mesh["dp", "tp_z"].part(self.config.train.batch)

    def microbatches(self, samples: int | None = None) -> int:
        """See ``Config.microbatches``."""
        return self.config.microbatches(samples)

    def step(
        self, step: int, inputs: Array, targets: Array, samples: Array, *, stop: bool = False, tell: bool = False
    ) -> Result:
        """Optimizer step number ``step`` on a global batch, of which this replica passes its ``share``.

        inputs, targets: (S, samples) integers; samples: each one's index within the global batch. The loss is the mean
        over all positions of the global batch, the gradient that of this mean. Collective over the mesh.
        """
        return self.begin(step, inputs, targets, samples, stop=stop, tell=tell).result()

    def begin(
        self, step: int, inputs: Array, targets: Array, samples: Array, *, stop: bool = False, tell: bool = False
    ) -> Running:
        """Queue a step, as ``step`` takes it. On a GPU the host waits for nothing, but for MPI where that moves device
        arrays, and for the counts of experts' tokens.

        A second step may be begun before the first one's result is asked for.
        """
        o = self.config.optimizer
        with self.phases("compute"):
            loss = self.gradient(step, inputs, targets, samples) * self.weight(inputs)
            asked = [name for name, wanted in (("stop", stop), ("tell", tell)) if wanted]
            sums = summed(self, loss, asked)
        assert o.warmup is not None and o.decay_steps is not None  # a resolved configuration
        rate = warmup_cosine(step, peak=o.learning_rate, warmup=o.warmup, total=o.decay_steps, final=o.final)
        with self.phases("checkpoint"):
            self.before_update()
        with self.phases("optimizer"):
            kernels.of(sums).clip_factor(sums, self.factor, clip=self.optimizer.clip, scale=self.loss_scale.scale)
            self.optimizer.apply(rate, self.factor)
            self.parallel.products.advance(self.factor)
        return Running(self, step, (inputs, targets, samples), rate, loss, sums)

    def gradient(self, step: int, inputs: Array, targets: Array, samples: Array) -> Array:
        """Leave the gradient of the global batch in the buckets; returns this rank's part of the sum of losses, a
        number: only the last stage has one, its tensor-parallel ranks the same."""
        self.buckets.zero()
        self.parallel.products.begin()
        self.cursor.losses.clear()
        weight = self.loss_scale.scale * self.weight(inputs)
        quiet: Any = "ignore" if self.loss_scale.dynamic else None  # an overflow is no news: the norm tells
        with np.errstate(over=quiet, invalid=quiet):
            total = self.pipeline.step(self._cut(step, inputs, targets, samples, weight), weight, self.buckets)
        self.buckets.finish()
        return self._mine(total)

    def weight(self, inputs: NDArray[Any]) -> float:
        """What a position's loss weighs in that of the global batch, all of whose samples are as long as ``inputs``."""
        return 1 / (self.config.train.batch * len(inputs))

    def evaluate(self, inputs: NDArray[Any], targets: NDArray[Any], samples: NDArray[np.int64], batch: int) -> float:
        """The mean loss over a global batch of ``batch`` samples, without dropout and without a gradient."""
        largest = -(-batch // self.mesh["dp", "tp_z"].size)
        self.parallel.products.begin()
        total = self._mine(self.pipeline.evaluate(self._cut(0, inputs, targets, samples, None, largest)))
        mine = float(to_host(total)) / (batch * inputs.shape[0])
        return float(self.mesh[Mesh.axes].all_reduce(np.array([mine])).wait()[0])

    def _wrap(self, block: Sequential, i: int) -> Module:
        """What the layout makes of block ``i``."""
        layout = self.config.layout
        kind = layout.recompute if (i + 1) % layout.recompute_every == 0 else "none"
        made = recompute(block if kind == "activations" else fuse(block), kind)
        made = Offload(made, self.host) if layout.offload in ("activations", "both") else made
        return Captured(made, self.graphs) if self.graphs is not None else made

    def _measure(self, stages: int) -> tuple[Config, Layout]:
        """The configuration, and its layout, with measured numbers of blocks."""
        samples = -(-self.config.train.batch // self.mesh["dp", "tp_z"].size)
        samples = -(-samples // self.microbatches())
        every = self.config.layout.recompute_every
        costs = measure(
            self.architecture,
            self.parallel,
            samples,
            self.dtype,
            self.config.train.device,
            self._wrap,
            lambda i: (self.architecture.has_experts(i), (i + 1) % every == 0),
        )
        layout = dataclasses.replace(self.config.layout, stages=measured_stages(self.mesh, stages, costs))
        return dataclasses.replace(self.config, layout=layout), layout

    def _mine(self, total: Array) -> Array:
        return total if self.mesh["tp", "tp_y"].rank == 0 else 0.0

    def _cut(
        self,
        step: int,
        inputs: NDArray[Any],
        targets: NDArray[Any],
        samples: NDArray[np.int64],
        weight: float | None,
        largest: int | None = None,
    ) -> list[Microbatch]:
        """This rank's positions of its replica's samples in microbatches, as even as can be; some may be empty where
        shares are uneven: every replica has equally many. ``weight`` is that of a token's loss in the gradient, None in
        evaluation; ``largest`` the most samples of a replica, by default those of a step."""
        length, training = len(inputs), weight is not None
        made = []
        self.cursor.place = Place(length=length)
        begins, positions = self.config.data.begins(inputs), self.parallel.context()
        inputs, targets = inputs[positions], targets[positions]
        for s in partition.split(len(samples), self.microbatches(largest)):
            apart = None if begins is None else documents(self.parallel, begins[s], self.xp)
            place = Place(step, samples[s], length, training, weight or 0.0, apart)
            entering = self.xp.asarray(inputs[:, s]) if self.pipeline.first else None
            wanted = self.xp.asarray(targets[:, s]) if self.pipeline.last else None
            made.append(Microbatch(entering, wanted, place))
        return made

    def _shape(self, place: Place) -> tuple[int, ...]:
        """The shape of an activation between stages; the cursor is at ``place``."""
        assert place.samples is not None
        hidden = self.parallel.tp_y.part(self.architecture.hidden)
        return len(self.parallel.positions()), len(place.samples), hidden.stop - hidden.start


def stages_of(schedule: Schedule, pp: Communicator, blocks: tuple[int, ...]) -> list[Stage]:
    """The virtual stages that this rank of ``pp`` holds, chunk by chunk; ``blocks``: how many blocks each has."""
    size = schedule.stages(pp.size)
    ends = schedule.holder(0, pp.size)[0] != schedule.holder(size - 1, pp.size)[0]
    numbers = (schedule.stage(pp.rank, pp.size, chunk) for chunk in range(schedule.chunks))
    return [Stage(number, size, blocks, ends) for number in numbers]


def mesh_for(config: Config, comm: MPI.Intracomm | None) -> Mesh:
    """The mesh of a resolved configuration over ``comm`` (None: this process alone)."""
    layout, communication = config.layout, config.communication
    axes = {axis: getattr(layout, axis) for axis in (*Mesh.axes, "ulysses", "ep", "shard")}
    return make_mesh(
        comm,
        config.train.device,
        backend=communication.backend,
        cuda_aware=communication.cuda_aware,
        hierarchical=communication.hierarchical,
        shared_memory=communication.shared_memory,
        window_mb=communication.window_mb,
        check=config.train.check_collectives,
        **axes,
    )


def make_mesh(
    comm: MPI.Intracomm | None, device: str, *, backend: str = "auto", cuda_aware: str = "auto", **axes: Any
) -> Mesh:
    """A mesh of ``axes`` whose arrays lie on ``device``; on "cuda" each rank's GPU is chosen and made current.
    Collective.

    Ranks that share a GPU talk over MPI unless ``backend`` says otherwise, where NCCL wants a GPU to itself.
    """
    if device == "cpu":
        return Mesh(comm, **axes)
    from ..comm.detect import cuda_aware as ask
    from ..comm.detect import start_mpi
    from ..comm.device import select_device

    staged = comm is not None and not ask(start_mpi(), cuda_aware)
    mesh = Mesh(comm, device=device, backend=backend, staged=staged, **axes)
    if not select_device(mesh.rank, mesh.gather_objects).nccl and backend == "auto":
        mesh.nccl = False
    return mesh


def architecture(config: Config) -> Architecture:
    """The mathematics of a resolved configuration's model."""
    m = config.model
    fields = {name: getattr(m, name) for name in Architecture.__dataclass_fields__}
    return Architecture(**fields)
