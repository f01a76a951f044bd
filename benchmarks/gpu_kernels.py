"""Each CUDA kernel's share of the bandwidth that a copy has on the same GPU, or of the rate of a large matrix product.
It has never run: no GPU was there.

    python benchmarks/gpu_kernels.py [--dtype bfloat16] [--calls 30] [--json FILE] [NAME ...]

A kernel takes turns, call by call, with a copy of 256 MiB or, if operations count, with the product of two matrices of
8192 x 8192 in the same dtype, under which the host queues it: what is measured, by events on the stream, is the GPU's
time alone. Medians. GB/s: what a kernel must read and write, once, by its time, against the same for the copy; TFLOP/s
likewise against the product. host: microseconds that a call of the wrapper takes the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_kernel_table import TABLE, Draw, called
from hpcmp import kernels
from hpcmp.arrays import dtype_of

#: The side of the matrices, and the numbers of the array, that kernels take turns with.
SIDE, COPIED = 8192, 1 << 25


def copy(draw: Draw) -> tuple[Callable[[], Any], float]:
    """A copy, and the bytes that it reads and writes."""
    source = draw.xp.ones(COPIED, np.float64)
    target = draw.xp.empty_like(source)
    return lambda: draw.xp.copyto(target, source), 2 * source.nbytes


def product(draw: Draw) -> tuple[Callable[[], Any], float]:
    """A product of two matrices, and its operations."""
    a, b = draw(SIDE, SIDE), draw(SIDE, SIDE)
    return lambda: kernels.CUDA.matmul(a, b), 2 * SIDE**3


RIVALS = {"B": copy, "FLOP": product}


def measure(draw: Draw, name: str, calls: int) -> dict[str, Any]:
    """One kernel's figures, and the rate of what it takes turns with."""
    cupy, call = draw.xp, called(name)
    arguments, settings, amount, unit = TABLE[name](draw)
    beside, rival = RIVALS[unit](draw)
    events: list[list[Any]] = []
    host = []
    for _ in range(calls + 3):  # the first calls compile
        marks = [cupy.cuda.Event() for _ in range(3)]
        marks[0].record()
        beside()
        marks[1].record()
        begin = time.perf_counter()
        call(*arguments, **settings)
        host.append(time.perf_counter() - begin)
        marks[2].record()
        events.append(marks)
        if len(events) % 4 == 0:
            marks[2].synchronize()
    cupy.cuda.Device().synchronize()
    times = [[cupy.cuda.get_elapsed_time(*pair) / 1e3 for pair in zip(m, m[1:], strict=False)] for m in events[3:]]
    other, own = (statistics.median(each) for each in zip(*times, strict=True))
    rate, best = amount / own, rival / other
    host_time = statistics.median(host[3:])
    return {"seconds": own, "unit": unit, "rate": rate, "rival": best, "share": rate / best, "host": host_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLE)}; all by default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import cupy

    draw, found = Draw(dtype_of(options.dtype), cupy), {}
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    print(f"{device}, {options.dtype}\n{'kernel':28}{'us':>9}{'rate':>15}{'of the rival':>14}{'host us':>9}")
    for name in options.names or TABLE:
        f = found[name] = measure(draw, name, options.calls)
        rate = f"{f['rate'] / 1e9:8.0f} GB/s" if f["unit"] == "B" else f"{f['rate'] / 1e12:6.0f} TFLOP/s"
        print(f"{name:28}{f['seconds'] * 1e6:9.1f}{rate:>15}{f['share']:>14.0%}{f['host'] * 1e6:9.1f}", flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
    if options.json:
        about = {"device": device, "dtype": options.dtype, "calls": options.calls}
        options.json.write_text(json.dumps(about | {"kernels": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
