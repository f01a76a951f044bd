"""Campaigns of faults against checkpoints, at any size.

    python -m tests.checkpoint.campaign flips --count 2000        bits flipped in every kind of file and region
    python -m tests.checkpoint.campaign kills --count 300 --ranks 2 --set checkpoint.asynchronous=true

A flip may be refused, passed over for the checkpoint before, or do nothing; no other numbers may ever be loaded. What
a killed run must find is said in ``kills.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hpcmp.checkpoint import directory, manifest, open_checkpoint
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import assert_untouched, targets, value, write
from tests.checkpoint.kills import kills, train

REGIONS = ("numbers", "HDF5 metadata", "manifest", "latest")


def flips(count: int, seed: int, folder: Path) -> Counter[tuple[str, str, str]]:
    """Flip single bits in the newest of two checkpoints: (storage, region, outcome) -> how many."""
    draw, outcomes = Random(f"flips {seed}"), Counter[tuple[str, str, str]]()
    for i, storage in enumerate(("files", "shared")):
        root = folder / storage
        steps = [write(root, step, storage=storage) for step in (1, 2)]
        good = {(slab.name, step): value(slab.name, step) for slab in targets(Mesh()) for step in (1, 2)}
        places = _places(steps[1])
        for _ in range(count // 2 + i * (count % 2)):
            region = draw.choice(REGIONS)
            path, areas = draw.choice(places[region])
            at = draw.choice(draw.choices(areas, [len(area) for area in areas])[0])
            mask = 1 << draw.randrange(8)
            _flip(path, at, mask)
            for what in (root, steps[1]):
                outcomes[storage, region, _loaded(what, good)] += 1
            _flip(path, at, mask)
        assert _loaded(root, good) == "equal"
    return outcomes


def _places(step: Path) -> dict[str, list[tuple[Path, list[range]]]]:
    """Region -> files, with the areas of each that belong to the region."""
    found, _ = manifest.read(step / manifest.NAME)
    places: dict[str, list[tuple[Path, list[range]]]] = {region: [] for region in REGIONS}
    for name, file in found.files.items():
        numbers = [range(offset, offset + length) for offset, length in file.extents]
        edges = [0, *(edge for area in numbers for edge in (area.start, area.stop)), file.bytes]
        around = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        places["HDF5 metadata"].append((step / name, around))
        if numbers:
            places["numbers"].append((step / name, numbers))
    for region, path in (("manifest", step / manifest.NAME), ("latest", step.parent / directory.LATEST)):
        places[region].append((path, [range(path.stat().st_size)]))
    return places


def _flip(path: Path, at: int, mask: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ mask]))


def _loaded(path: Path, good: dict[tuple[str, int], Any]) -> str:
    """What comes of loading: "refused", "equal", "the one before", or "WRONG"."""
    slabs = targets(Mesh())
    try:
        found = open_checkpoint(path)
        found.load(slabs)
    except CheckpointError:
        assert_untouched(slabs)
        return "refused"
    if not all(np.array_equal(slab.data, good.get((slab.name, found.step))) for slab in slabs):
        return "WRONG"
    return "equal" if found.step == 2 else "the one before"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name, count in (("flips", 2000), ("kills", 300)):
        action = actions.add_parser(name)
        action.add_argument("--count", type=int, default=count)
        action.add_argument("--seed", type=int, default=0)
    action.add_argument("--ranks", type=int, default=1)
    action.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the configuration")
    actions.add_parser("train").add_argument("arguments", nargs="+")
    args = parser.parse_args()
    if args.action == "train":
        from mpi4py import MPI

        train(args.arguments, MPI.COMM_WORLD)
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpcmp-campaign-") as temporary:
        folder = Path(temporary)
        if args.action == "flips":
            outcomes = flips(args.count, args.seed, folder)
            for key, number in sorted(outcomes.items()):
                print(f"{' / '.join(key):48} {number:8,}")
            bad = [key for key in outcomes if key[2] == "WRONG"]
        else:
            tell = partial(print, flush=True)
            counts, bad = kills(args.count, args.seed, args.ranks, args.set, folder, tell=tell)
            print(", ".join(f"{where} {number}" for where, number in sorted(counts.items())), *bad, sep="\n")
    print(f"{args.count:,} {args.action} in {time.monotonic() - start:.0f} s: {len(bad)} with a bad end")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
