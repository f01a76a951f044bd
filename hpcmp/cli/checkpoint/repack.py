"""``hpcmp checkpoint repack``: a checkpoint once more, in another storage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..common import add_command
from .ranks import all_ranks
from .text import PATH_HELP, plural, size

ABOUT = """\
Save a checkpoint once more in another storage: the same tensors, step and state, every byte compared with its digest
first. Under mpirun the ranks share the work; none ever holds more than a block of a tensor."""

EXAMPLES = """\
examples:
  hpcmp checkpoint repack runs/gpt/checkpoints/step_00001000 archive --storage shared     # one file
  mpirun -n 4 hpcmp checkpoint repack archive fast --storage files                        # a file for each rank"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "repack", "a checkpoint once more, in another storage", ABOUT, EXAMPLES)
    command.add_argument("source", metavar="SOURCE", help=PATH_HELP)
    command.add_argument("target", metavar="TARGET", help="the folder in which the new checkpoint appears")
    command.add_argument(
        "--storage",
        required=True,
        choices=("files", "node", "shared", "mpio"),
        metavar="KIND",
        help="files (one a rank), node (one a node), shared (one of all ranks) or mpio (the same by MPI-IO)",
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Repack; where the new checkpoint is, and its files."""
    from ...checkpoint import open_checkpoint
    from ...checkpoint.repack import repack

    with all_ranks() as mesh:
        source = open_checkpoint(Path(args.source), mesh)
        made = open_checkpoint(repack(source, Path(args.target), args.storage), mesh)
        files = {name: file.bytes for name, file in made.manifest.files.items()}
        return {
            "source": str(source.path),
            "checkpoint": str(made.path),
            "step": made.step,
            "storage": made.manifest.storage,
            "files": files,
            "bytes": sum(files.values()),
        }


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    files = f"{plural(len(result['files']), 'file')}, {size(result['bytes'])}"
    return f"{result['checkpoint']}: step {result['step']}, storage {result['storage']}: {files}"
