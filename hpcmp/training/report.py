"""A summary of a run, of what it left in its directory: read with care, since a run may have ended in any way."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.directory import scan
from ..checkpoint.manifest import Manifest
from ..errors import InputError
from .config import Config
from .diagnosis import diagnose
from .ending import ending
from .layout import short
from .manifest import NAME
from .phases import PHASES
from .profile_summary import read_summary
from .records import read_records
from .toml import read_toml

METRICS, CONFIG, RECOVERIES = "metrics.jsonl", "config.toml", "recoveries.jsonl"


class Look(NamedTuple):
    """The ``steps`` steps that end with ``step``: {phase: its spread over the ranks}, as ``phases.spread`` gives it."""

    step: float
    steps: float
    spread: dict[str, dict[str, float]]


class Run:
    """What a run's directory holds: ``config`` (None: not there, or damaged), the records of its ``starts``, each with
    its ``end`` if it came to one in order, and of its ``metrics``, and how many ``damaged`` lines were left out. Raises
    InputError if it is no run's."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.damaged = directory, 0
        if not directory.is_dir():
            raise InputError(f"{directory}: there is no such directory")
        if not any((directory / name).exists() for name in (METRICS, CONFIG, NAME)):
            raise InputError(f"{directory}: no run's directory: there is no {METRICS} in it")
        self.config: Config | None = None
        self.problem = ""
        try:
            self.config = Config.from_dict(read_toml(directory / CONFIG))
        except InputError as error:
            self.problem = str(error)
        self.starts: list[dict[str, Any]] = []
        for record in self._read(NAME):
            if "ended" not in record:
                self.starts.append(record)
            elif self.starts:
                self.starts[-1]["end"] = record
        self.metrics, self.recoveries = self._read(METRICS), self._read(RECOVERIES)

    def series(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """The numbers of a key of the metrics, and those of ``over`` beside them."""
        pairs = [(r[over], r[key]) for r in self.metrics if _number(r.get(over)) and _number(r.get(key))]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def phases(self) -> list[Look]:
        """Of each line of the log, the spread of each phase over the ranks."""
        found = []
        for record in self.metrics:
            table = record.get("phases")
            if _number(record.get("step")) and isinstance(table, dict):
                whole = {name: each for name, each in table.items() if name in PHASES and isinstance(each, dict)}
                keys = {"mean", "least", "fastest", "most", "slowest"}
                sound = all(set(each) == keys and all(map(_number, each.values())) for each in whole.values())
                if len(whole) == len(PHASES) and sound:
                    found.append(Look(record["step"], _or_0(record.get("of_steps")) or 1.0, whole))
        return found

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if not path.exists():
            return []
        try:
            records, damaged = read_records(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        self.damaged += damaged
        return records


def report(run: Run) -> dict[str, Any]:
    """All of the summary, in JSON's types; null or empty where nothing is known."""
    losses, held_out = run.series("loss")[1], run.series("held_out")[1]
    config, diagnosis = run.config, diagnose(run.directory)
    step = int(max(run.series("loss")[0], default=-1)) + 1
    return {
        "directory": str(run.directory),
        "ending": ending(run.directory, run.starts, step, diagnosis)._asdict(),
        "diagnosis": diagnosis,
        "config": config.to_dict() if config else None,
        "problem": run.problem,
        "layout": short(config.layout) if config else None,
        "step": step,
        "steps": config.train.steps if config else None,
        "loss": {"first": losses[0], "last": losses[-1], "least": min(losses)} if losses else None,
        "held_out_loss": {"last": held_out[-1], "least": min(held_out)} if held_out else None,
        "skipped": sum("skipped" in record for record in run.metrics),
        "tokens_per_second": _rates(run.series("tokens_per_second")[1]),
        "share_of_peak": _rates(run.series("share_of_peak")[1]),
        "seconds": sum(run.series("seconds")[1]),
        "phases": _phases(run),
        "slow": _slow(run.metrics),
        "profile": read_summary(run.directory),
        "starts": [_start(record) for record in run.starts],
        "recoveries": [_recovery(record) for record in run.recoveries],
        "checkpoints": _checkpoints(run),
        "damaged_lines": run.damaged,
    }


def _rates(values: list[float]) -> dict[str, float] | None:
    """The first steps of a start are slower: the median tells what is usual."""
    if not values:
        return None
    return {"median": statistics.median(values), "most": max(values), "last": values[-1]}


def _phases(run: Run) -> dict[str, dict[str, Any]]:
    """Of each phase the mean over ranks and steps, in seconds; the least and the most of a rank, likewise; and the rank
    that was slowest most often, with the share of the lines of the log in which it was."""
    found: dict[str, dict[str, Any]] = {}
    looks = run.phases()
    for name in PHASES if looks else ():
        weights, of = [look.steps for look in looks], [look.spread[name] for look in looks]
        rank, times = Counter(int(each["slowest"]) for each in of).most_common(1)[0]
        means = {key: statistics.fmean((e[key] for e in of), weights) for key in ("mean", "least", "most")}
        found[name] = {**means, "slowest": rank, "slowest_share": times / len(of)}
    return found


def _slow(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which ranks fell behind those like them, in what, and in how many lines of the log."""
    count: Counter[tuple[str, int, str]] = Counter()
    for record in metrics:
        for each in record["slow"] if isinstance(record.get("slow"), list) else ():
            if isinstance(each, dict):
                count[str(each.get("phase")), int(_or_0(each.get("rank"))), str(each.get("host", ""))] += 1
    return [{"phase": p, "rank": r, "host": h, "times": n} for (p, r, h), n in count.most_common()]


def _start(record: dict[str, Any]) -> dict[str, Any]:
    ranks, hosts = record.get("ranks"), record.get("hosts")
    code, layout = record.get("code"), record.get("layout")
    job, end = record.get("job"), record.get("end")
    return {
        "time": record.get("time"),
        "step": record.get("step"),
        "ranks": len(ranks) if isinstance(ranks, list) else None,
        "hosts": hosts if isinstance(hosts, list) else [],
        "layout": layout if isinstance(layout, dict) else None,
        "hpcmp": code.get("hpcmp") if isinstance(code, dict) else None,
        "job": job if isinstance(job, dict) else None,
        "end": end if isinstance(end, dict) else None,
    }


def _recovery(record: dict[str, Any]) -> dict[str, Any]:
    """Of ranks that were lost, and what went on without them: ``lost`` has the host of each."""
    lost = record.get("lost")
    numbers = {key: _or_0(record.get(key)) for key in ("ranks", "step", "again", "seconds")}
    return {"lost": {str(r): str(h) for r, h in lost.items()} if isinstance(lost, dict) else {}, **numbers}


def _checkpoints(run: Run) -> dict[str, Any]:
    """What there is, and what saves took."""
    root = Path(run.config.checkpoint.directory) if run.config and run.config.checkpoint.directory else None
    root = root if root and root.is_dir() else run.directory / "checkpoints"  # it may have been moved
    try:
        found = scan(root) if root.is_dir() else []
    except OSError:
        found = []
    complete = [entry.step for _, entry in found if isinstance(entry, Manifest)]
    seconds, held = run.series("save_seconds")[1], run.series("held_up_seconds")[1]
    return {
        "directory": str(root),
        "steps": sorted(complete),
        "incomplete": [path.name for path, entry in found if not isinstance(entry, Manifest)],
        "saves": len(seconds),
        "save_seconds": statistics.median(seconds) if seconds else None,
        "held_up_seconds": sum(held),
    }


def _number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _or_0(value: Any) -> float:
    return float(value) if _number(value) else 0.0
