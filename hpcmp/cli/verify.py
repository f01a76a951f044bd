"""``hpcmp verify``: proof that layouts give the serial model's numbers."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .common import FAILED, OK, add_command

ABOUT = """\
Build the serial model and each layout from CONFIG.toml, step both on the same batches in float64, optimizer included,
and compare the loss, the gradient's norm, and every parameter's gradient and weight. Exit code 1 if anything differs by
more than the tolerance."""

EXAMPLES = """\
examples:
  mpirun -n 8 hpcmp verify gpt.toml --layout tp=2,pp=2,dp=2 --layout tp=8 --layout pp=3,tp=2,schedule=zb-h1
  mpirun -n 4 hpcmp verify gpt.toml train.batch=6 train.microbatch=1 model.dropout=0.1 --layout tp=2,sp=0,pp=2

a layout:
  dp, pp, tp       replicas, pipeline stages, tensor-parallel ranks (1 if not named)
  sp               sequence parallelism: 1 or 0
  schedule         1f1b, gpipe or zb-h1
  recompute        none, full, attention or activations
  micro            samples in a microbatch

Rank 0 holds the whole serial model in float64: give a smaller model.* if yours does not fit. The batches are those of
data.path, or random tokens if it is not set."""


def register(subparsers: Any) -> None:
    """Add ``hpcmp verify``."""
    command = add_command(
        subparsers, "verify", "prove that a layout gives the serial model's gradients", ABOUT, EXAMPLES
    )
    command.add_argument("config", metavar="CONFIG.toml", help="the configuration")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of what the file says")
    command.add_argument(
        "--layout", action="append", metavar="LAYOUT", help="such as tp=2,pp=2; may be repeated (default: CONFIG's own)"
    )
    command.add_argument("--steps", type=int, default=2, metavar="N", help="optimizer steps to take (default: 2)")
    command.add_argument(
        "--tolerance", type=float, default=1e-10, metavar="X", help="largest relative difference (default: 1e-10)"
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verify every layout; the reports."""
    from ..errors import InputError
    from ..training.config import load_config, with_layout
    from ..training.verify import resolve, source_of, verify
    from .world import world

    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: at least 1")
    config = load_config(args.config, args.overrides)
    comm = world()
    texts = args.layout or [None]
    wanted = [config if text is None else with_layout(config, text) for text in texts]
    if args.layout is None:
        have = 1 if comm is None else comm.size
        wanted = [dataclasses.replace(config, layout=config.layout.resolved(have))]
    configs = [resolve(c) for c in wanted]
    reports = verify(configs, comm, source_of(configs[0]), steps=args.steps)
    good = all(report.worst <= args.tolerance for report in reports)
    return {
        "steps": args.steps,
        "tolerance": args.tolerance,
        "layouts": [
            dataclasses.asdict(report) | {"worst": report.worst, "equal": report.worst <= args.tolerance}
            for report in reports
        ],
        "left_out": [] if config.train.fp8 == "none" else ["train.fp8"],
        "equal": good,
        "exit_code": OK if good else FAILED,
    }


def show(result: dict[str, Any]) -> str:
    """A table a layout, and a line each at the end."""
    lines, ends = [], []
    for report in result["layouts"]:
        wide = max((len(p["name"]) for p in report["parameters"]), default=4)
        lines += [
            f"{report['layout']} on {report['ranks']} ranks",
            f"  {'parameter':{wide}}  gradient    weight  shape",
        ]
        for p in report["parameters"]:
            shape = " x ".join(map(str, p["shape"]))
            lines.append(f"  {p['name']:{wide}}  {p['gradient']:8.1e}  {p['weight']:8.1e}  {shape}")
        lines.append("")
        worst = max(report["parameters"], key=lambda p: max(p["gradient"], p["weight"]))
        verdict = "equal" if report["equal"] else f"DIFFERENT, most in {worst['name']}"
        ends.append(
            f"{report['layout']}: {verdict}: worst {report['worst']:.1e} (loss {report['loss']:.1e}, "
            f"gradient norm {report['norm']:.1e})"
        )
    ends.append(
        f"largest relative difference allowed: {result['tolerance']:g}, over {result['steps']} steps in float64"
        + "".join(f", without {key}" for key in result["left_out"])
    )
    return "\n".join(lines + ends)
