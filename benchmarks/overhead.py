"""What hpcmp costs besides arithmetic: microseconds a layer call and a collective at tiny sizes, and of a step.

    python benchmarks/overhead.py [--torch PYTHON] [--profile]
    mpirun -n 2 python benchmarks/overhead.py

A layer call is a forward and a backward with weight gradients of 8 tokens of 8 numbers (a block: 2 heads), beside
PyTorch's eager linear. A step is one of a model with 64 hidden numbers on one sample of 8 tokens, so that nearly all of
it is Python and calls: milliseconds by the number of layers, serial or in every layout of two ranks. --profile prints
the functions that a 12-layer step spends its time in. Times are the best of several runs.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import Size
from benchmarks.peers.hpcmp_step import Steps
from hpcmp import collectives, wgrad
from hpcmp.comm.base import Communicator
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.recorder import RECORDER, Flight
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.activation import GELU
from hpcmp.layers.attention import attention_core
from hpcmp.layers.heads import Heads
from hpcmp.layers.linear import ColumnParallelLinear, Output
from hpcmp.layers.norm import LayerNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import block
from hpcmp.module import Module, Sequential
from hpcmp.training.config import Config
from hpcmp.training.engine import architecture

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

TOKENS, HIDDEN = 8, 8
LAYERS = (1, 2, 4, 8, 12)

#: Run by the interpreter that has PyTorch: the microseconds of its linear.
TORCH = """
import time, torch
torch.set_num_threads(1)
layer, x, dy = torch.nn.Linear(8, 8), torch.randn(8, 1, 8, requires_grad=True), torch.randn(8, 1, 8)
best = 1e9
for _ in range(200):
    start = time.perf_counter()
    for _ in range(20):
        layer(x).backward(dy)
    best = min(best, (time.perf_counter() - start) / 20)
print(1e6 * best)
"""


def best_of(call: Callable[[], Any], inner: int = 20, outer: int = 200) -> float:
    """Microseconds of a call: the best of ``outer`` means over ``inner``, each short enough to go uninterrupted."""
    times = []
    for _ in range(outer):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        times.append((time.perf_counter() - start) / inner)
    return 1e6 * min(times)


def tiny() -> Architecture:
    """The architecture of the block."""
    model = {"hidden": HIDDEN, "heads": 2, "layers": 1, "sequence": TOKENS, "vocabulary": 2}
    return architecture(Config.from_dict({"model": model}).resolved())


def layers() -> dict[str, float]:
    """Microseconds of a forward and backward of each layer."""
    cursor = Cursor()
    cursor.place = Place(length=TOKENS)
    parallel = ModelParallel(cursor=cursor)
    shape = (TOKENS, 1, HIDDEN)
    heads = (TOKENS, 1, 2, HIDDEN // 2)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    linear = ColumnParallelLinear(parallel, HIDDEN, {"weight": Output((HIDDEN,))}, bias=True)
    whole: list[tuple[str, Module, Any]] = [
        ("linear", linear, x),
        ("layer norm", LayerNorm(parallel, HIDDEN), x),
        ("gelu", GELU(), x),
        ("attention", attention_core(Heads(2, 2), parallel), (x.reshape(heads), np.ones((*heads[:3], 2, 4), x.dtype))),
        ("block", block(tiny(), parallel, "block"), x),
        ("nothing", Sequential(), x),
    ]
    found = {}
    for name, layer, given in whole:
        layer.initialise()
        dy = layer.forward(given)[0]

        def both(layer: Module = layer, given: Any = given, dy: Any = dy) -> None:
            layer.backward(dy, layer.forward(given)[1], wgrad.now)

        found[name] = best_of(both)
    return found


def collective_calls(comm: Communicator) -> dict[str, float]:
    """Microseconds of each collective on 64 numbers."""
    x = np.ones((8, 8), np.float32)
    operators = {"all_reduce": collectives.AllReduce(comm), "copy": collectives.Copy(comm)}
    operators |= {"all_gather": collectives.AllGather(comm, 0, lambda: 8 * comm.size)}
    operators |= {"reduce_scatter": collectives.ReduceScatter(comm), "split": collectives.Split(comm)}
    return {name: best_of(lambda operator=operator: operator(x)) for name, operator in operators.items()}


def tiny_steps(number: int, layout: str, world: Intracomm | None) -> Steps:
    """A model of ``number`` layers, ready to step."""
    return Steps(Size(64, number, 2, 8, 64, 2), layout, world)


def step_ms(number: int, layout: str, world: Intracomm | None) -> float:
    """Milliseconds of a step."""
    steps, at = tiny_steps(number, layout, world), iter(range(10**6))
    return best_of(lambda: steps(next(at)), inner=1, outer=60) / 1e3


def record_us() -> float:
    """Microseconds that the flight recorder takes for an operation, from its call to its end."""
    flight, count = Flight("", [0, 1]), np.ones(64, np.float32)

    def record() -> None:
        record = flight.begin("all_reduce", count.dtype, count.size)
        record.block()
        record.leave()

    return best_of(record)


def records(number: int, layout: str, world: Intracomm | None) -> int:
    """How many operations a step of ``number`` layers records."""
    steps = tiny_steps(number, layout, world)
    steps(0)
    RECORDER.records = deque()
    steps(1)
    return len(RECORDER.records)


def profile(layout: str, world: Intracomm | None) -> None:
    """Print where a 12-layer step's time goes."""
    steps = tiny_steps(12, layout, world)
    steps(0)
    profiler = cProfile.Profile()
    profiler.enable()
    for i in range(20):
        steps(1 + i)
    profiler.disable()
    if world is None or world.rank == 0:
        pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(35)


def main(argv: list[str] | None = None) -> None:
    """Print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    if world.size > 2:
        raise SystemExit("one rank, or two")
    layouts = ["tp", "dp", "pp"] if world.size == 2 else ["serial"]
    comm = world if world.size == 2 else None

    def say(*words: Any) -> None:
        if world.rank == 0:
            print(*words, flush=True)

    if comm is None:
        for name, us in layers().items():
            say(f"{name:15} {us:8.1f} us")
        if args.torch:
            out = subprocess.run([args.torch, "-c", TORCH], capture_output=True, text=True, check=True).stdout
            say(f"{'linear, PyTorch':15} {float(out):8.1f} us")
    with Mesh(comm, tp=world.size) as mesh:
        for name, us in collective_calls(mesh["tp"]).items():
            say(f"{name:15} {us:8.1f} us on {world.size} rank(s)")
    for layout in layouts:
        times = {number: step_ms(number, layout, comm) for number in LAYERS}
        say(f"step, {layout}: " + ", ".join(f"{n} layers {ms:.2f} ms" for n, ms in times.items()))
        slope = (times[LAYERS[-1]] - times[LAYERS[0]]) / (LAYERS[-1] - LAYERS[0])
        say(f"  {1e3 * slope:.0f} us a layer, {1e3 * (times[LAYERS[0]] - slope):.0f} us besides")
        if comm is not None:
            calls, us = records(LAYERS[-1], layout, comm), record_us()
            share = calls * us / (1e3 * times[LAYERS[-1]])
            say(f"  flight recorder: {calls} operations of {us:.2f} us, {share:.2%} of the {LAYERS[-1]} layers' step")
        if args.profile:
            profile(layout, comm)


if __name__ == "__main__":
    main()
