"""``hpcmp checkpoint show``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..common import add_command
from .text import PATH_HELP, groups, moment, natural, page, plural, size, sizes, table, value, wrapped

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
        *([f"layout      {sizes(layout)}"] if isinstance(layout, dict) else []),
        f"storage     {result['storage']}: {plural(len(files), 'file')}, {size(sum(files.values()))}",
        f"parameters  {result['parameters']:,}",
        "",
        *_tree(result["tensors"]),
    ]
    if any("pieces" in tensor for tensor in result["tensors"].values()):
        lines += ["", *_pieces(result["tensors"])]
    if result["state"]:
        lines += ["", "state"]
        for key, item in result["state"].items():
            lines += _summary(key, item)
    return page(lines)


def _tree(tensors: dict[str, Any]) -> list[str]:
    """Aligned rows of name, shape, dtype and size; tensors that differ in numbers in their name alone share a row."""
    rows = [("tensor", "", "shape", "dtype", "size")]
    for heading, names in groups(tensors, lambda name: (tuple(tensors[name]["shape"]), tensors[name]["dtype"])):
        total, first = sum(tensors[name]["bytes"] for name in names), tensors[names[0]]
        times = f"{len(names)} x" if len(names) > 1 else ""
        rows.append((heading, times, " x ".join(map(str, first["shape"])) or "scalar", first["dtype"], size(total)))
    rows.append((plural(len(tensors), "tensor"), "", "", "", size(sum(t["bytes"] for t in tensors.values()))))
    return table(rows, "<><<>")


def _pieces(tensors: dict[str, Any]) -> list[str]:
    """Aligned rows of the pieces of all tensors."""
    rows = [("tensor", "part", "file", "digest")]
    for name in sorted(tensors, key=natural):
        for piece in tensors[name]["pieces"]:
            ends = zip(piece["start"], piece["count"], strict=True)
            part = ", ".join(f"{a}:{a + n}" for a, n in ends)
            rows.append((name, f"[{part}]", piece["file"], piece["digest"]))
    return table(rows, "<<<<")


def _summary(key: str, item: Any, indent: str = "  ") -> list[str]:
    if isinstance(item, dict) and any(isinstance(inner, dict) for inner in item.values()):
        return [f"{indent}{key}", *(line for k, v in item.items() for line in _summary(k, v, indent + "  "))]
    return wrapped(f"{indent}{key:<16}  ", value(item))
