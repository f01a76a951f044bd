"""Sums over several hosts, flat and in phases, and where tensor parallelism lies: for docs/topology.md.

    bash benchmarks/network.sh                        # on virtual hosts with a slow link between them, as root
    mpirun ... python benchmarks/network.py           # the same on the hosts of a job

For each size the median time of an all_reduce of all ranks: MPI's own, and that of ``HierarchicalCommunicator``, the
ranks dealt out in blocks or in turn. Then the same for pairs of ranks, such as groups of ``tp``: within hosts, where
the mesh places them, and across, where they would be by rank if the launcher deals ranks out in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, machine


def seconds(call: Callable[[], Any], world: Any, turns: int) -> float:
    """The median over the turns of the slowest rank's time; collective."""
    from mpi4py import MPI

    found = []
    for turn in range(-1, turns):  # the first is to warm up
        world.Barrier()
        start = time.perf_counter()
        call()
        found += [world.allreduce(time.perf_counter() - start, MPI.MAX)] if turn >= 0 else []
    return statistics.median(found)


def sums(world: Any, nodes: Sequence[int], largest: int) -> dict[str, Any]:
    """Seconds of a sum over the ranks of ``world``, rank i on ``nodes[i]``, for each number of bytes."""
    from hpcmp.comm.hierarchical import HierarchicalCommunicator
    from hpcmp.comm.mpi import MpiCommunicator

    flat, phases = MpiCommunicator(world.Dup()), HierarchicalCommunicator(world.Dup(), nodes, least=0)
    found: dict[str, Any] = {}
    nbytes = 2**14
    while nbytes <= largest:
        x, turns = np.ones(nbytes // 4, np.float32), 25 if nbytes <= 2**20 else 7
        each = [seconds(lambda c=c, x=x: c.all_reduce(x).wait(), world, turns) for c in (flat, phases)]
        found[str(nbytes)] = dict(zip(("flat", "phases"), each, strict=True))
        nbytes *= 4
    flat.close()
    phases.close()
    return found


def pairs(world: Any, unlike: int, alike: int) -> float:
    """Seconds of a sum of 1 MiB in each pair of ranks that have the same ``unlike`` and neighbouring ``alike``."""
    from hpcmp.comm.mpi import MpiCommunicator

    pair = MpiCommunicator(world.Split(1000 * unlike + alike // 2, world.rank))
    x = np.ones(2**18, np.float32)
    found = seconds(lambda: pair.all_reduce(x).wait(), world, 9)
    pair.close()
    return found


def text(result: dict[str, Any]) -> str:
    """A Markdown table."""
    order = "blocks" if result["blocks"] else "turn"
    lines = [f"{result['ranks']} ranks on {result['hosts']}, dealt out in {order}", ""]
    lines += ["| bytes of a sum | MPI, ms | in phases, ms | ratio |", "|---:|---:|---:|---:|"]
    for nbytes, each in result["sums"].items():
        flat, phases = 1e3 * each["flat"], 1e3 * each["phases"]
        lines.append(f"| {int(nbytes):,} | {flat:.2f} | {phases:.2f} | {flat / phases:.2f} |")
    within, across = (1e3 * result["pairs"][key] for key in ("within", "across"))
    lines += ["", f"pairs of ranks, 1 MiB: {within:.2f} ms within hosts, {across:.2f} across: {across / within:.1f}"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on all ranks; rank 0 prints a JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--largest", type=int, default=16, help="MiB of the largest message")
    parser.add_argument("--name", help="of the result's file, after the date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "network")
    args = parser.parse_args(argv)

    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    from hpcmp.comm.topology import find

    topology = find(world)
    nodes = topology.nodes
    place = list(nodes[: world.rank]).count(nodes[world.rank])  # this rank's number on its host
    result = {
        "ranks": world.size,
        "hosts": str(topology),
        "blocks": topology.in_order,
        "machine": machine(),
        "sums": sums(world, nodes, args.largest * 2**20),
        "pairs": {"within": pairs(world, nodes[world.rank], place), "across": pairs(world, place, nodes[world.rank])},
    }
    if world.rank == 0:
        args.results.mkdir(parents=True, exist_ok=True)
        path = args.results / f"{result['machine']['date'].split()[0]}-{args.name or world.size}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(text(result), end="")


if __name__ == "__main__":
    main()
