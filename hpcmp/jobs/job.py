"""A job: a run on some nodes for some time, with everything checked that can be before it is submitted."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..training.config import Config, load_config
from ..training.toml import literal
from .site import Site

#: The ending of the name of a script, by scheduler.
ENDINGS = {"slurm": ".sbatch", "pbs": ".pbs", "lsf": ".lsf", "flux": ".flux", "none": ".sh"}


@dataclass(frozen=True)
class Member:
    """A run of the job, one of an array or the only one: the overrides of its configuration, and the numbers of nodes
    on which its layout runs, the largest first."""

    overrides: tuple[str, ...]
    fitting: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What a script is made of.

    seconds: the time limit, None for none. members: more than one make an array, counted from 1. requeues: a job that
    stops in time goes on in another; not so in a chain (``chained``), whose next job does. command: the line that the
    script says it is from. recovers: ranks outlive others (``train.recover``).
    """

    scheduler: str
    name: str
    path: str
    config: str
    nodes: int
    ranks_per_node: int
    seconds: int | None
    members: tuple[Member, ...]
    requeues: bool = True
    chained: bool = False
    site: Site = field(default_factory=Site)
    command: str = ""
    recovers: bool = False

    @property
    def threads(self) -> int | None:
        """The threads, and cores, of a rank; None if nobody has said how many cores a node has."""
        return self.site.node.cores // self.ranks_per_node if self.site.node.cores else None

    @property
    def launcher(self) -> str:
        """The program that starts ranks."""
        chosen = self.site.launch.launcher
        return {"slurm": "srun", "flux": "flux"}.get(self.scheduler, "mpirun") if chosen == "auto" else chosen


def make_job(
    config: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    scheduler: str | None = None,
    nodes: int = 1,
    ranks_per_node: int | None = None,
    time: str | None = None,
    array: str | None = None,
    chained: bool = False,
    site: Site | None = None,
    name: str | None = None,
    path: str | None = None,
    command: str = "",
) -> Job:
    """The job of a configuration file, checked. ``array``: ``section.key=v1,v2,...``, or a file with a line of
    overrides for each run. Raises InputError naming the flag or the key that does not fit."""
    site = site or Site()
    chosen = scheduler or site.batch.scheduler
    if not chosen:
        raise InputError(f"--scheduler: one of {', '.join(ENDINGS)} (or batch.scheduler in the site file)")
    ranks = ranks_per_node or site.node.ranks or site.node.gpus or 1
    seconds = duration(time) if time is not None else None
    for text in (os.fspath(config), *overrides, name or "", path or "", array or ""):
        if not text.isprintable():
            raise InputError(f"{text!r}: a line break or another unprintable character cannot stand in a script")
    _check(chosen, nodes, ranks, seconds, chained, array, site)
    label = _label(name or Path(config).stem).replace("=", "_")  # PBS takes none in a name
    if chosen == "none":
        first = [f"train.minutes={seconds / 60:g}"] if seconds else []  # nobody else ends it
    else:
        first = [] if chained else ["train.requeue=true"]  # the run itself tells whether there is progress
    runs = [(*first, *overrides, *member) for member in (_members(array) if array else [()])]
    members, requeues, recovers = [], chosen != "none" and not chained, False
    for number, run in enumerate(runs, 1):
        loaded = load_config(config, run)
        if array:
            own = " ".join(run[len(first) + len(overrides) :])
            directory = Path(loaded.run.directory or "") / _label(f"{number}-{own}")
            run += (f"run.directory={directory}",)
        requeues = requeues and loaded.train.requeue
        recovers = recovers or loaded.train.recover
        try:
            members.append(Member(run, tuple(_fitting(loaded, nodes, ranks))))
        except InputError as error:
            of = f"run {number} of the array, " if array else ""
            sizes = f"{nodes} node{'s' * (nodes != 1)} of {ranks} rank{'s' * (ranks != 1)}"
            raise InputError(f"{of}{sizes}: {error}") from None
        if loaded.train.device == "cuda" and 0 < site.node.gpus < ranks:
            raise InputError(f"--ranks-per-node {ranks}: a node has {site.node.gpus} GPUs (node.gpus in the site file)")
    job = Job(
        chosen,
        label,
        path or label + ENDINGS[chosen],
        os.fspath(config),
        nodes,
        ranks,
        seconds,
        tuple(members),
        requeues,
        chained,
        site,
        command,
        recovers,
    )
    if recovers and job.launcher != "mpirun":
        raise InputError(
            f"train.recover = true: {job.launcher} ends the job with any of its ranks; Open MPI 5's would fit, "
            'launch.launcher = "mpirun" in the site file'
        )
    return job


def _check(
    scheduler: str, nodes: int, ranks: int, seconds: int | None, chained: bool, array: str | None, site: Site
) -> None:
    """Raise InputError for what no scheduler, or this one, can do."""
    if nodes < 1 or ranks < 1:
        raise InputError(f"--nodes {nodes}, --ranks-per-node {ranks}: expected at least 1")
    if site.node.cores and ranks > site.node.cores:
        raise InputError(f"--ranks-per-node {ranks}: a node has {site.node.cores} cores (node.cores in the site file)")
    if scheduler == "none" and nodes > 1:
        raise InputError(f"--nodes {nodes}: --scheduler none runs on this machine alone")
    if scheduler == "none" and chained:
        raise InputError("--chain needs a scheduler")
    if scheduler != "none" and seconds is None:
        raise InputError("--time: how long the job may run: minutes, 2:00:00 or 1-00:00:00")
    if scheduler != "none" and seconds is not None and seconds <= site.batch.warning:
        raise InputError(f"--time: {seconds} s are no more than the warning before the end, {site.batch.warning} s")
    launcher = site.launch.launcher
    if {"srun": "slurm", "flux": "flux"}.get(launcher, scheduler) != scheduler:
        raise InputError(f'launch.launcher = "{launcher}" does not start ranks under --scheduler {scheduler}')


def _fitting(config: Config, nodes: int, ranks_per_node: int) -> Iterator[int]:
    """The numbers of nodes on which the configuration runs, from ``nodes`` down. Raises InputError if not on these."""
    for count in range(nodes, 0, -1):
        try:
            config.resolved(ranks=count * ranks_per_node - config.train.spares)
        except InputError:
            if count == nodes:
                raise
        else:
            yield count


def duration(text: str) -> int:
    """Seconds of ``30`` (minutes), ``2:00:00`` (hours) or ``1-00:00:00`` (days). Raises InputError for another text."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)|(\d+))", text.strip(), re.ASCII)
    days, hours, minutes, seconds, plain = (int(group or 0) for group in match.groups()) if match else [0] * 5
    if days and hours > 23:
        match = None
    total = ((days * 24 + hours) * 60 + minutes + plain) * 60 + seconds
    if match is None or not total:
        raise InputError(
            f"--time {text}: expected minutes (30), hours:minutes:seconds (2:00:00) or days before them (1-00:00:00)"
        )
    return total


def _label(text: str) -> str:
    """``text`` as a name that every file system takes: at most 60 letters, digits and ``._=+-``."""
    word = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)[:60].strip("_")
    return word if word[:1].isalnum() else f"run{word}"


def _members(array: str) -> list[tuple[str, ...]]:
    """The overrides of each run of an array."""
    key, equals, values = array.partition("=")
    if equals and re.fullmatch(r"\s*\w+\.\w+\s*", key):
        members: list[tuple[str, ...]] = [(f"{key.strip()}={value}",) for value in _values(values)]
    else:
        try:
            lines = Path(array).read_text(encoding="utf-8").splitlines()
            members = [tuple(shlex.split(line, comments=True)) for line in lines]
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"--array {array}: no section.key=v1,v2,..., and no file of overrides: {why}") from None
        members = [member for member in members if member]
        if bad := [word for member in members for word in member if not word.isprintable()]:
            raise InputError(f"--array {array}: {bad[0]!r}: an unprintable character cannot stand in a script")
    if len(members) < 2:
        raise InputError(f"--array {literal(array)}: {len(members)} runs; an array has two or more")
    return members


def _values(text: str) -> list[str]:
    """``text`` at its commas, but for those inside brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        depth += (c in "[{") - (c in "]}") if not quote else 0
        if c == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += c
    return values
