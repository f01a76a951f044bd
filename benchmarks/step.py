"""A training step of hpcmp and of PyTorch, in alternation: tokens a second, their ratio and its spread, memory.

    python benchmarks/step.py --size S --layout serial --threads 1 --torch PYTHON

PYTHON is an interpreter that has PyTorch (this one, if it has; without any, hpcmp is measured alone). Both start from
the same weights, see the same tokens, and must have the same losses. Then they take turns of a few steps, one program
working while the others sleep (``common.py``). --variants: ``eager``; ``tuned``, with an allocator that keeps memory,
and huge pages; ``compiled``, by torch.compile, tuned as well (serial and dp). Results go to benchmarks/results/, as
JSON and as text. Figures of a machine that others use are worth little: the share of it that others had is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import LAYOUTS, ROOT, SIZES, Job, machine, ranks, spread
from benchmarks.report import text

#: The environment of each variant of the peer.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
VARIANTS: dict[str, dict[str, str]] = {"eager": {}, "tuned": TUNED, "compiled": TUNED}
TOLERANCE = 2e-5  # of the losses, relative


def threads_env(threads: int) -> dict[str, str]:
    """The environment that gives every library ``threads`` threads."""
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA", "BLIS", "VECLIB")
    return {f"{name}_NUM_THREADS": str(threads) for name in names}


def find_torch(python: str | None) -> str | None:
    """The interpreter of the peer; None if there is none. SystemExit if the one that was given has no PyTorch."""
    try:
        found = subprocess.run([python or sys.executable, "-c", "import torch"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"--torch {python}: {error.strerror}") from None
    if found.returncode and python:
        raise SystemExit(f"--torch {python}: {(found.stderr.strip() or 'no PyTorch').splitlines()[-1]}")
    return None if found.returncode else python or sys.executable


def module(python: str, name: str, *words: str) -> list[str]:
    """The command that runs a peer."""
    return [python, "-m", f"benchmarks.peers.{name}", *words]


def jobs(args: argparse.Namespace, python: str | None, weights: str) -> list[Job]:
    """hpcmp, and each variant of the peer, started and waiting."""
    n, env = ranks(args.layout), threads_env(args.threads) | {"PYTHONPATH": str(ROOT)}
    what = ["--size", args.size, "--layout", args.layout]
    micro = ["--microbatch", str(args.microbatch)] if args.microbatch else []
    mine = module(sys.executable, "hpcmp_step", *what, *micro, "--recompute", args.recompute)
    launch = [*shlex.split(args.mpirun), "-n", str(n)] if n > 1 else []
    made = [Job("hpcmp", [launch + mine], n, env)]
    samples = SIZES[args.size].batch
    count = -(-samples // args.microbatch) if args.microbatch else min(samples, 4 * n)
    for variant in filter(None, args.variants.split(",") if python else ()):
        if variant == "compiled" and args.layout not in ("serial", "dp"):
            continue
        words = [*what, "--threads", str(args.threads), "--microbatches", str(count), "--weights", weights]
        words += ["--compile"] if variant == "compiled" else []
        commands = [module(str(python), "torch_step", *words, "--rank", str(r)) for r in range(n)]
        made.append(Job(f"PyTorch {variant}", commands, n, env | VARIANTS[variant], patience=600))
    return made


def check_losses(losses: dict[str, list[float]], tolerance: float = TOLERANCE) -> float:
    """The largest relative difference to hpcmp's losses. SystemExit if it is more than ``tolerance``."""
    mine = losses["hpcmp"]
    differences = [abs(a - b) / abs(b) for other in losses.values() for a, b in zip(other, mine, strict=True)]
    if not all(d <= tolerance for d in differences):
        raise SystemExit(f"the programs do not compute the same: {losses}")
    return max(differences)


def measure(args: argparse.Namespace, python: str | None) -> dict[str, Any]:
    """All figures of one size, layout and number of threads."""
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as place:
        weights = f"{place}/weights.npz"
        export = module(sys.executable, "hpcmp_step", "--size", args.size, "--export", weights)
        subprocess.run(export, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        running = jobs(args, python, weights)
        losses = {job.name: job.turn(3, warm=0)["losses"] for job in running}
        difference = check_losses(losses)
        turns: dict[str, list[dict[str, Any]]] = {job.name: [] for job in running}
        before = machine()
        for i in range(args.rounds):
            for job in running[i % len(running) :] + running[: i % len(running)]:  # each is first as often as another
                turns[job.name].append(job.turn(args.steps))
        memory = {job.name: max(job.ask("memory")) for job in running}
        peaks = {job.name: max(sum(job.ask("peak")) for _ in range(2)) for job in running}
        software = {job.name: job.ask("software")[0] for job in running}
        parts = running[0].ask("breakdown")[0]
        for job in running:
            job.stop()
    peak = max(peaks.values())
    best = {name: min(t["best"] for t in held) for name, held in turns.items()}
    alone = ranks(args.layout) * args.threads == 1  # then processor time tells how fast a step is without others
    programs = {}
    for name, held in turns.items():
        seconds = spread([t["seconds"] for t in held])
        programs[name] = {
            "software": software[name],
            "seconds": seconds,
            "best": best[name],
            "best_ratio": best[name] / best["hpcmp"],
            "cpu_seconds": spread([t["cpu_seconds"] for t in held]),
            "tokens_per_second": size.tokens / seconds["median"],
            "of_peak": size.flops / min([best[name], *(t["cpu_seconds"] for t in held if alone)]) / peak,
            "memory": memory[name][0],
            "memory_of_model": memory[name][0] - memory[name][1],
            "gemm_peak": peaks[name],
            "others": spread([t["others"] for t in held]),
            "ratio": spread([t["seconds"] / h["seconds"] for t, h in zip(held, turns["hpcmp"], strict=True)]),
            "cpu_ratio": spread(
                [t["cpu_seconds"] / h["cpu_seconds"] for t, h in zip(held, turns["hpcmp"], strict=True)]
            ),
            "turns": [t["seconds"] for t in held],
        }
    return {
        "size": args.size,
        "layout": args.layout,
        "axes": LAYOUTS[args.layout],
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "microbatch": args.microbatch,
        "recompute": args.recompute,
        "machine": before | {"load_after": list(os.getloadavg())},
        "loss_difference": difference,
        "programs": programs,
        "breakdown": parts,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--layout", choices=LAYOUTS, default="serial")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--variants", default="eager,tuned", help=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed in a turn, after one that is not")
    parser.add_argument("--microbatch", type=int, help="samples; with pp by default what hpcmp takes")
    parser.add_argument("--recompute", default="none", help="layout.recompute of hpcmp")
    parser.add_argument("--mpirun", default="mpirun --bind-to none", help="how two ranks are launched")
    parser.add_argument("--label", nargs="*", default=[], help="words for the name of the files")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    result = measure(args, find_torch(args.torch))
    args.results.mkdir(parents=True, exist_ok=True)
    day = result["machine"]["date"].split()[0]
    stem = args.results / "-".join([day, args.size, args.layout, str(args.threads), *args.label])
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(text(result))
    print(text(result), end="")


if __name__ == "__main__":
    main()
