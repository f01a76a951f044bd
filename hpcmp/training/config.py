"""The configuration of a run: a TOML file read into frozen dataclasses, one a section (docs/configuration.md)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..comm.fit import divisors
from ..errors import InputError
from . import schema
from .layout import Layout as Layout
from .layout import check_layout as check_layout
from .layout import parse_layout as parse_layout
from .layout import read_layout
from .schema import COUNT, POSITIVE, SHARE, SIZE, Section, check_tables, derived, fill, option, read_override
from .toml import read_toml, to_toml


@dataclass(frozen=True)
class Model(Section):
    """The transformer. `gpt`: learnt positions, LayerNorm, GELU. `llama`: rotary positions, RMSNorm, SwiGLU."""

    style: Literal["gpt", "llama"] = option("gpt", "architecture")
    layers: int = option(4, "transformer blocks", SIZE)
    hidden: int = option(128, "width of the residual stream", SIZE)
    heads: int = option(4, "attention heads", SIZE)
    kv_heads: int = derived("heads", "heads of keys and values; must divide heads", SIZE)
    head_size: int = derived("hidden / heads", "width of a head; even for `llama`", SIZE)
    ffn: int = derived("4 hidden; `llama`: round(8 hidden / 3)", "inner width of the MLP", SIZE)
    vocabulary: int = derived("of the data file", "number of tokens", SIZE)
    sequence: int = option(256, "longest sequence, and the length of a training sample, in tokens", SIZE)
    dropout: float = option(0.0, "probability that an activation is dropped", SHARE)
    tied: bool = derived("true; `llama`: false", "input embedding and output projection are one matrix")
    norm_epsilon: float = option(1e-5, "added to the variance in norms", POSITIVE)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", POSITIVE)
    init_std: float = option(0.02, "standard deviation of the initial weights", POSITIVE)
    bias: bool = derived("true; `llama`: false", "linear layers add a bias")
    experts: int = option(0, "experts of a mixture-of-experts MLP; 0: an ordinary MLP", COUNT)
    experts_every: int = option(1, "one block of so many, the last of them, has experts", SIZE)
    experts_per_token: int = option(2, "experts that each token goes to", SIZE)
    expert_ffn: int = derived("ffn", "inner width of an expert", SIZE)
    shared_experts: int = option(0, "experts that every token goes to besides", COUNT)
    router: Literal["softmax", "sigmoid"] = option("softmax", "how scores of experts become weights")
    capacity: float | None = option(
        None, "most tokens of a sequence for an expert, in units of an even share; none: no token is dropped", POSITIVE
    )
    balance_loss: float = option(0.01, "weight of the loss that balances experts", COUNT)
    z_loss: float = option(0.001, "weight of the loss that keeps the router's scores small", COUNT)

    def resolved(self) -> Model:
        """With every derived value but ``vocabulary`` filled in, and relations checked."""
        if self.head_size is None and self.hidden % self.heads:
            raise InputError(
                f"model.head_size: model.heads = {self.heads} does not divide model.hidden = {self.hidden}; "
                "change one of them, or give model.head_size"
            )
        llama = self.style == "llama"
        model: Model = fill(
            self,
            kv_heads=self.heads,
            head_size=self.hidden // self.heads,
            ffn=round(8 * self.hidden / 3) if llama else 4 * self.hidden,
            tied=not llama,
            bias=not llama,
        )
        model = fill(model, expert_ffn=model.ffn)
        if model.experts and model.experts_per_token > model.experts:
            raise InputError(
                f"model.experts_per_token = {model.experts_per_token} is more than model.experts = {model.experts}"
            )
        if model.experts and model.experts_every > model.layers:
            raise InputError(
                f"model.experts_every = {model.experts_every}: none of model.layers = {model.layers} blocks has experts"
            )
        if model.heads % model.kv_heads:
            raise InputError(f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}")
        if llama and model.head_size % 2:
            raise InputError(f"model.head_size = {model.head_size}: rotary positions need an even number")
        return model


@dataclass(frozen=True)
class Data(Section):
    """What is learnt from."""

    path: str | None = option(None, "token file, as `hpcmp data prepare` writes it")


@dataclass(frozen=True)
class Train(Section):
    """The run. The layout changes none of these numbers' meaning."""

    steps: int = option(1000, "optimizer steps in all", SIZE)
    batch: int = option(8, "samples of a step, over all ranks", SIZE)
    microbatch: int | None = option(None, "samples that a data-parallel rank takes through the model at once", SIZE)
    seed: int = option(0, "of weights, dropout and the order of the data", COUNT)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = option(
        "float32", "numbers of weights and activations; with 16 bits, gradients and master weights are float32"
    )
    loss_scale: float = derived("65536 for float16, else 1", "factor of the loss in the backward", POSITIVE)
    loss_scale_window: int = option(2000, "with float16: good steps after which `loss_scale` doubles", SIZE)
    device: Literal["cpu", "cuda"] = option("cpu", "where arrays live")
    blas: Literal["auto", "mkl", "openblas", "blis", "numpy"] = option(
        "auto", "library of matrix products on the CPU; `auto`: MKL if it is there and the CPU is Intel's, else NumPy's"
    )
    kernels: Literal["auto", "reference"] = option(
        "auto", "loops on the CPU; `auto`: compiled by Numba where it is installed; `reference`: NumPy's"
    )
    minutes: float | None = option(None, "save and stop after so long", POSITIVE)


@dataclass(frozen=True)
class Optimizer(Section):
    """The optimizer, with a linear warmup, then a cosine to `final` of the learning rate."""

    name: Literal["adamw", "sgd", "lamb", "muon"] = option("adamw", "`muon` takes AdamW for what is no matrix")
    momentum: float = option(0.95, "decay of the momentum of `sgd` and `muon` per step", SHARE)
    learning_rate: float = option(1e-3, "highest learning rate", POSITIVE)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the first and second moment per step", SHARE)
    epsilon: float = option(1e-8, "added to the root of the second moment", POSITIVE)
    weight_decay: float = option(0.1, "decay of matrices, in units of the learning rate", COUNT)
    clip: float | None = option(1.0, "largest norm of the whole gradient", POSITIVE)
    warmup: int = derived("50; half of decay_steps if that is fewer", "steps of the linear warmup", COUNT)
    final: float = option(0.1, "learning rate after the cosine, as a fraction of the highest", "[0, 1]")
    decay_steps: int = derived("train.steps", "step at which the cosine ends", SIZE)

    def resolved(self, steps: int) -> Optimizer:
        """With derived values filled in for a run of ``steps`` steps, and relations checked."""
        optimizer: Optimizer = fill(self, decay_steps=steps)
        optimizer = fill(optimizer, warmup=min(50, optimizer.decay_steps // 2))
        if optimizer.warmup > optimizer.decay_steps:
            raise InputError(
                f"optimizer.warmup = {optimizer.warmup} is more than the {optimizer.decay_steps} steps of the schedule "
                "(optimizer.decay_steps, else train.steps)"
            )
        return optimizer


@dataclass(frozen=True)
class Communication(Section):
    """How arrays move between ranks."""

    backend: Literal["auto", "mpi", "nccl"] = option("auto", "`auto`: NCCL for arrays on GPUs, else MPI")
    cuda_aware: Literal["auto", "yes", "no"] = option("auto", "whether MPI may be handed GPU pointers; `auto`: ask it")
    hierarchical: Literal["auto", "yes", "no"] = option(
        "auto", "whether MPI's sums over nodes go through each node's ranks first; `auto`: large ones"
    )
    shared_memory: Literal["auto", "yes", "no"] = option(
        "auto", "whether a node's ranks exchange host arrays in shared memory; `auto`: where faster, if each has a core"
    )
    window_mb: float = option(6.0, "MiB of shared memory that a rank has in each group within a node", POSITIVE)


@dataclass(frozen=True)
class Checkpoint(Section):
    """What is saved, when and where."""

    directory: str = derived("checkpoints in run.directory", "where checkpoints lie")
    every: int | None = option(None, "steps between checkpoints; one is always written at the end", SIZE)
    asynchronous: bool = option(
        False, "write those on the way behind the steps that follow; a rank needs memory for a copy of its share"
    )
    keep: int = option(2, "how many of the newest are kept", SIZE)
    keep_every: int | None = option(None, "besides, those of steps that are multiples of this are kept for ever", SIZE)
    keep_best: int = option(
        0, "besides, so many with the lowest held-out loss, which is then taken at each save", COUNT
    )
    resume: bool = option(True, "go on from the newest checkpoint when there is one")
    fresh_optimizer: bool = option(
        False, "go on from a checkpoint of another `optimizer.name` too, with the states of this one at zero"
    )
    local: str | None = option(
        None, "a directory of each node for fast copies, on its disk or in /dev/shm; $VARIABLES and {node} are put in"
    )
    local_every: int | None = option(None, "steps between copies in `local`; none where there is a checkpoint", SIZE)
    initial: str | None = option(None, "checkpoint whose weights a run begins with; the optimizer begins anew")
    storage: Literal["auto", "files", "node", "shared", "mpio"] = option(
        "auto", "a file per rank (`auto`), per node, or one of all ranks: by themselves, or through parallel HDF5"
    )
    verify: Literal["cache", "disk", "no"] = option(
        "cache", "what is read back before a checkpoint counts: what the system has in memory, what the disk has"
    )
    alignment: int = option(0, "bytes: large tensors start at multiples of it; 0: the file system's block size", COUNT)
    hints: str = option("", 'for MPI-IO (`mpio`), such as "striping_unit=4194304 cb_nodes=8"')


@dataclass(frozen=True)
class Run(Section):
    """The run's directory and its log."""

    directory: str = derived(
        "runs/NAME of NAME.toml", "where the resolved configuration, metrics and plots are written"
    )
    log_seconds: float = option(5.0, "seconds between lines of the log", COUNT)
    evaluate_every: int | None = option(None, "steps between evaluations on held-out samples", SIZE)
    evaluate_samples: int = option(16, "held-out samples", SIZE)
    plot: bool = option(False, "draw the loss at the end (needs matplotlib)")


@dataclass(frozen=True)
class Config:
    """All sections. A value that follows from others is None until ``resolved`` has filled it in.

    Change a configuration (``dataclasses.replace``) before it is resolved: derived values do not follow afterwards.
    """

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    train: Train = dataclasses.field(default_factory=Train)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    layout: Layout = dataclasses.field(default_factory=Layout)
    communication: Communication = dataclasses.field(default_factory=Communication)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    run: Run = dataclasses.field(default_factory=Run)

    def resolved(self, *, ranks: int | None = None, vocabulary: int | None = None) -> Config:
        """The configuration that runs: what follows from other values filled in, relations between keys checked.

        ``layout.dp`` and ``model.vocabulary`` are filled in if ``ranks`` and ``vocabulary`` are given, else left alone.
        Idempotent. Raises InputError naming the keys that do not fit.
        """
        train = fill(self.train, loss_scale=65536.0 if self.train.dtype == "float16" else 1.0)
        run = fill(self.run, directory="runs/unnamed")
        if train.microbatch is not None and train.microbatch > train.batch:
            raise InputError(f"train.microbatch = {train.microbatch} is more than train.batch = {train.batch}")
        if self.communication.backend == "nccl" and train.device != "cuda":
            raise InputError('communication.backend = "nccl" needs train.device = "cuda"')
        c = self.checkpoint
        if c.keep_every is not None and (c.every is None or c.keep_every % c.every):
            every = c.every or "none"
            raise InputError(f"checkpoint.keep_every = {c.keep_every} is no multiple of checkpoint.every = {every}")
        if (c.local is None) != (c.local_every is None):
            raise InputError("checkpoint.local and checkpoint.local_every need each other: where, and how often")
        self.layout.blocks(self.model.layers)
        _check_experts(self.model, self.layout)
        return dataclasses.replace(
            self,
            model=fill(self.model, vocabulary=vocabulary).resolved(),
            train=train,
            optimizer=self.optimizer.resolved(train.steps),
            layout=self.layout.resolved(ranks),
            checkpoint=fill(self.checkpoint, directory=str(Path(run.directory) / "checkpoints")),
            run=run,
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}} of JSON values, equal to itself after a round trip through JSON."""
        values = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in t.items()} for s, t in values.items()}

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; keys left out have their defaults. Raises InputError for an unknown key."""
        sections: dict[str, Any] = {
            name: SECTIONS[name](**table) for name, table in check_tables(SECTIONS, tables).items()
        }
        return cls(**sections)

    def to_toml(self) -> str:
        """As the text of a configuration file that reads back as this configuration."""
        return to_toml({name: getattr(self, name) for name in SECTIONS})


#: The class of every section, in the order of the file.
SECTIONS: dict[str, type[Section]] = {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def _check_experts(model: Model, layout: Layout) -> None:
    """Raise InputError unless every rank of ep has an expert, and experts are cut along axes that cut them."""
    most = max(1, model.experts)
    if layout.ep > most:
        fits = max(n for n in divisors(layout.ep) if n <= most)
        raise InputError(f"layout.ep = {layout.ep} is more than model.experts = {model.experts}; ep={fits} would fit")
    if model.experts and layout.tp_y > 1:
        raise InputError(
            f"layout.tp_y = {layout.tp_y} does not cut experts (model.experts = {model.experts}); "
            f"tp_y=1,tp={layout.tp * layout.tp_y} would fit"
        )


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file, with ``overrides`` ("section.key=value") in place of what the file says.

    Checked as a whole, and not yet resolved. Raises InputError, which names the file or the override, and the key.
    """
    tables: dict[str, dict[str, Any]] = {"run": {"directory": f"runs/{Path(path).stem}"}}
    sources = [(str(path), read_toml(path))]
    sources += [("command line", read_override(SECTIONS, text)) for text in overrides]
    for source, given in sources:
        try:
            for name, table in check_tables(SECTIONS, given).items():
                tables.setdefault(name, {}).update(table)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    try:
        config = Config.from_dict(tables)
        config.resolved()
    except InputError as error:
        raise InputError(f"{path}{' with the command line' if overrides else ''}: {error}") from None
    return config


def with_layout(config: Config, text: str) -> Config:
    """``config`` in the layout of ``text`` (see ``parse_layout``); ``micro`` in it goes to ``train.microbatch``."""
    layout, micro = read_layout(text, config.layout)
    train = config.train if micro is None else dataclasses.replace(config.train, microbatch=micro)
    return dataclasses.replace(config, layout=layout, train=train)


def reference() -> str:
    """The tables of docs/configuration.md, generated from the sections above."""
    return schema.reference(SECTIONS)
