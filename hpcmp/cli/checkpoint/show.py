"""``hpcmp checkpoint show``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from ..common import add_command
from .text import PATH_HELP, cut, moment, pairs, plural, size, table

ABOUT = """\
Say what is in a checkpoint: its tensors, files and storage, the layout that wrote it and the state of the run. Tensors
that differ in the numbers of their names alone share a row."""

EXAMPLES = """\
examples:
  hpcmp checkpoint show runs/gpt/checkpoints
  hpcmp checkpoint show runs/gpt/checkpoints/step_00001000 --digests      # each piece: file, place, digest"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "show", "what is in a checkpoint", ABOUT, EXAMPLES)
    command.add_argument("path", metavar="PATH", help=PATH_HELP)
    command.add_argument(
        "--digests", action="store_true", help="also where each piece of each tensor lies, and its digest"
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What is in the checkpoint."""
    from ...checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(args.path))
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(shape), "dtype": dtype.name, "bytes": math.prod(shape) * dtype.itemsize}
        for name, (shape, dtype) in checkpoint.tensors.items()
    }
    if args.digests:
        for name, tensor in checkpoint.manifest.tensors.items():
            keys = "file", "start", "count", "digest"
            tensors[name]["pieces"] = [{key: getattr(piece, key) for key in keys} for piece in tensor.pieces]
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


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    layout, files = result["layout"], result["files"]
    lines = [
        result["checkpoint"],
        f"step {result['step']}, saved {moment(result['saved'])}",
        *([f"layout      {pairs(layout)}"] if isinstance(layout, dict) else []),
        f"storage     {result['storage']}: {plural(len(files), 'file')}, {size(sum(files.values()))}",
        f"parameters  {result['parameters']:,}",
        "",
        *_tree(result["tensors"]),
    ]
    if any("pieces" in tensor for tensor in result["tensors"].values()):
        lines += ["", *_pieces(result["tensors"])]
    if state := {key: value for key, value in result["state"].items() if key != "layout"}:
        lines += ["", "state"]
        for key, value in state.items():
            lines += _summary(key, value)
    return cut(lines)


def _tree(tensors: dict[str, Any]) -> list[str]:
    """Aligned rows of name, shape, dtype and size; tensors that differ in numbers in their name alone share a row."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, t in tensors.items():
        kind = re.sub(r"(?<=/)\d+(?=/)", "#", name), tuple(t["shape"]), t["dtype"]
        groups.setdefault(kind, []).append(name)
    rows = [("tensor", "", "shape", "dtype", "size")]
    for (_, shape, dtype), names in sorted(groups.items(), key=lambda item: _natural(item[1][0])):
        total = sum(tensors[name]["bytes"] for name in names)
        times = f"{len(names)} x" if len(names) > 1 else ""
        rows.append((_joined(names), times, " x ".join(map(str, shape)) or "scalar", dtype, size(total)))
    rows.append((plural(len(tensors), "tensor"), "", "", "", size(sum(t["bytes"] for t in tensors.values()))))
    return table(rows, "<><<>")


def _pieces(tensors: dict[str, Any]) -> list[str]:
    """Aligned rows of the pieces of all tensors."""
    rows = [("tensor", "part", "file", "digest")]
    for name in sorted(tensors, key=_natural):
        for piece in tensors[name]["pieces"]:
            ends = zip(piece["start"], piece["count"], strict=True)
            part = ", ".join(f"{a}:{a + n}" for a, n in ends)
            rows.append((name, f"[{part}]", piece["file"], piece["digest"]))
    return table(rows, "<<<<")


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
    return [f"{indent}{key:<16}  {pairs(value) if isinstance(value, dict) else json.dumps(value)}"]
