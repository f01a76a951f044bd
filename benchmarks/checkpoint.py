"""Checkpoints of hpcmp and of PyTorch, and the same bytes written plainly, in alternation: GB/s of saving and loading.

    python benchmarks/checkpoint.py --ranks 2 --torch PYTHON --place DIRECTORY

PYTHON is an interpreter that has PyTorch (without it hpcmp is measured alone), DIRECTORY a place on the file system
that is measured. All save the same tensors from the same ranks, forced to the disk; all load them from the disk, after
the system was told to forget its copy. ``raw`` is a file a rank, written and read in blocks of 16 MiB, with nothing
checked; ``gather`` is rank 0 that writes with h5py what all sent to it. Results go to benchmarks/results/checkpoint/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Job, machine, spread
from benchmarks.step import find_torch, module, threads_env


def jobs(args: argparse.Namespace, python: str | None, place: Path) -> list[Job]:
    """hpcmp, and the peer, started and waiting."""
    what = ["--hidden", str(args.hidden), "--blocks", str(args.blocks), "--place", str(place)]
    env = threads_env(1) | {"PYTHONPATH": str(ROOT)}
    mine = [*shlex.split(args.mpirun), "-n", str(args.ranks), *module(args.python, "hpcmp_checkpoint", *what)]
    made = [Job("hpcmp", [mine], args.ranks, env)]
    if python:
        words = [*what, "--ranks", str(args.ranks)]
        commands = [module(python, "torch_checkpoint", *words, "--rank", str(r)) for r in range(args.ranks)]
        made.append(Job("PyTorch", commands, args.ranks, env))
    return made


def measure(args: argparse.Namespace, python: str | None) -> dict[str, Any]:
    """All figures of one number of ranks."""
    place = Path(tempfile.mkdtemp(prefix="bench-", dir=args.place))
    try:
        running = jobs(args, python, place)
        orders = [(job, name) for job in running for name in job.ask("names")[0]]
        size = sum(running[0].ask("bytes"))
        seconds: dict[str, list[float]] = {name: [] for _, name in orders}
        before = machine()
        for i in range(args.rounds + 1):  # the first is not counted
            for part in ("save", "load"):
                turn = [(job, name) for job, name in orders if name.startswith(part)]
                at = i % len(turn)
                for job, name in turn[at:] + turn[:at]:
                    seconds[name].append(max(job.ask(name)))
                    if part == "load" and name != "load raw" and not all(job.ask("check")):
                        raise SystemExit(f"{name}: what was loaded is not what was saved")
        software = [job.ask("software")[0] for job in running]
        for job in running:
            job.stop()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    programs = {}
    for name, found in seconds.items():
        part = name.split()[0]
        peers = {key: seconds.get(f"{part} {peer}") for key, peer in (("of_raw", "raw"), ("of_dcp", "DCP"))}
        programs[name] = {
            "gb_per_second": spread([size / t / 1e9 for t in found[1:]]),
            **{
                key: spread([b / a for a, b in zip(found[1:], other[1:], strict=True)])
                for key, other in peers.items()
                if other
            },
            "seconds": found[1:],
        }
    return {
        "ranks": args.ranks,
        "bytes": size,
        "rounds": args.rounds,
        "hidden": args.hidden,
        "blocks": args.blocks,
        "machine": before | {"load_after": list(os.getloadavg())},
        "software": software,
        "programs": programs,
    }


def text(result: dict[str, Any]) -> str:
    """One measurement."""
    m = result["machine"]
    lines = [
        f"{result['ranks']} rank(s), {result['bytes'] / 1e6:,.0f} MB in all; {result['rounds']} turns of each, in "
        "alternation",
        f"{m['cpu']}, {m['cores']} cores; {m['date']} UTC; load {m['load'][0]:.1f} before, {m['load_after'][0]:.1f} "
        f"after; {'; '.join(result['software'])}",
        "",
        f"{'':24} {'GB/s: median, range':>24} {'times raw: median, range':>26} {'times DCP: median, range':>26}",
    ]

    def cell(values: dict[str, float] | None) -> str:
        return f"{values['median']:.2f}  {values['min']:.2f} to {values['max']:.2f}" if values else ""

    for name, p in result["programs"].items():
        cells = cell(p["gb_per_second"]), cell(p.get("of_raw")), cell(p.get("of_dcp"))
        lines.append(f"{name:24} {cells[0]:>24} {cells[1]:>26} {cells[2]:>26}".rstrip())
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--python", default=sys.executable, help="hpcmp's interpreter: one whose h5py has MPI for mpio")
    parser.add_argument("--place", type=Path, help="where files are written (default: the directory for temporaries)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=3, help="of 144 MB with a hidden size of 1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mpirun", default="mpirun --bind-to none", help="how ranks are launched")
    parser.add_argument("--label", nargs="*", default=[], help="words for the name of the files")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint")
    args = parser.parse_args(argv)
    result = measure(args, find_torch(args.torch))
    args.results.mkdir(parents=True, exist_ok=True)
    day = result["machine"]["date"].split()[0]
    stem = args.results / "-".join([day, str(args.ranks), *args.label])
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(text(result))
    print(text(result), end="")


if __name__ == "__main__":
    main()
