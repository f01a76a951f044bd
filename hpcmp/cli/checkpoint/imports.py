"""``hpcmp checkpoint import``: a model in Hugging Face's format as a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..common import add_command
from .ranks import all_ranks

ABOUT = """\
Save a GPT-2 or Llama in Hugging Face's format (config.json beside model.safetensors, or beside its index and files) as
the checkpoint of step 0 in a new folder. `hpcmp generate` takes it, and so does a run, to begin with its weights:
checkpoint.initial = "ROOT", with the section [model] printed here. Numbers of 16 bits become float32. What our models
are not, such as scaled rotary positions or another activation, is refused. Under mpirun the ranks share the tensors."""

EXAMPLES = """\
examples:
  hpcmp checkpoint import gpt2 imported
  hpcmp generate imported --prompt 'The'
  mpirun -n 8 hpcmp checkpoint import Llama-2-7b-hf imported
  hpcmp train llama.toml checkpoint.initial=imported"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "import", "save a model in Hugging Face's format as a checkpoint", ABOUT, EXAMPLES)
    command.add_argument("folder", metavar="FOLDER", help="the model's folder, or one safetensors file in it")
    command.add_argument("root", metavar="ROOT", help="the folder of checkpoints to make")
    command.add_argument(
        "--tokenizer",
        metavar="NAME",
        help='"bytes", or the path of a tokenizer.json (default: the one in FOLDER, if there is one)',
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import; where the checkpoint is, and the keys of the model that are not as they are by default."""
    from ...data.tokenizer import load_tokenizer
    from ...training.config import Model
    from ...training.importing import import_model

    tokenizer = load_tokenizer(args.tokenizer).definition if args.tokenizer else None
    with all_ranks() as mesh:
        path, config = import_model(Path(args.folder), Path(args.root), mesh, tokenizer=tokenizer)
    given, default = dataclasses.asdict(config.model), dataclasses.asdict(Model())
    return {
        "folder": args.folder,
        "root": args.root,
        "checkpoint": str(path),
        "model": {k: v for k, v in given.items() if v != default[k] and k != "expert_ffn"},  # there are no experts
    }


def show(result: dict[str, Any]) -> str:
    """The result as text, with what a configuration needs to begin with the model."""
    from ...training.toml import literal

    lines = [f"{result['checkpoint']}: the model of {result['folder']}; a run that begins with it needs", ""]
    lines += ["[model]", *(f"{key} = {literal(value)}" for key, value in result["model"].items())]
    return "\n".join([*lines, "", "[checkpoint]", f"initial = {literal(result['root'])}"])
