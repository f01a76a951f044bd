"""``hpcmp checkpoint``: look at checkpoints, and check them."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .common import FAILED, OK, parent

PATH_HELP = "a checkpoint, such as run/checkpoints/step_00001000, or the folder of a run's checkpoints"
WIDTH = 118  # of a line on the terminal


def register(subparsers: Any) -> None:
    """Add ``hpcmp checkpoint`` and its actions."""
    about = "look at checkpoints, and check them"
    actions = subparsers.add_parser("checkpoint", help=about, description=about).add_subparsers(
        metavar="ACTION", required=True
    )
    show = actions.add_parser(
        "show",
        help="what is in a checkpoint",
        description="Say what is in a checkpoint (of a folder, the newest): tensors, files, and the state of the run.",
        parents=[parent],
    )
    show.add_argument("path", metavar="PATH", help=PATH_HELP)
    show.set_defaults(run=run_show, show=show_show)
    verify = actions.add_parser(
        "verify",
        help="read every byte of a checkpoint and compare it with its digests",
        description="Read every byte of a checkpoint (of a folder, of all in it) and compare it with the digests that "
        "were saved with it: finds every flipped bit, cut-off end and swapped file. Exits with 1 if anything is wrong.",
        parents=[parent],
    )
    verify.add_argument("path", metavar="PATH", help=PATH_HELP)
    verify.set_defaults(run=run_verify, show=show_verify)


def run_show(args: argparse.Namespace) -> dict[str, Any]:
    """``hpcmp checkpoint show``: what is in a checkpoint."""
    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(args.path))
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(shape), "dtype": dtype.name, "bytes": math.prod(shape) * dtype.itemsize}
        for name, (shape, dtype) in checkpoint.tensors.items()
    }
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "saved": checkpoint.saved,
        "storage": checkpoint.manifest.storage,
        "layout": checkpoint.state.get("layout"),
        "parameters": sum(math.prod(t["shape"]) for name, t in tensors.items() if name.startswith("model/")),
        "bytes": sum(t["bytes"] for t in tensors.values()),
        "tensors": tensors,
        "files": {name: file.bytes for name, file in checkpoint.manifest.files.items()},
        "state": checkpoint.state,
    }


def show_show(result: dict[str, Any]) -> str:
    """The result of ``hpcmp checkpoint show`` as text."""
    layout, files = result["layout"], result["files"]
    lines = [
        result["checkpoint"],
        f"step {result['step']}, saved {result['saved'][:19].replace('T', ' ')} UTC",
        *([f"layout      {_pairs(layout)}"] if isinstance(layout, dict) else []),
        f"storage     {result['storage']}: {len(files)} file{'s' * (len(files) != 1)}, {_size(sum(files.values()))}",
        f"parameters  {result['parameters']:,}",
        "",
        *_table(result["tensors"]),
    ]
    if state := {key: value for key, value in result["state"].items() if key != "layout"}:
        lines += ["", "state"]
        for key, value in state.items():
            lines += _summary(key, value)
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines)


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    """``hpcmp checkpoint verify``: what is wrong with each checkpoint at a path."""
    from ..checkpoint import checkpoints, open_checkpoint

    found = []
    for path in checkpoints(Path(args.path)):
        entry: dict[str, Any] = {"checkpoint": str(path), "tensors": 0, "bytes": 0}
        try:
            checkpoint = open_checkpoint(path)
            entry["tensors"] = len(checkpoint.tensors)
            entry["bytes"] = sum(file.bytes for file in checkpoint.manifest.files.values())
            entry["problems"] = checkpoint.verify()
        except CheckpointError as error:
            entry["problems"] = [str(error)]
        found.append(entry)
    if not found:
        raise CheckpointError(f"{args.path}: there is no checkpoint")
    return {"checkpoints": found, "exit_code": FAILED if any(entry["problems"] for entry in found) else OK}


def show_verify(result: dict[str, Any]) -> str:
    """The result of ``hpcmp checkpoint verify`` as text."""
    lines = []
    for entry in result["checkpoints"]:
        whole = f"whole; {entry['tensors']:,} tensors, {_size(entry['bytes'])}"
        lines.append(f"{entry['checkpoint']}: {'damaged' if entry['problems'] else whole}")
        lines += [f"  {problem}" for problem in entry["problems"]]
    return "\n".join(lines)


def _table(tensors: dict[str, Any]) -> list[str]:
    """Aligned rows of name, shape, dtype and size; tensors that differ in numbers in their name alone share a row."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, t in tensors.items():
        kind = re.sub(r"(?<=/)\d+(?=/)", "#", name), tuple(t["shape"]), t["dtype"]
        groups.setdefault(kind, []).append(name)
    rows = [("tensor", "", "shape", "dtype", "size")]
    for (_, shape, dtype), names in sorted(groups.items(), key=lambda item: _natural(item[1][0])):
        size = sum(tensors[name]["bytes"] for name in names)
        times = f"{len(names)} x" if len(names) > 1 else ""
        rows.append((_joined(names), times, " x ".join(map(str, shape)) or "scalar", dtype, _size(size)))
    total = sum(t["bytes"] for t in tensors.values())
    rows.append((f"{len(tensors):,} tensors", "", "", "", _size(total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<><<>"
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows
    ]


def _joined(names: list[str]) -> str:
    """blocks/0/up, blocks/1/up, blocks/3/up: ``blocks/0-1,3/up``."""
    words = []
    for column in zip(*(name.split("/") for name in names), strict=True):
        numbers = sorted({int(word) for word in column}) if len(set(column)) > 1 else []
        runs = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            members = [number for _, number in run]
            runs.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else f"{members[0]}")
        words.append(",".join(runs) or column[0])
    return "/".join(words)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split("/")]


def _summary(key: str, value: Any, indent: str = "  ") -> list[str]:
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        return [f"{indent}{key}", *(line for k, v in value.items() for line in _summary(k, v, indent + "  "))]
    return [f"{indent}{key:<16}  {_pairs(value) if isinstance(value, dict) else json.dumps(value)}"]


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in values.items())


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.95 or unit == "PB":
            break
    return f"{count:,.1f} {unit}"
