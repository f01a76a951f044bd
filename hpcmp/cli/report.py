"""``hpcmp report``: a summary of a run, with plots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .checkpoint.text import page, plural, sizes, table
from .common import add_command
from .train import profile_lines

ABOUT = """\
Summarise the run in the directory RUN: first how it has ended, and why where its ranks left word; then configuration,
starts, loss, speed, where the time goes, slow ranks, checkpoints. It may be running: nothing of it is changed. Lines
that were cut off or damaged are left out, and counted."""

EXAMPLES = """\
examples:
  hpcmp report runs/gpt                        # and draws runs/gpt/report.png, where matplotlib is installed
  hpcmp report runs/gpt --plot /tmp/gpt.png
  hpcmp report runs/gpt --plot none --json"""


def register(subparsers: Any) -> None:
    """Add ``hpcmp report``."""
    command = add_command(subparsers, "report", "summarise a run, with plots", ABOUT, EXAMPLES)
    command.add_argument("run_directory", metavar="RUN", help="the run.directory of a run")
    command.add_argument("--plot", metavar="FILE", help="the drawing (default: RUN/report.png); none: draw nothing")
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The summary, and the drawing or why there is none."""
    from ..errors import reason
    from ..training import plots
    from ..training.report import Run, report

    found = Run(Path(args.run_directory))
    result = report(found) | {"plot": None, "no_plot": None}
    output = Path(args.plot) if args.plot else found.directory / "report.png"
    if args.plot == "none":
        return result
    if not plots.possible():
        return result | {"no_plot": plots.NEEDED}
    try:
        plots.draw(found, output)
    except (OSError, ValueError) as error:
        return result | {"no_plot": reason(error)}
    return result | {"plot": str(output)}


def show(result: dict[str, Any]) -> str:
    """The summary for a person."""
    config, rows = result["config"], []
    if config:
        m, t = config["model"], config["train"]
        rows.append(("model", f"{m['style']}, {m['layers']} layers of {m['hidden']}, {t['dtype']} on {t['device']}"))
        rows.append(("batch", f"{t['batch']} x {m['sequence']} tokens, {config['optimizer']['name']}"))
    rows += [("layout", result["layout"])] if result["layout"] else [("config.toml", result["problem"])]
    rows.append(("step", f"{result['step']:,}" + (f" of {result['steps']:,}" if result["steps"] else "")))
    if loss := result["loss"]:
        rows.append(("loss", f"{loss['first']:.4f} -> {loss['last']:.4f}, least {loss['least']:.4f} (nats a token)"))
    if held := result["held_out_loss"]:
        rows.append(("held out", f"{held['last']:.4f}, least {held['least']:.4f}"))
    if rate := result["tokens_per_second"]:
        rows.append(("speed", f"{rate['median']:,.0f} tokens/s (median of steps), at most {rate['most']:,.0f}"))
    if share := result["share_of_peak"]:
        rows.append(("utilisation", f"{100 * share['median']:.1f}% of peak, at most {100 * share['most']:.1f}%"))
    if result["skipped"]:
        rows.append(("skipped", plural(result["skipped"], "step")))
    rows += [("start", _start(start)) for start in result["starts"]]
    rows += [("lost", _recovery(each)) for each in result["recoveries"]]
    rows += _saves(result["checkpoints"])
    for each in result["slow"]:
        rows.append(
            ("slow", f"rank {each['rank']} ({each['host']}) in {each['phase']}: {plural(each['times'], 'time')}")
        )
    if result["damaged_lines"]:
        rows.append(("damaged", f"{plural(result['damaged_lines'], 'line')} left out"))
    if result["plot"] or result["no_plot"]:
        rows.append(("plot", result["plot"] or f"none: {result['no_plot']}"))
    ending, diagnosis = result["ending"], result["diagnosis"]
    told = diagnosis[1:] if ending["how"] == "failed" else diagnosis  # the first is said already
    lines = [f"{result['directory']}: {ending['text']}", *(f"  {line}" for line in told), ""]
    lines += [f"  {name:13}{text}" for name, text in rows]
    if result["phases"]:
        lines += ["", *_phases(result["phases"])]
    if result["profile"]:
        lines += ["", *profile_lines(result["profile"])]
    return page(lines)


def _start(start: dict[str, Any]) -> str:
    layout = sizes(start["layout"]) if start["layout"] else "unknown layout"
    job = f", {start['job'].get('scheduler')} job {start['job'].get('id')}" if start["job"] else ""
    where = f"{plural(start['ranks'] or 0, 'rank')} on {plural(len(start['hosts']), 'host')}"
    end = f"; to step {start['end'].get('step')}: {start['end'].get('reason')}" if start["end"] else ""
    return f"{start['time']} after step {start['step']}: {where} ({layout}), hpcmp {start['hpcmp']}{job}{end}"


def _recovery(found: dict[str, Any]) -> str:
    ranks = ", ".join(f"rank {rank} on {host}" for rank, host in found["lost"].items()) or "a connection"
    return (
        f"{ranks}; {found['ranks']:g} ranks went on after step {found['step']:g}, {found['seconds']:.1f} s later, with "
        f"{found['again']:g} steps to take again"
    )


def _saves(found: dict[str, Any]) -> list[tuple[str, str]]:
    newest = f", the newest of step {found['steps'][-1]:,}" if found["steps"] else ""
    rows = [("checkpoints", f"{len(found['steps'])} in {found['directory']}{newest}")]
    if found["saves"]:
        held = found["held_up_seconds"]
        rows.append(("saves", f"{found['saves']}, {found['save_seconds']:.2f} s each; training held up {held:.1f} s"))
    if found["incomplete"]:
        rows.append(("incomplete", ", ".join(found["incomplete"])))
    return rows


def _phases(phases: dict[str, dict[str, Any]]) -> list[str]:
    """A table: seconds a step of each phase."""
    rows: list[tuple[str, ...]] = [("a step's", "mean", "fastest", "slowest rank", "most often")]
    for name, each in phases.items():
        seconds = [f"{each[key]:.4f} s" for key in ("mean", "least", "most")]
        rows.append((name, *seconds, f"rank {each['slowest']} ({each['slowest_share']:.0%})"))
    return table(rows, "<>>>>")
