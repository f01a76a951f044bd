"""``hpcmp checkpoint list``: the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..common import add_command
from .text import moment, page, size, sizes, table

ABOUT = """\
List the checkpoints in a folder, the last one saved first: step, time, size, storage and the layout that wrote it. One
is "complete" if its manifest is sound and its files are there in full length; `hpcmp checkpoint verify` reads them."""

EXAMPLES = """\
example:
  hpcmp checkpoint list runs/gpt/checkpoints"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "list", "the checkpoints of a run", ABOUT, EXAMPLES)
    command.add_argument("path", metavar="PATH", help="the folder of a run's checkpoints, or one checkpoint")
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of each checkpoint without reading its numbers."""
    from ...checkpoint import checkpoints, open_checkpoint

    found = []
    for path in checkpoints(Path(args.path)) or [open_checkpoint(Path(args.path)).path]:
        entry: dict[str, Any] = {"checkpoint": str(path), "complete": True}
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            found.append(entry | {"complete": False, "problem": str(error)})
            continue
        layout = checkpoint.state.get("layout")
        found.append(
            entry
            | {
                "step": checkpoint.step,
                "saved": checkpoint.saved,
                "storage": checkpoint.manifest.storage,
                "files": len(checkpoint.manifest.files),
                "bytes": sum(file.bytes for file in checkpoint.manifest.files.values()),
                "layout": layout if isinstance(layout, dict) else None,
            }
        )
    return {"checkpoints": found}


def show(result: dict[str, Any]) -> str:
    """The result as text: a row a checkpoint."""
    rows = [("checkpoint", "step", "saved", "size", "storage", "layout")]
    problems = []
    for entry in result["checkpoints"]:
        name = Path(entry["checkpoint"]).name
        if not entry["complete"]:
            problems.append(f"{name}: not complete: {entry['problem']}")
            continue
        rows.append(
            (
                name,
                f"{entry['step']:,}",
                moment(entry["saved"]),
                size(entry["bytes"]),
                f"{entry['storage']} ({entry['files']})",
                "" if entry["layout"] is None else sizes(entry["layout"]),
            )
        )
    return page((table(rows, "<><><<") if len(rows) > 1 else []) + problems)
