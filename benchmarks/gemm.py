"""The matrix products of a block by every library that is here: GFLOP/s in float32.

    python benchmarks/gemm.py [--hidden 256 512 768] [--tokens 2048] [--threads 1] [--rounds 9]

A block has weights 4 x (d, d), (d, 4d) and (4d, d). forward: Y = X W; dX = dY W^T; dW += X^T dY, which NumPy does with
a temporary. A round times every library once, so that all meet the same load of the machine; the table has medians, of
the time of the CPU with one thread, which others do not lengthen, else of the clock on the wall. Before it stands what
each library costs to load: seconds, and MB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcmp.kernels import blas, cblas, threads

Product = Callable[[Any, Any, Any, Any], None]  # of x, w, dy and dw

PRODUCTS: dict[str, tuple[Product, Product]] = {  # by blas.gemm, by NumPy
    "forward": (lambda x, w, dy, dw: blas.gemm(x, w), lambda x, w, dy, dw: np.matmul(x, w)),
    "dX": (lambda x, w, dy, dw: blas.gemm(dy, w.T), lambda x, w, dy, dw: np.matmul(dy, w.T)),
    "dW": (lambda x, w, dy, dw: blas.gemm(x.T, dy, dw, accumulate=True), lambda x, w, dy, dw: dw.__iadd__(x.T @ dy)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    threads.use(args.threads)
    names = [name for name in cblas.LIBRARIES if load(name)]
    contenders = [*names, "np.matmul"]
    print(f"\n{args.threads} thread(s), {args.tokens} tokens, {args.rounds} rounds\n")
    print(f"| d | product | {' | '.join(contenders)} |\n|---|---|{'---|' * len(contenders)}")
    for d in args.hidden:
        for product in PRODUCTS:
            found = rates(product, contenders, d, args.tokens, args.rounds)
            print(f"| {d} | {product} | {' | '.join(f'{found[name]:.0f}' for name in contenders)} |", flush=True)


def load(name: str) -> bool:
    """Whether the library is here; prints what it costs to load, a first product included."""
    a, before, start = np.ones((64, 64), np.float32), resident(), time.perf_counter()
    library = cblas.find(name)
    if library is not None:
        blas.select(name)
        blas.gemm(a, a, np.empty_like(a), accumulate=True)
        print(f"{name}: {library}; {time.perf_counter() - start:.3f} s, {resident() - before:.1f} MB")
    return library is not None


def resident() -> float:
    """The MB of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def rates(product: str, contenders: list[str], d: int, tokens: int, rounds: int) -> dict[str, float]:
    """{contender: GFLOP/s} of one product of all of a block's weights."""
    rng = np.random.default_rng(0)
    sets = []
    for shape in [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]:
        x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((tokens, shape[0]), shape, (tokens, shape[1])))
        sets.append((x, w, dy, np.zeros(shape, np.float32)))
    clock = time.process_time if threads.count() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name in contenders * (rounds + 1):
        blas.select("numpy" if name == "np.matmul" else name)
        run = PRODUCTS[product][name == "np.matmul"]
        start = clock()
        for arrays in sets:
            run(*arrays)
        seconds[name].append(clock() - start)
    return {name: 24e-9 * tokens * d * d / statistics.median(s[1:]) for name, s in seconds.items()}


if __name__ == "__main__":
    main()
