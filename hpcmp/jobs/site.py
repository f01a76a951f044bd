"""The site file: what a cluster needs, whatever the run. A TOML file, read like a configuration."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..training import schema
from ..training.schema import COUNT, SIZE, Section, check_tables, option
from ..training.toml import literal, read_toml

Scheduler = Literal["", "slurm", "pbs", "lsf", "flux", "none"]


@dataclass(frozen=True)
class Batch(Section):
    """What the scheduler is told."""

    scheduler: Scheduler = option("", "the scheduler; `--scheduler` goes before it")
    account: str | None = option(None, "account, project or bank that pays")
    queue: str | None = option(None, "queue or partition")
    warning: int = option(120, "seconds before the limit at which the job is told to save and stop", SIZE)
    chunk: str = option("", "for PBS: what else each chunk of `select` has, such as `mem=200gb`")
    requeue: bool = option(True, "whether a job may be requeued under its id; else it submits itself anew")
    options: str = option("", "more options for the scheduler, one a line, as they would follow #SBATCH, #PBS, ...")


@dataclass(frozen=True)
class Node(Section):
    """What a node has."""

    cores: int | None = option(None, "cores of a node that its ranks share; none: all that the job gets", SIZE)
    gpus: int = option(0, "GPUs of a node", COUNT)
    ranks: int | None = option(None, "ranks on a node, unless `--ranks-per-node` says; none: one a GPU, or one", SIZE)


@dataclass(frozen=True)
class Launch(Section):
    """How ranks are started."""

    launcher: Literal["auto", "srun", "mpirun", "mpiexec", "pals", "flux"] = option(
        "auto",
        "`mpirun` of Open MPI; `mpiexec` of MPICH; `pals`: mpiexec of PALS; `auto`: srun under Slurm, flux under Flux, "
        "else mpirun",
    )
    mpi: str = option("pmix", "for srun --mpi: pmix, pmi2, cray_shasta, ...")
    bind: Literal["cores", "none"] = option("cores", "whether each rank keeps to its cores; `cores` needs node.cores")
    options: str = option("", "more words for the launcher, quoted as for a shell")


@dataclass(frozen=True)
class Shell(Section):
    """What the script does before it starts ranks."""

    modules: str = option("", "environment modules to load, with spaces between them")
    setup: str = option("", "lines of bash, such as `source .venv/bin/activate`")


@dataclass(frozen=True)
class Site:
    """All sections of a site file, and ``[environment]``: variables, as text, for every rank."""

    batch: Batch = dataclasses.field(default_factory=Batch)
    node: Node = dataclasses.field(default_factory=Node)
    launch: Launch = dataclasses.field(default_factory=Launch)
    shell: Shell = dataclasses.field(default_factory=Shell)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


SECTIONS: dict[str, type[Section]] = {"batch": Batch, "node": Node, "launch": Launch, "shell": Shell}


def load_site(path: str | os.PathLike[str]) -> Site:
    """The site in a TOML file. Raises InputError naming the file and the key; an unknown one names the nearest."""
    tables = read_toml(path)
    environment = tables.pop("environment", {})
    try:
        sections: dict[str, Any] = {
            name: SECTIONS[name](**table)
            for name, table in check_tables(SECTIONS | {"environment": Section}, tables).items()
        }
        for name, section in sections.items():
            _check_lines(name, section)
        return Site(**sections, environment=_environment(environment))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _check_lines(name: str, section: Section) -> None:
    """Raise InputError for a text with a line break, where lines are not what is asked for."""
    for key, value in vars(section).items():
        if isinstance(value, str) and not value.isprintable() and (name, key) not in _LINES:
            raise InputError(f"{name}.{key}: expected one line, found {literal(value)}")


_LINES = {("batch", "options"), ("shell", "setup"), ("shell", "modules")}


def _environment(table: Any) -> dict[str, str]:
    if not isinstance(table, Mapping):
        raise InputError(f"environment: expected the section [environment], found {literal(table)}")
    result = {}
    for name, value in table.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"environment.{name}: not the name of a variable")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"environment.{name}: expected text or a number, found {literal(value)}")
        result[name] = str(value)
    return result


def reference() -> str:
    """The tables of docs/jobs.md, generated from the sections above."""
    return schema.reference(SECTIONS)
