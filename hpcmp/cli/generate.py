"""``hpcmp generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import add_command

ABOUT = """\
Continue a prompt with the model of a checkpoint, which holds all that is needed: weights, configuration and tokenizer.
Under mpirun the ranks share each layer (tensor parallelism), on any number of them and whatever layout wrote the
checkpoint; the text is the same."""

EXAMPLES = """\
examples:
  hpcmp generate runs/gpt/checkpoints --prompt 'def main():' --tokens 300
  mpirun -n 4 hpcmp generate runs/gpt/checkpoints/step_00001000 --prompt 'import ' --temperature 0.5 --top-p 0.95"""


def register(subparsers: Any) -> None:
    """Add ``hpcmp generate``."""
    command = add_command(subparsers, "generate", "text from a checkpoint", ABOUT, EXAMPLES)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder of them (the newest)")
    command.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: a new document)")
    command.add_argument("--tokens", type=int, default=200, metavar="N", help="how many tokens at most (default: 200)")
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: 0.8)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest with P together (default: 1)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, printing as it goes; the text."""
    from ..errors import InputError
    from ..training.generate import Generator, Sampling
    from .world import world

    for flag, good in (
        ("--tokens", args.tokens >= 1),
        ("--temperature", args.temperature >= 0),
        ("--top-k", args.top_k is None or args.top_k >= 1),
        ("--top-p", 0 < args.top_p <= 1),
    ):
        if not good:
            raise InputError(f"{flag} {getattr(args, flag[2:].replace('-', '_'))} is out of range")
    with Generator(args.checkpoint, world(), device=args.device) as generator:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        prompt = generator.tokenizer.encode(args.prompt.encode()).tolist()
        tokens: list[int] = []
        said = ""
        speaks = generator.mesh.rank == 0 and not args.json
        if speaks:
            print(args.prompt, end="", flush=True)
        for token in generator.tokens(prompt, args.tokens, sampling):
            tokens.append(token)
            text = generator.tokenizer.decode(tokens)
            if speaks and not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                sys.stdout.write(text[len(said) :])
                sys.stdout.flush()
                said = text
        if speaks:
            print()
        return {
            "checkpoint": str(generator.checkpoint.path),
            "step": generator.checkpoint.step,
            "prompt": args.prompt,
            "text": generator.tokenizer.decode(tokens),
            "tokens": len(tokens),
        }
