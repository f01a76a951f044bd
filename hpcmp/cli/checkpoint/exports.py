"""``hpcmp checkpoint export``: a checkpoint's model in Hugging Face's format."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..common import add_command
from .progress import Bar
from .ranks import all_ranks
from .text import PATH_HELP, size

ABOUT = """\
Write the model of a checkpoint to a new folder as Hugging Face's transformers read it: GPT-2 or Llama in safetensors,
config.json, and tokenizer.json if the run's tokenizer is one. Under mpirun the ranks share the files; none ever holds
more than a block of a tensor. Experts, and what else GPT-2 and Llama have no place for, are refused."""

EXAMPLES = """\
examples:
  hpcmp checkpoint export runs/gpt/checkpoints exported --dtype bfloat16
  mpirun -n 4 hpcmp checkpoint export runs/gpt/checkpoints/step_00001000 exported --max-shard-size 2GB"""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "export", "write the model in Hugging Face's format", ABOUT, EXAMPLES)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=PATH_HELP)
    command.add_argument("folder", metavar="FOLDER", help="the folder to make")
    command.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="of the numbers (default: as saved)"
    )
    command.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="the most that a file holds, unless a single tensor is larger: 5GB (the default), 500MB, ...",
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export; the files and their bytes."""
    from ...checkpoint import open_checkpoint
    from ...training.exporting import export_model

    with all_ranks() as mesh:
        checkpoint = open_checkpoint(Path(args.checkpoint), mesh)
        with Bar("export", mesh.rank) as bar:
            files = export_model(
                checkpoint, Path(args.folder), dtype=args.dtype, shard_bytes=args.max_shard_size, progress=bar
            )
        return {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "folder": args.folder, "files": files}


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['folder']}: the model of {result['checkpoint']} (step {result['step']})"]
    return "\n".join(lines + [f"  {name}  {size(count)}" for name, count in result["files"].items()])


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))
