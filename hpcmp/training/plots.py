"""Drawings of a run's metrics as PNG. They need matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .layout import short
from .phases import PHASES
from .report import Run

log = logging.getLogger("hpcmp")

NEEDED = 'plots need matplotlib: pip install "hpcmp[plot]"'
_HIGHEST = 4  # medians: a step that takes longer, as the first one and those with a save do, is cut off in a drawing


def possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plotted(directory: Path) -> str:
    """The drawing of the loss of the run in ``directory``, ``loss.png`` in it; one that fails is logged."""
    output = directory / "loss.png"
    try:
        draw(Run(directory), output, [loss])
    except (OSError, ValueError) as error:
        log.warning("no plot of the loss: %s", error)
    return str(output)


def draw(run: Run, output: Path, panels: list[Callable[[Run, Any], None]] | None = None) -> None:
    """Draw ``panels`` (all that tell something) one below the other. Raises OSError if ``output`` cannot be written."""
    from matplotlib.figure import Figure

    panels = panels or [loss, throughput, utilisation, phases, *([spread] if _differ(run) else [])]
    figure = Figure(figsize=(8, 4.5 if len(panels) == 1 else 3 * len(panels)), layout="constrained")
    figure.suptitle(f"{run.directory.name}  {short(run.config.layout)}" if run.config else run.directory.name)
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        panel(run, axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(output, dpi=120)


def loss(run: Run, axes: Any) -> None:
    """The loss over the tokens seen."""
    for key, label, style in (("loss", "training", "-"), ("held_out", "held out", "o-")):
        tokens, values = run.series(key, over="tokens")
        if values:
            axes.plot(tokens, values, style, label=label, linewidth=1 if key == "loss" else 2, markersize=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")


def throughput(run: Run, axes: Any) -> None:
    """Tokens a second over steps."""
    axes.plot(*run.series("tokens_per_second"), linewidth=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens/s")
    _over_steps(run, axes)


def utilisation(run: Run, axes: Any) -> None:
    """The share of the machine's peak over steps."""
    steps, shares = run.series("share_of_peak")
    axes.plot(steps, [100 * share for share in shares], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("% of peak")
    _over_steps(run, axes)


def phases(run: Run, axes: Any) -> None:
    """Where the time of a step goes, on the mean over ranks."""
    looks = run.phases()
    if looks:
        means = ([look.spread[name]["mean"] for look in looks] for name in PHASES)
        axes.stackplot([look.step for look in looks], *means, labels=PHASES)
        _cut(axes, [sum(each["mean"] for each in look.spread.values()) for look in looks])
    axes.set_ylabel("seconds a step,\nmean of the ranks")
    _over_steps(run, axes)


def spread(run: Run, axes: Any) -> None:
    """Of each phase the time of the fastest rank, to that of the slowest."""
    looks = run.phases()
    for i, name in enumerate(PHASES if looks else ()):
        ends = ([look.spread[name][end] for look in looks] for end in ("least", "most"))
        axes.fill_between([look.step for look in looks], *ends, alpha=0.4, color=f"C{i}", label=name)
    if looks:
        _cut(axes, [max(each["most"] for each in look.spread.values()) for look in looks])
    axes.set_ylabel("seconds a step,\nfastest to slowest rank")
    _over_steps(run, axes)


def _differ(run: Run) -> bool:
    """Whether there are ranks to tell apart."""
    return any(each["most"] > each["least"] for look in run.phases() for each in look.spread.values())


def _cut(axes: Any, seconds: list[float]) -> None:
    """Leave room for usual steps, of which a single one that takes very long would leave nothing to be seen."""
    axes.set_ylim(0, min(1.05 * max(seconds), _HIGHEST * statistics.median(seconds)) or None)


def _over_steps(run: Run, axes: Any) -> None:
    """An axis of steps, with the places where the run was started again."""
    again = [record["step"] for record in run.starts[1:] if isinstance(record.get("step"), int)]
    for step in again:
        axes.axvline(step, linestyle=":", color="grey")
    axes.set_xlabel("step (dotted: restarts)" if again else "step")
