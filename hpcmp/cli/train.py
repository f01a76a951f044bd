"""``hpcmp train``: the main job."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..batch import requeue
from .checkpoint.text import size, table
from .common import CONTINUE, OK, STUCK, add_command, log_all
from .signals import stopping

ABOUT = """\
Train a model as CONFIG.toml says, on every rank of mpirun or srun (or alone), and go on from the newest checkpoint
when there is one, whatever layout wrote it. The layout never changes the mathematics: the same steps, samples and
random numbers on any number of ranks."""

EXAMPLES = """\
examples:
  mpirun -n 2 hpcmp train gpt.toml layout.tp=2
  mpirun -n 8 hpcmp train gpt.toml layout.tp=2 layout.pp=2 train.steps=5000      # dp=2 is what is left
  mpirun -n 8 hpcmp train gpt.toml train.steps=5 --profile                       # a trace of the last three steps

what comes out, in run.directory:
  metrics.jsonl    a line of JSON a step: loss, gradient norm, learning rate, tokens/s, share of peak flops
  checkpoints/     step_00001000/ ...: HDF5, every tensor in its global shape (`hpcmp checkpoint show`)
  config.toml      the configuration with every derived value filled in
  manifest.jsonl   a line of JSON a start: versions, hosts, cores, job, data (`hpcmp report` reads all of these)
  loss.png         with run.plot=true
  profile/         with --profile: trace.json for https://ui.perfetto.dev or chrome://tracing, and summary.json

All keys are in docs/configuration.md. SIGTERM, SIGUSR1 and SIGUSR2 save and stop after the step at hand, with exit code
75, as does a job's time limit, before which there is time for a save; train.requeue=true has the job run again."""


_RANKS = 16  # rows of the table of ranks, at most


def register(subparsers: Any) -> None:
    """Add ``hpcmp train``."""
    command = add_command(subparsers, "train", "train a model as a configuration file says", ABOUT, EXAMPLES)
    command.add_argument("config", metavar="CONFIG.toml", help="the configuration")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of what the file says")
    command.add_argument(
        "--profile",
        metavar="N",
        nargs="?",
        type=_steps,
        const=3,
        default=0,
        help="write a trace of N steps (3), after two that compile, and say where their time went",
    )
    command.set_defaults(run=run, show=show, last=last)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train to the end; the summary."""
    from ..training.config import load_config
    from ..training.recovery import Recovery
    from .world import world

    recovery = Recovery(load_config(args.config, args.overrides), world(), lead=log_all)
    with stopping(recovery.request_stop):
        summary = recovery.run(lambda trainer: trainer.train(args.profile))
    args.speaks = recovery.leads
    if summary is None:  # this rank was a spare one to the end
        return {"exit_code": OK}
    code = OK if summary["finished"] else STUCK if summary["stuck"] else CONTINUE
    return summary | {"lost": recovery.lost, "exit_code": code}


def last(result: dict[str, Any]) -> None:
    """Have the job run again, if that is to be: the scheduler may end it before this returns."""
    if command := result["requeue"]:
        log = logging.getLogger("hpcmp")
        log.info("requeueing: %s", " ".join(command))
        if wrong := requeue(command):
            log.error("the job is not requeued: %s", wrong)


def show(result: dict[str, Any]) -> str:
    """The summary, for a person."""
    loss = "none taken" if result["loss"] is None else f"{result['loss']:.4f}"
    held_out = "not taken" if result["held_out_loss"] is None else f"{result['held_out_loss']:.4f}"
    lines = [
        f"{result['reason']}: step {result['step']} of {result['steps']}",
        f"  loss         {loss} nats a token in the last step; held out: {held_out}",
        f"  speed        {result['tokens_per_second']:,.0f} tokens/s, {100 * result['share_of_peak']:.1f}% of peak",
        f"  checkpoint   {result['checkpoint']}",
        f"  metrics      {result['metrics']}",
    ]
    if result["lost"]:
        ranks = ", ".join(f"rank {rank} on {host}" for rank, host in result["lost"].items())
        lines.append(f"  lost         {ranks}; the others went on")
    if "plot" in result:
        lines.append(f"  plot         {result['plot']}")
    if result["profile"]:
        lines += ["", *profile_lines(result["profile"])]
    return "\n".join(lines)


def profile_lines(found: dict[str, Any]) -> list[str]:
    """The summary of a profile, for a person."""
    ranks, last = found["ranks"], found["first"] + found["steps"] - 1
    lines = [
        f"profile of steps {found['first']} to {last}, {found['seconds']:.4g} s each ({found['on']}): {found['trace']}",
        *(f"  wrong: {problem}" for problem in found["problems"][:4]),
        "",
    ]
    columns = [name for name in ranks[0] if name != "step"]
    mean = {name: sum(rank[name] for rank in ranks) / len(ranks) for name in ranks[0]}
    told = [(f"rank {number}", rank) for number, rank in enumerate(ranks[:_RANKS])]
    shares = [("mean", mean), *told] if len(ranks) > 1 else told
    rows = [("share of a step", *columns)]
    rows += [(name, *(f"{rank[c] / (rank['step'] or 1):.1%}" for c in columns)) for name, rank in shares]
    lines += [*table(rows, "<" + ">" * len(columns)), ""]
    rows = [("longest layers", "", "a step", "calls", "rank")]
    for row in found["layers"]:
        seconds = f"{row['seconds'] * 1e3:.3f} ms"
        rows.append((row["layer"], row["direction"], seconds, f"{row['calls']:g}", f"{row['rank']}"))
    lines += table(rows, "<<>>>")
    rows = [("largest communications", "", "a step", "exposed", "of", "calls", "rank")]
    for row in found["communication"]:
        times = (f"{row[key] * 1e3:.3f} ms" for key in ("seconds", "exposed"))
        rows.append((row["operation"], row["axes"], *times, size(row["bytes"]), f"{row['calls']:g}", f"{row['rank']}"))
    return lines + (["", *table(rows, "<<>>>>>")] if len(rows) > 1 else [])


def _steps(given: str) -> int:
    """A number of steps to profile."""
    if not given.isdecimal() or not int(given):
        raise argparse.ArgumentTypeError(f"{given!r} is no number of steps; write --profile=3, or --profile at the end")
    return int(given)
