"""The configuration of a run: a TOML file read into frozen dataclasses, one a section (docs/configuration.md)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.fit import divisors
from ..errors import InputError
from . import schema
from .layout import Layout as Layout
from .layout import check_layout as check_layout
from .layout import parse_layout as parse_layout
from .layout import read_layout
from .schema import Section, check_tables, fill, read_override
from .sections import Checkpoint as Checkpoint
from .sections import Communication as Communication
from .sections import Data as Data
from .sections import Model as Model
from .sections import Optimizer as Optimizer
from .sections import Run as Run
from .sections import Train as Train
from .toml import read_toml, to_toml


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

    def resolved(
        self, *, ranks: int | None = None, vocabulary: int | None = None, end_of_document: int | None = None
    ) -> Config:
        """The configuration that runs: what follows from other values filled in, relations between keys checked.

        ``layout.dp``, ``model.vocabulary`` and ``data.end_of_document`` are filled in if ``ranks``, ``vocabulary`` and
        ``end_of_document`` are given, else left alone. Idempotent. Raises InputError naming the keys that do not fit.
        """
        train = fill(
            self.train,
            loss_scale=65536.0 if self.train.dtype == "float16" else 1.0,
            ahead=int(self.train.device == "cuda"),
        )
        run = fill(self.run, directory="runs/unnamed")
        if train.microbatch is not None and train.microbatch > train.batch:
            raise InputError(f"train.microbatch = {train.microbatch} is more than train.batch = {train.batch}")
        if train.fp8 != "none" and train.dtype == "float64":
            raise InputError(f'train.fp8 = "{train.fp8}" does not go with train.dtype = "float64"; the others do')
        if self.communication.backend == "nccl" and train.device != "cuda":
            raise InputError('communication.backend = "nccl" needs train.device = "cuda"')
        c = self.checkpoint
        if c.keep_every is not None and (c.every is None or c.keep_every % c.every):
            every = c.every or "none"
            raise InputError(f"checkpoint.keep_every = {c.keep_every} is no multiple of checkpoint.every = {every}")
        if (c.local is None) != (c.local_every is None):
            raise InputError("checkpoint.local and checkpoint.local_every need each other: where, and how often")
        if train.spares and not train.recover:
            raise InputError(f"train.spares = {train.spares} needs train.recover = true")
        self.layout.blocks(self.model.layers)
        _check_experts(self.model, self.layout)
        if train.cuda_graphs:
            _check_graphs(self)
        model = fill(self.model, vocabulary=vocabulary).resolved()
        return dataclasses.replace(
            self,
            model=model,
            data=self.data.resolved(model.vocabulary, end_of_document),
            train=train,
            optimizer=self.optimizer.resolved(train.steps),
            layout=self.layout.resolved(ranks),
            communication=_recoverable(self) if train.recover else self.communication,
            checkpoint=fill(self.checkpoint, directory=str(Path(run.directory) / "checkpoints")),
            run=run,
        )

    def microbatches(self, samples: int | None = None) -> int:
        """How many microbatches a replica with ``samples`` samples (by default the largest share) cuts them into; of a
        configuration that is resolved for its ranks.

        Without ``train.microbatch``: one, or with a pipeline four a stage as far as there are samples for them.
        """
        size, pp = self.train.microbatch, self.layout.pp
        samples = samples or -(-self.train.batch // (self.layout.dp * self.layout.tp_z))
        if size is None:
            return 1 if pp == 1 else min(samples, 4 * pp)
        return -(-samples // size)

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


def _recoverable(config: Config) -> Communication:
    """The communication of a run that outlives its ranks: all of it must notice that one has died. Raises InputError
    for what does not."""
    deaf = ("train.device", "cuda"), ("checkpoint.storage", "mpio"), ("communication.shared_memory", "yes")
    for key, value in deaf:
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name) == value:
            raise InputError(
                f'train.recover = true does not go with {key} = "{value}", where nobody notices that a rank has died'
            )
    return dataclasses.replace(config.communication, shared_memory="no")


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


def _check_graphs(config: Config) -> None:
    """Raise InputError for what a CUDA graph cannot hold: it launches the same work, on the same memory, each time."""
    layout, model = config.layout, config.model
    refused = {
        'train.device = "cpu"': (config.train.device == "cpu", "which has none"),
        f"layout.tp_z = {layout.tp_z}": (layout.tp_z > 1, "whose weights come and go"),
        f"layout.cp = {layout.cp}": (layout.cp > layout.ulysses, f"which has a ring; ulysses={layout.cp} would fit"),
        f"layout.zero = {layout.zero}": (layout.zero > 1, "whose weights or gradients come and go; 1 would fit"),
        f'layout.offload = "{layout.offload}"': (
            layout.offload in ("activations", "both"),
            'which copies what a block keeps; "optimizer" would fit',
        ),
        f"model.experts = {model.experts}": (model.experts > 0, "whose tokens the host counts"),
        'data.documents = "apart"': (config.data.documents == "apart", "whose beginnings are others in each step"),
    }
    for what, (found, why) in refused.items():
        if found:
            raise InputError(f"train.cuda_graphs = true does not go with {what}, {why}")


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
