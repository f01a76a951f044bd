"""Results of ``step.py`` as text, and all of them as the table of docs/benchmarks.md.

python benchmarks/report.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def text(result: dict[str, Any]) -> str:
    """One measurement."""
    m = result["machine"]
    lines = [
        f"{result['size']} {result['layout']}, {result['threads']} thread(s) a rank{_recomputed(result)}; "
        f"{result['rounds']} turns of "
        f"{result['steps']} steps each, in alternation",
        f"{m['cpu']}, {m['cores']} cores, L3 {m['cache']}; {m['date']} UTC; load {m['load'][0]:.1f} before, "
        f"{m['load_after'][0]:.1f} after; losses differ by {result['loss_difference']:.1e}",
        "",
        f"{'program':18} {'tokens/s':>9} {'ms a step':>10} {'time / hpcmp: median, quartiles, range':>40} {'best':>6} "
        f"{'CPU time':>9} {'of peak':>8} {'MB a rank':>10} {'of model':>9} {'others':>7}",
    ]
    for name, p in result["programs"].items():
        r = p["ratio"]
        ratio = f"{r['median']:.2f}  {r['low']:.2f} to {r['high']:.2f}  {r['min']:.2f} to {r['max']:.2f}"
        lines.append(
            f"{name:18} {p['tokens_per_second']:9.0f} {1e3 * p['seconds']['median']:10.1f} {ratio:>40} "
            f"{p['best_ratio']:6.2f} {p['cpu_ratio']['median']:9.2f} {100 * p['of_peak']:7.0f}% "
            f"{p['memory'] / 1e6:10.0f} {p['memory_of_model'] / 1e6:9.0f} {100 * p['others']['median']:6.0f}%"
        )
    peaks = ", ".join(f"{name} {p['gemm_peak'] / 1e9:.0f}" for name, p in result["programs"].items())
    lines += ["", f"GEMM, best of 1536 x 1536, GFLOP/s over all ranks: {peaks}"]
    lines += sorted({p["software"] for p in result["programs"].values()})
    parts = dict(result["breakdown"])
    calls, whole = parts.pop("calls"), parts.pop("step")
    lines.append(f"hpcmp's step of rank 0 under timers, {whole:.1f} ms:")
    for kind, ms in parts.items():
        share = "" if kind in ("if not hidden", "fixed") else f"{100 * ms / whole:5.0f}%"
        lines.append(f"  {kind:15} {ms:8.1f} ms {share:6} {calls.get(kind, ''):>6}")
    return "\n".join(lines) + "\n"


def table(results: list[dict[str, Any]]) -> str:
    """All measurements: Markdown, a row each."""
    known = ("PyTorch eager", "PyTorch tuned", "PyTorch compiled")
    peers = [name for name in known if any(name in r["programs"] for r in results)]
    short = [name.split()[1] for name in peers]
    head = ["size, layout, threads", "BLAS of hpcmp", "tokens/s", "of peak", *(f"against {s}" for s in short)]
    head += [f"MB of the model: hpcmp, {', '.join(short)}", "and libraries", "others"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        programs = result["programs"]
        mine = programs["hpcmp"]
        blas = mine["software"].split(", ", 1)[1].rsplit(", ", 1)[0]
        cells = [f"{result['size']} {result['layout']}, {result['threads']}{_recomputed(result)}", blas]
        cells += [f"{mine['tokens_per_second']:.0f}", f"{100 * mine['of_peak']:.0f}%"]
        cells += [_against(programs[name]) if name in programs else "–" for name in peers]
        for key in ("memory_of_model", "memory"):
            cells.append(", ".join(f"{p[key] / 1e6:.0f}" for p in programs.values()))
        cells.append(f"{100 * max(p['others']['median'] for p in programs.values()):.0f}%")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _recomputed(result: dict[str, Any]) -> str:
    kind = result.get("recompute", "none")
    return "" if kind == "none" else f", recompute {kind}"


def _against(peer: dict[str, Any]) -> str:
    r = peer["ratio"]
    return (
        f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}); best {peer['best_ratio']:.2f}, "
        f"processor {peer['cpu_ratio']['median']:.2f}"
    )


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
