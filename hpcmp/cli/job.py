"""``hpcmp job``: a batch script for a run, and its submission."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..errors import InputError
from .common import add_command

ABOUT = """\
Write the batch script of a run: directives, modules and environment of the site, the launcher line with binding and
threads, a signal before the time limit that is passed on, the job that goes on after exit code 75, and a start on the
nodes that are left when some fail. Whether the ranks fit the layout is checked before."""

EXAMPLES = """\
examples:
  hpcmp job gpt.toml --scheduler slurm --nodes 4 --ranks-per-node 4 --time 2:00:00 --site jobs/sites/gpu-cluster.toml
  hpcmp job gpt.toml --scheduler slurm --nodes 4 --time 1-00:00:00 layout.tp=4 train.steps=50000 --submit
  hpcmp job gpt.toml --scheduler pbs --nodes 2 --time 12:00:00 --submit --chain 5    # each goes on where the last ended
  hpcmp job gpt.toml --scheduler slurm --time 60 --array optimizer.learning_rate=1e-3,2e-3,4e-3 --submit
  hpcmp job gpt.toml --scheduler none --ranks-per-node 2 && bash gpt.sh                # on this machine

--time is minutes (30), hours:minutes:seconds (2:00:00) or days before them (1-00:00:00). The runs of an array have
directories of their own in run.directory. More in docs/jobs.md."""


def register(subparsers: Any) -> None:
    """Add ``hpcmp job``."""
    command = add_command(subparsers, "job", "write a run's batch script, and submit it", ABOUT, EXAMPLES)
    command.add_argument("config", metavar="CONFIG.toml", help="the configuration")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of what the file says")
    command.add_argument("--scheduler", choices=("slurm", "pbs", "lsf", "flux", "none"), help="none: this machine")
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    command.add_argument(
        "--ranks-per-node", type=int, metavar="R", help="ranks on each (default: as the site file says)"
    )
    command.add_argument("--time", metavar="T", help="the time limit")
    command.add_argument("--site", metavar="FILE.toml", help="what the cluster needs (jobs/sites/)")
    command.add_argument("--name", help="of the job (default: the configuration's)")
    command.add_argument("--out", metavar="FILE", help="the script (default: NAME.sbatch and the like); - for stdout")
    command.add_argument("--array", metavar="SWEEP", help="section.key=v1,v2,..., or a file: a line of overrides a run")
    command.add_argument("--submit", action="store_true", help="submit it, and print the job's id")
    command.add_argument(
        "--chain", type=int, metavar="K", help="with --submit: K times, each job after the last one's end"
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write, and submit if that is asked; {"script", "ids", "nodes", "ranks", "runs"}."""
    from ..jobs import load_site, make_job, script, submit, write

    if args.chain is not None and args.chain < 1:
        raise InputError(f"--chain {args.chain}: expected at least 1")
    job = make_job(
        args.config,
        args.overrides,
        scheduler=args.scheduler,
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        time=args.time,
        array=args.array,
        chained=args.chain is not None,
        site=load_site(args.site) if args.site else None,
        name=args.name,
        path=None if args.out == "-" else args.out,
        command=_command(args),
    )
    if args.submit and (job.scheduler == "none" or args.out == "-"):
        raise InputError("--submit: there is no scheduler, or no file, to submit; start the script with bash")
    result: dict[str, Any] = {
        "script": job.path,
        "ids": [],
        "nodes": job.nodes,
        "ranks": job.nodes * job.ranks_per_node,
        "runs": len(job.members),
    }
    if args.out == "-":
        return result | {"script": "-", "text": script(job)}
    write(job)
    if args.submit:
        result["ids"] = submit(job, args.chain or 1)
    return result


def _command(args: argparse.Namespace) -> str:
    """The command line again, but for what does not change the script."""
    flags = ("scheduler", "nodes", "ranks_per_node", "time", "site", "name", "out", "array", "chain")
    given = [(f"--{flag.replace('_', '-')}", getattr(args, flag)) for flag in flags]
    words = [args.config, *(word for flag, value in given if value is not None for word in (flag, str(value)))]
    return shlex.join([*words, *args.overrides])


def show(result: dict[str, Any]) -> str:
    """The ids, or where the script is; or the script."""
    if "text" in result:
        return str(result["text"]).rstrip("\n")
    if result["ids"]:
        return "\n".join(result["ids"])
    counts = [(result[what], what) for what in ("nodes", "ranks", "runs")]
    return f"{result['script']}: " + ", ".join(f"{n} {what if n != 1 else what[:-1]}" for n, what in counts)
