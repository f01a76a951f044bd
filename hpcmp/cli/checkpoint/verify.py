"""``hpcmp checkpoint verify``: read every byte of checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..common import FAILED, OK, add_command
from .progress import Bar
from .text import plural, size

ABOUT = """\
Read every byte of a checkpoint (of a folder, of all in it) and compare it with the digests that were saved with it:
finds every flipped bit, cut-off end and swapped file. Exits with 1 if anything is wrong."""

EXAMPLES = """\
example:
  hpcmp checkpoint verify runs/gpt/checkpoints"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(
        actions, "verify", "read every byte of a checkpoint and compare it with its digests", ABOUT, EXAMPLES
    )
    command.add_argument(
        "path", metavar="PATH", help="a checkpoint, or the folder of a run's checkpoints (all of them)"
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What is wrong with each checkpoint at a path."""
    from ...checkpoint import checkpoints, open_checkpoint

    found = []
    for path in checkpoints(Path(args.path)) or [open_checkpoint(Path(args.path)).path]:
        entry: dict[str, Any] = {"checkpoint": str(path), "tensors": 0, "bytes": 0}
        try:
            checkpoint = open_checkpoint(path)
            entry["tensors"] = len(checkpoint.tensors)
            entry["bytes"] = sum(file.bytes for file in checkpoint.manifest.files.values())
            with Bar(path.name) as bar:
                entry["problems"] = checkpoint.verify(bar)
        except CheckpointError as error:
            entry["problems"] = [str(error)]
        found.append(entry)
    return {"checkpoints": found, "exit_code": FAILED if any(entry["problems"] for entry in found) else OK}


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for entry in result["checkpoints"]:
        whole = f"whole; {plural(entry['tensors'], 'tensor')}, {size(entry['bytes'])}"
        lines.append(f"{entry['checkpoint']}: {'damaged' if entry['problems'] else whole}")
        lines += [f"  {problem}" for problem in entry["problems"]]
    return "\n".join(lines)
