"""A training step of hpcmp and of PyTorch on one GPU, by model and length of sequence; one command, one table.

    python benchmarks/gpu_step.py --torch PYTHON

Tokens a second, model FLOP utilisation, memory, and kernels launched in a step, of GPT with 125M, 1.3B and 2.7B
parameters in bfloat16 at 1024 to 8192 tokens a sample, beside the same model in PyTorch (fused attention and AdamW,
weights of 16 bits with float32 ones in the optimizer). PYTHON is an interpreter that has PyTorch (this one, if it has;
without any, hpcmp is measured alone). All start from the same weights, see the same tokens, and must have the same
losses. Every program queues a step while the device runs the one before, whose loss it reads then, as ``train.ahead``
does: what is timed is from loss to loss. Small models take turns, all of them in the GPU's memory at once; of larger
ones each has the GPU to itself, there and back: the first is also the last. A program that fails, for want of memory
say, has its error in the table. --variants: how PyTorch runs, of

    eager, compiled, graphs (compiled, with CUDA graphs: beside hpcmp's --graphs); before each of them
    autocast-: weights in float32 alone, of which autocast makes those of 16 bits, and a residual stream in float32
    cudnn-: attention by cuDNN, as hpcmp's, where PyTorch would take FlashAttention

    python benchmarks/gpu_step.py --device cpu --models tiny      # whether it works, without a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import devices
from benchmarks.common import ROOT, Job, Size, machine, spread
from benchmarks.step import check_losses, find_torch, module

#: Hidden, layers, heads and vocabulary (GPT-2's, up to a multiple of 128) of each model.
MODELS = {
    "tiny": (64, 2, 2, 512),
    "125M": (768, 12, 12, 50304),
    "1.3B": (2048, 24, 16, 50304),
    "2.7B": (2560, 32, 32, 50304),
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-3, "fp8": 2e-2}  # of the losses, relative
TOGETHER = 3e8  # parameters up to which all programs are in memory at once
FORMULA = """\
Model FLOPs of a step: 6 x tokens x (12 x layers x hidden^2 + vocabulary x hidden + layers x sequence x hidden): forward
and backward of all weights, and of attention what a causal mask leaves; nothing for what is computed twice."""
COLUMNS = (
    *("model", "sequence", "batch", "program", "tokens/s", "against hpcmp", "MFU", "ms a step", "ms host"),
    *("GB of the pool", "GB of the process", "launches"),
)
HEAD = f"""\
A step lasts from the loss before its own, on the host, to its own; on a GPU the next step is queued in between. Host:
what queueing a step takes, that of a turn which went fastest (others may wait for room in the driver's queue).

| {" | ".join(COLUMNS)} |
{"|---" * len(COLUMNS)}|"""
#: Of the peer: the mode of torch.compile.
VARIANTS = {"eager": "", "compiled": "default", "graphs": "reduce-overhead"}
BEFORE = {"autocast", "cudnn"}


def size_of(model: str, sequence: int, tokens: int) -> Size:
    """A model at a length, and as many samples as make so many tokens, one at least."""
    hidden, layers, heads, vocabulary = MODELS[model]
    return Size(hidden, layers, max(1, tokens // sequence), sequence, vocabulary, heads)


def parameters(size: Size) -> int:
    """How many a model has, without its biases and norms."""
    return 12 * size.layers * size.hidden**2 + (size.vocabulary + size.sequence) * size.hidden


Command = tuple[str, list[str]]  # a program's name, and what starts it


def programs(size: Size, args: argparse.Namespace, python: str | None, weights: str) -> list[Command]:
    """hpcmp and each variant of the peer."""
    what = ["--model", json.dumps(dataclasses.asdict(size)), "--device", args.device, "--dtype", args.dtype]
    mine = module(sys.executable, "hpcmp_gpu_step", *what, "--recompute", args.recompute, "--fp8", args.fp8)
    made = [("hpcmp", mine)] + ([("hpcmp graphs", [*mine, "--graphs"])] if args.graphs else [])
    for variant in filter(None, args.variants.split(",") if python else ()):
        *given, name = variant.split("-")
        mode = ["--compile", VARIANTS[name]] if VARIANTS[name] else []
        more = mode + [f"--{word}" for word in given]
        made.append((f"PyTorch {variant}", module(str(python), "torch_gpu_step", *what, "--weights", weights, *more)))
    return made


def session(commands: list[Command], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """The programs take turns, all of them alive; what each did, by name."""
    running: list[Job] = []
    try:
        for name, command in commands:
            running.append(Job(name, [command], 1, {"PYTHONPATH": str(ROOT)}, patience=1800))
        losses = {job.name: job.turn(3, warm=0)["losses"] for job in running}
        turns: dict[str, list[dict[str, float]]] = {job.name: [] for job in running}
        for i in range(rounds):
            for job in running[i % len(running) :] + running[: i % len(running)]:
                turn = job.turn(steps)
                turns[job.name].append({key: turn[key] for key in ("seconds", "begun")})
        found = {}
        for job in running:
            facts = {order: job.ask(order)[0] for order in ("usage", "facts", "peak", "launches")}
            found[job.name] = {"losses": losses[job.name], "turns": turns[job.name], **facts}
        return found
    finally:
        for job in running:
            job.stop()


def sessions(commands: list[Command], together: bool, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """What each program did: all at once, or each by itself, there and back. {"failed": why} of one that failed."""
    groups = [commands] if together else [[command] for command in [*commands, *commands[::-1]]]
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        if any("failed" in found.get(name, {}) for name, _ in group):
            continue
        try:
            made = session(group, rounds if together else -(-rounds // 2), steps)
        except SystemExit as error:
            why = str(error).strip().splitlines()
            found |= {name: {"failed": f"{why[0]}: {why[-1]}" if len(why) > 1 else why[0]} for name, _ in group}
            continue
        for name, figures in made.items():
            before = found.get(name, {"turns": []})["turns"]
            found[name] = figures | {"turns": before + figures["turns"]}
    return found


def measure(model: str, sequence: int, args: argparse.Namespace, python: str | None) -> dict[str, Any]:
    """All figures of a model at a length."""
    size = size_of(model, sequence, args.tokens)
    together = args.turns == "together" or (args.turns == "auto" and parameters(size) <= TOGETHER)
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        commands = programs(size, args, python, weights := f"{place}/weights.npz")
        found: dict[str, dict[str, Any]] = {}
        if len(commands) > 1:
            environ = os.environ | {"PYTHONPATH": str(ROOT)}
            exported = subprocess.run([*commands[0][1], "--export", weights], cwd=ROOT, env=environ)
            if exported.returncode:
                found = {name: {"failed": "hpcmp makes no weights"} for name, _ in commands}
        found = found or sessions(commands, together, args.rounds, args.steps)
    ran = {name: each for name, each in found.items() if "failed" not in each}
    difference = None
    try:
        if "hpcmp" in ran:
            tolerance = TOLERANCE[args.dtype if args.fp8 == "none" else "fp8"]
            difference = check_losses({name: each["losses"] for name, each in ran.items()}, tolerance)
    except SystemExit as error:
        found, ran = {name: {"failed": str(error)} for name in found}, {}
    name = next((each["facts"]["device"] for each in ran.values()), args.device)
    known = args.peak * 1e12 if args.peak else devices.peak(name, args.dtype)
    peak = known or max((each["peak"] for each in ran.values()), default=0.0)
    mine = ran.get("hpcmp")
    rows = {name: each | (figures(each, size, peak, mine) if name in ran else {}) for name, each in found.items()}
    return {
        "model": model,
        "size": dataclasses.asdict(size),
        "parameters": parameters(size),
        "dtype": args.dtype,
        "recompute": args.recompute,
        "fp8": args.fp8,
        "device": name,
        "peak": peak,
        "peak_of": "the table or --peak" if known else "the fastest product of the programs",
        "together": together,
        "loss_difference": difference,
        "programs": rows,
    }


def figures(each: dict[str, Any], size: Size, peak: float, mine: dict[str, Any] | None) -> dict[str, Any]:
    """A program's figures from its turns. ratio: how much longer its step is than hpcmp's."""
    seconds, host = (spread([turn[key] for turn in each["turns"]]) for key in ("seconds", "begun"))
    ratio = seconds["median"] / spread([turn["seconds"] for turn in mine["turns"]])["median"] if mine else None
    return each | {
        "seconds": seconds,
        "host": host,
        "tokens_per_second": size.tokens / seconds["median"],
        "mfu": size.flops / seconds["median"] / peak,
        "ratio": ratio,
    }


def row(cell: dict[str, Any], name: str) -> str:
    """A program's line of the table."""
    each, size = cell["programs"][name], cell["size"]
    start = f"| {cell['model']} | {size['sequence']} | {size['batch']} | {name} | "
    if "failed" in each:
        return f"{start}{each['failed'].replace('|', '/')} | – | – | – | – | – | – | – |"
    pool, process = (gigabytes(each["usage"][key]) for key in ("pool", "process"))
    ratio = "–" if each["ratio"] is None else f"{each['ratio']:.2f}"
    launched = "–" if each["launches"] is None else str(each["launches"])
    step, host = (f"{1e3 * each[key]['median']:.4g}" for key in ("seconds", "host"))
    speed = f"{each['tokens_per_second']:,.0f} | {ratio} | {each['mfu']:.1%}"
    return f"{start}{speed} | {step} | {host} | {pool} | {process} | {launched} |"


def gigabytes(number: int | None) -> str:
    """In units of 1e9 bytes."""
    return "–" if number is None else f"{number / 1e9:.1f}"


def text(result: dict[str, Any]) -> str:
    """The table, and what its numbers mean."""
    cells = result["cells"]
    lines = [HEAD, *(row(cell, name) for cell in cells for name in cell["programs"]), ""]
    facts = {each["facts"]["software"] for cell in cells for each in cell["programs"].values() if "facts" in each}
    ran = [cell for cell in cells if cell["peak"]]
    peaks = {f"{cell['device']}: peak {cell['peak'] / 1e12:.4g} TFLOP/s, {cell['peak_of']}" for cell in ran}
    lines += [FORMULA, *sorted(peaks), *sorted(facts)]
    lines += ["A ratio above 1 means that hpcmp is faster. Medians of the turns."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write, after each model and length anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="125M,1.3B,2.7B", help=",".join(MODELS))
    parser.add_argument("--sequences", default="1024,2048,4096,8192")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--variants", default="eager,compiled")
    parser.add_argument("--turns", choices=("auto", "together", "apart"), default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="timed in a turn, after one that is not")
    parser.add_argument("--recompute", default="none", help="layout.recompute of hpcmp")
    parser.add_argument("--graphs", action="store_true", help="hpcmp with CUDA graphs, too")
    parser.add_argument("--fp8", choices=("none", "current", "delayed"), default="none", help="train.fp8 of hpcmp")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, where the table of devices.py lacks it")
    parser.add_argument("--place", type=Path, help="where the weights lie meanwhile: 11 GB for 2.7B")
    parser.add_argument("--label", nargs="*", default=[], help="words for the name of the files")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models.split(",") if name not in MODELS]:
        raise SystemExit(f"--models {','.join(unknown)}: there are {', '.join(MODELS)}")
    words = [variant.split("-") for variant in filter(None, args.variants.split(","))]
    if unknown := ["-".join(each) for each in words if each[-1] not in VARIANTS or not BEFORE.issuperset(each[:-1])]:
        raise SystemExit(
            f"--variants {','.join(unknown)}: there are {', '.join(VARIANTS)}; before them autocast-, cudnn-"
        )
    python, result = find_torch(args.torch), {"machine": machine(), "cells": list[dict[str, Any]]()}
    args.results.mkdir(parents=True, exist_ok=True)
    stem = args.results / "-".join([str(result["machine"]["date"]).split()[0], "gpu-step", *args.label])
    for model in args.models.split(","):
        for sequence in map(int, args.sequences.split(",")):
            result["cells"].append(measure(model, sequence, args, python))
            stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            stem.with_suffix(".txt").write_text(text(result))
            print(f"{model} at {sequence} is done", file=sys.stderr)
    print(text(result), end="")


if __name__ == "__main__":
    main()
