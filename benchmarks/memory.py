"""The memory of activations for each kind of recomputation: measured (tracemalloc) beside the formula; and the time.

    python benchmarks/memory.py [--style llama] [--hidden 512] [--sequence 512] [--batch 2] [--dtype bfloat16]

Formula: docs/memory.md. Kept: what the forward of the blocks leaves allocated. Peak: the most that there is at once,
with gradients and what is passing through.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from typing import Any

import numpy as np

from hpcmp import wgrad
from hpcmp.arrays import dtype_of
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import block
from hpcmp.module import Sequential
from hpcmp.recompute import recompute
from hpcmp.training.config import Config
from hpcmp.training.engine import architecture

KINDS = ("none", "attention", "activations", "full")


def formula(a: Architecture, kind: str, tokens: int, size: int) -> int:
    """The bytes that a block keeps of ``tokens`` positions, in a dtype of ``size`` bytes; statistics have 4 or more."""
    wide = max(size, 4)
    q, kv, stats = a.heads * a.head_size, 2 * a.kv_heads * a.head_size, 2 if a.style == "gpt" else 1
    norms, up = 2 * (2 * a.hidden * size + stats * wide), (1 if a.style == "gpt" else 2) * a.ffn * size
    core, result, activated = (q + kv) * size, q * size + a.heads * wide, a.ffn * size
    return (
        tokens
        * {
            "none": norms + core + result + up + activated,
            "attention": norms + core + up + activated,
            "activations": 2 * a.hidden * size + core + result + up,
            "full": a.hidden * size,
        }[kind]
    )


def measure(a: Architecture, kind: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """(bytes kept, bytes at the peak of the backward, seconds of forward and backward), each for one block."""
    cursor = Cursor()
    cursor.place = Place(length=args.sequence)
    parallel = ModelParallel(cursor=cursor)
    model = Sequential(*(recompute(block(a, parallel, f"blocks/{i}"), kind) for i in range(args.layers)))
    dtype = dtype_of(args.dtype)
    model.initialise(0, dtype)
    x = np.random.default_rng(0).normal(size=(args.sequence, args.batch, a.hidden)).astype(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        y, saved = model.forward(x)
        model.backward(y, saved, wgrad.now)
        seconds.append(time.perf_counter() - start)
    del y, saved
    tracemalloc.start()
    y, saved = model.forward(x)
    # The first block's input was there before; the last block's result, which no block keeps, makes up for it.
    kept = tracemalloc.get_traced_memory()[0]
    dy = np.ones_like(x)
    model.backward(dy, saved, wgrad.now)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return kept / args.layers, peak / args.layers, min(seconds) / args.layers


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", default="gpt", choices=["gpt", "llama"])
    for name, default in (("layers", 4), ("hidden", 512), ("heads", 8), ("sequence", 512), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    model = {key: getattr(args, key) for key in ("style", "layers", "hidden", "heads", "sequence")}
    a = architecture(Config.from_dict({"model": model | {"vocabulary": 2}}).resolved())
    print(f"{args.style}, h = {a.hidden}, f = {a.ffn}, {args.dtype}, {args.sequence} x {args.batch} tokens; MB a block")
    print(f"{'recompute':12} {'formula':>9} {'kept':>9} {'off by':>8} {'peak':>9} {'ms':>8}")
    rows = []
    for kind in KINDS:
        wanted = formula(a, kind, args.sequence * args.batch, dtype_of(args.dtype).itemsize)
        kept, peak, seconds = measure(a, kind, args)
        rows.append({"kind": kind, "formula": wanted, "kept": kept, "peak": peak, "seconds": seconds})
        off = f"{100 * (kept / wanted - 1):+.1f}%"
        print(f"{kind:12} {wanted / 1e6:9.2f} {kept / 1e6:9.2f} {off:>8} {peak / 1e6:9.2f} {1e3 * seconds:8.1f}")
    return rows


if __name__ == "__main__":
    main()
