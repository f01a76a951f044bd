"""Each compiled kernel against the same in NumPy, and against the bandwidth of memory measured between the calls.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--calls 15] [NAME ...]

float32. The kernels take turns, call by call, with a copy of 64 MiB, so that all three meet the same machine; the
figures are medians. GB/s: what a kernel must read and write, once, by its time; for attention the GFLOP/s of its matrix
products, counting what the causal mask leaves, of each document alone where documents are kept apart.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmp import kernels
from hpcmp.documents import First
from hpcmp.random import DropoutMask

RNG = np.random.default_rng(0)
ADAM: dict[str, Any] = {"step": 3, "betas": (0.9, 0.95), "epsilon": 1e-8, "grad_scale": 0.5}
LARGE = {"rate": 1e-3, "decay": 0.1}


def real(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def element_wise() -> dict[str, tuple[list[Any], dict[str, Any], int]]:
    """Each kernel's arguments and settings, and the bytes that it must move: 2048 tokens, 512 wide."""
    x, dy, w, b = real(256, 8, 512), real(256, 8, 512), real(512), real(512)
    _, mean, rstd = kernels.REFERENCE.layer_norm(x, w, b, 1e-5)
    up, dup, pair, half = real(256, 8, 2048), real(256, 8, 2048), real(256, 8, 2, 1024), real(256, 8, 1024)
    q, angle = real(256, 8, 8, 64), real(256, 1, 1, 32)
    mask = DropoutMask(0.1, (1, 2), np.arange(256)[:, None], np.arange(8), (slice(0, 512),))
    logits, table = real(256, 8192), real(8192, 512)
    targets, ids = RNG.integers(0, 8192, 256), RNG.integers(0, 8192, (256, 8))
    top = logits.max(-1)
    data, grad, m, v = real(1 << 23), real(1 << 23), real(1 << 23), real(1 << 23) ** 2
    n, h, p, size = x.nbytes, up.nbytes, half.nbytes, data.nbytes
    return {
        "layer_norm": ([x, w, b, 1e-5], {}, 2 * n),
        "layer_norm_backward": ([dy, x, w, mean, rstd], {}, 3 * n),
        "layer_norm_backward_weight": ([dy, x, mean, rstd], {}, 2 * n),
        "rms_norm": ([x, w, 1e-5], {}, 2 * n),
        "rms_norm_backward": ([dy, x, w, rstd], {}, 3 * n),
        "rms_norm_backward_weight": ([dy, x, rstd], {}, 2 * n),
        "gelu": ([up], {}, 2 * h),
        "gelu_backward": ([dup, up], {}, 3 * h),
        "swiglu": ([pair], {}, 3 * p),
        "swiglu_backward": ([half, pair], {}, 5 * p),
        "dropout": ([x, mask], {}, 2 * n),
        "rope": ([q, np.cos(angle), np.sin(angle)], {}, 2 * q.nbytes),
        "cross_entropy_parts": ([logits, targets, 0], {}, logits.nbytes),
        "cross_entropy_backward": ([top, logits.copy(), targets, 0, top + 2], {}, 2 * logits.nbytes),
        "add_rows": ([real(2048), up], {}, h),
        "embedding": ([table, ids, 0], {}, 2 * n),
        "embedding_backward_weight": ([table, ids, 0, x], {}, 3 * n),
        "adamw": ([data, grad, m, v], ADAM | LARGE, 7 * size),
        "adam_update": ([grad, m, v], ADAM, 6 * size),
        "sgd": ([data, grad, m], LARGE | {"momentum": 0.9, "grad_scale": 0.5}, 5 * size),
        "square_sum": ([data], {}, size),
    }


def attention(
    s: int, b: int, n: int, rate: float, document: int = 0, d: int = 64
) -> dict[str, tuple[list[Any], dict[str, Any], int]]:
    """Causal attention, forward and backward, perhaps with dropout, or with documents of so many tokens kept apart;
    in place of bytes its operations."""
    q, do, kv = real(s, b, n, d), real(s, b, n, d), real(s, b, n, 2, d)
    samples, heads = np.arange(b)[:, None, None], np.arange(n)[:, None]
    mask = DropoutMask(rate, (1, 2), np.arange(s), samples, (slice(0, s),), heads) if rate else None
    length, settings = document or s, {}
    if document:
        settings["first"] = First.of(np.broadcast_to(np.arange(s) // document * document, (b, s)), np)
    o, lse = kernels.REFERENCE.attention(q, kv, d**-0.5, mask, **settings)
    product = b * n * s * (length + 1) * d
    return {
        "attention": ([q, kv, d**-0.5, mask], settings, 2 * product),
        "attention_backward": ([do, q, kv, o, lse, d**-0.5, mask], settings, 5 * product),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(name: str, label: str, arguments: list[Any], settings: dict[str, Any], work: int, calls: int) -> str:
    """A line of the table."""
    source = np.ones(1 << 23, np.float32)
    target = np.empty_like(source)
    found = kernels.with_numba()
    assert found is not None, "there is no Numba"
    turns: list[Callable[[], Any]] = [
        lambda: getattr(kernels.NUMPY, name)(*arguments, **settings),
        lambda: getattr(found[0], name)(*arguments, **settings),
        lambda: np.copyto(target, source),
    ]
    for turn in turns:
        turn()
    times = np.array([[seconds(turn) for turn in turns] for _ in range(calls)])
    numpy, compiled, copy = (statistics.median(column) for column in times.T)
    ratio = statistics.median(times[:, 0] / times[:, 1])
    rate, bandwidth = work / compiled / 1e9, 2 * source.nbytes / copy / 1e9
    last = "" if "attention" in name else f"{rate / bandwidth:.2f}"
    return f"| {label} | {numpy * 1e3:.2f} | {compiled * 1e3:.2f} | {ratio:.1f} | {rate:.0f} | {last} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="kernels; by default all")
    parser.add_argument("--calls", type=int, default=15)
    args = parser.parse_args()
    lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    print(next((line.split(":")[1].strip() for line in lines if line.startswith("Model name")), platform.machine()))
    print("| kernel | NumPy, ms | compiled, ms | times as fast | GB/s (GFLOP/s) | of a copy's bandwidth |")
    print("|---|---|---|---|---|---|")
    cases = [(name, name, *case) for name, case in element_wise().items()]
    sizes = (256, 8, 4, 0.0), (512, 4, 8, 0.0), (512, 4, 8, 0.1), (2048, 1, 8, 0.0), (2048, 1, 8, 0.0, 256)
    for s, b, n, rate, *document in sizes:
        size = f"s={s}, b={b}, n={n}" + (", dropout" if rate else "") + "".join(f", documents of {m}" for m in document)
        cases += [(name, f"{name}, {size}", *case) for name, case in attention(s, b, n, rate, *document).items()]
    for name, label, arguments, settings, work in cases:
        if not args.names or name in args.names:
            print(row(name, label, arguments, settings, work, args.calls), flush=True)


if __name__ == "__main__":
    main()
