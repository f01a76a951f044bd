"""``hpcmp train``: the main job."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from .common import CONTINUE, OK, add_command

ABOUT = """\
Train a model as CONFIG.toml says, on every rank of mpirun or srun (or alone), and go on from the newest checkpoint
when there is one, whatever layout wrote it. The layout never changes the mathematics: the same steps, samples and
random numbers on any number of ranks."""

EXAMPLES = """\
examples:
  mpirun -n 2 hpcmp train gpt.toml layout.tp=2
  mpirun -n 8 hpcmp train gpt.toml layout.tp=2 layout.pp=2 train.steps=5000      # dp=2 is what is left

what comes out, in run.directory:
  metrics.jsonl    a line of JSON a step: loss, gradient norm, learning rate, tokens/s, share of peak flops
  checkpoints/     step_00001000/ ...: HDF5, every tensor in its global shape (`hpcmp checkpoint show`)
  config.toml      the configuration with every derived value filled in
  loss.png         with run.plot=true

All keys are in docs/configuration.md. SIGTERM and SIGUSR1 save and stop after the step at hand, with exit code 75."""


def register(subparsers: Any) -> None:
    """Add ``hpcmp train``."""
    command = add_command(subparsers, "train", "train a model as a configuration file says", ABOUT, EXAMPLES)
    command.add_argument("config", metavar="CONFIG.toml", help="the configuration")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of what the file says")
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train to the end; the summary."""
    from ..training.config import load_config
    from ..training.trainer import Trainer
    from .world import world

    config = load_config(args.config, args.overrides)
    with Trainer(config, world()) as trainer:

        def stop(number: int, frame: object) -> None:
            trainer.request_stop(f"received {signal.Signals(number).name}")
            signal.signal(number, signal.SIG_DFL)  # a second one ends at once

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, stop)
        summary = trainer.train()
    return summary | {"exit_code": OK if summary["finished"] else CONTINUE}


def show(result: dict[str, Any]) -> str:
    """The summary, for a person."""
    loss = "none taken" if result["loss"] is None else f"{result['loss']:.4f}"
    held_out = "nothing is held out" if result["held_out_loss"] is None else f"{result['held_out_loss']:.4f}"
    lines = [
        f"{result['reason']}: step {result['step']} of {result['steps']}",
        f"  loss         {loss} nats a token in the last step; held out: {held_out}",
        f"  speed        {result['tokens_per_second']:,.0f} tokens/s, {100 * result['share_of_peak']:.1f}% of peak",
        f"  checkpoint   {result['checkpoint']}",
        f"  metrics      {result['metrics']}",
    ]
    if "plot" in result:
        lines.append(f"  plot         {result['plot']}")
    return "\n".join(lines)
