"""``hpcmp checkpoint diff``: what differs between two checkpoints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..common import FAILED, OK, add_command
from .progress import Bar
from .text import PATH_HELP, groups, page, plural, short, table, value

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

ABOUT = """\
Compare two checkpoints tensor by tensor, whatever layouts and storages wrote them: names that only one has, shapes,
dtypes, and the largest difference of the numbers, absolute and relative to the larger of the two. Exits with 0 if the
tensors are equal, NaN being equal to NaN, and with 1 if they are not; differences of the states are shown."""

EXAMPLES = """\
examples:
  hpcmp checkpoint diff runs/a/checkpoints runs/b/checkpoints
  hpcmp checkpoint diff runs/a/checkpoints/step_00001000 runs/a/checkpoints/step_00002000 --only model/"""


def register(actions: Any) -> None:
    """Add the action."""
    command = add_command(actions, "diff", "what differs between two checkpoints", ABOUT, EXAMPLES)
    command.add_argument("a", metavar="A", help=PATH_HELP)
    command.add_argument("b", metavar="B", help="the other")
    command.add_argument("--only", default="", metavar="PREFIX", help="compare the tensors whose names begin so")
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What differs; a damaged checkpoint is not compared, but a CheckpointError."""
    from ...checkpoint import open_checkpoint
    from ...checkpoint.slab import placeholder

    a, b = open_checkpoint(Path(args.a)), open_checkpoint(Path(args.b))
    kinds_a, kinds_b = ({n: k for n, k in c.tensors.items() if n.startswith(args.only)} for c in (a, b))
    if args.only and not (kinds_a or kinds_b):
        heads = sorted({name.partition("/")[0] for name in (*a.tensors, *b.tensors)})
        raise InputError(f"--only {args.only}: no tensor's name begins so; they begin with {', '.join(heads)}")
    common = [name for name in kinds_a if name in kinds_b]
    alike = [name for name in common if kinds_a[name][0] == kinds_b[name][0]]
    for checkpoint in (a, b):
        checkpoint.check([placeholder(name, *checkpoint.tensors[name]) for name in alike])
    different: dict[str, dict[str, Any]] = {}
    with Bar("diff") as bar:
        done, total = 0, sum(math.prod(kinds_a[name][0]) * kinds_a[name][1].itemsize for name in alike)
        for name in common:
            (shape_a, dtype_a), (shape_b, dtype_b) = kinds_a[name], kinds_b[name]
            entry: dict[str, Any] = {}
            if shape_a != shape_b:
                entry["shapes"] = [list(shape_a), list(shape_b)]
            if dtype_a != dtype_b:
                entry["dtypes"] = [dtype_a.name, dtype_b.name]
            if shape_a == shape_b:
                count, absolute, relative = 0, 0.0, 0.0
                for size, part in _blocks(a, b, name):
                    count, absolute, relative = count + part[0], max(absolute, part[1]), max(relative, part[2])
                    done += size
                    bar(done, total)
                if count:
                    entry |= {"count": count, "of": math.prod(shape_a), "absolute": absolute, "relative": relative}
            if entry:
                different[name] = entry
    only_a, only_b = sorted(kinds_a.keys() - kinds_b.keys()), sorted(kinds_b.keys() - kinds_a.keys())
    equal = not (different or only_a or only_b)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "steps": [a.step, b.step],
        "equal": equal,
        "compared": len(common),
        "only_a": only_a,
        "only_b": only_b,
        "different": different,
        "state": _state(a.state, b.state),
        "exit_code": OK if equal else FAILED,
    }


def show(result: dict[str, Any]) -> str:
    """The result as text: a row a tensor that differs, the worst first."""
    lines = [f"A  {result['a']}, step {result['steps'][0]}", f"B  {result['b']}, step {result['steps'][1]}"]
    for side in "ab":
        lines += [f"only in {side.upper()}: {heading}" for heading, _ in groups(result[f"only_{side}"])]
    different = result["different"]
    lines += _kinds("shape", {name: entry["shapes"] for name, entry in different.items() if "shapes" in entry})
    lines += _kinds("dtype", {name: entry["dtypes"] for name, entry in different.items() if "dtypes" in entry})
    numbers = {name: entry for name, entry in different.items() if "count" in entry}
    if numbers:
        rows = [("numbers that differ", "", "absolute", "relative")]
        for name, entry in sorted(numbers.items(), key=lambda item: -item[1]["absolute"]):
            counts = f"{entry['count']:,} of {entry['of']:,}"
            rows.append((name, counts, f"{entry['absolute']:.2e}", f"{entry['relative']:.2e}"))
        lines += ["", *table(rows, "<>>>")]
    if result["state"]:
        states = [(short(key, 40), *(short(value(x), 32) for x in two)) for key, two in result["state"].items()]
        lines += ["", *table([("state that differs", "A", "B"), *states], "<<<")]
    missing = len(result["only_a"]) + len(result["only_b"])
    lines += [""] if numbers or result["state"] else []
    lines.append(
        f"equal: {plural(result['compared'], 'tensor')}"
        if result["equal"]
        else f"differ: {len(different)} of {plural(result['compared'], 'tensor')} in both, {missing} in one"
    )
    return page(lines)


def _kinds(what: str, pairs: dict[str, list[Any]]) -> list[str]:
    found = groups(pairs, lambda name: str(pairs[name]))
    return ["{}: {} {} in A, {} in B".format(heading, what, *pairs[names[0]]) for heading, names in found]


def _blocks(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[tuple[int, tuple[int, float, float]]]:
    """(bytes, difference) of each block of a tensor that both have in the same shape."""
    from ...checkpoint.slab import Region

    shape, dtype = a.tensors[name]
    origin = (0,) * len(shape)
    for region in Region(origin, shape).blocks(max(dtype.itemsize, b.tensors[name][1].itemsize)):
        index = region.relative(origin)
        x, y = a.read(name, index, verify=False), b.read(name, index, verify=False)
        yield region.size * dtype.itemsize, difference(x, y)


def difference(x: Any, y: Any) -> tuple[int, float, float]:
    """How many numbers of two arrays differ, and by how much at most: absolutely, and relative to the larger. A number
    and no number (NaN) differ infinitely."""
    import numpy as np

    unequal = (x != y) & ~((x != x) & (y != y))
    if not unequal.any():
        return 0, 0.0, 0.0
    x, y = x[unequal].astype(np.float64), y[unequal].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        gaps = abs(x - y)
        shares = gaps / np.maximum(abs(x), abs(y))
    gaps, shares = (np.where(np.isnan(values), np.inf, values) for values in (gaps, shares))
    return int(unequal.sum()), float(gaps.max()), float(shares.max())


def _state(a: Any, b: Any, path: str = "") -> dict[str, list[Any]]:
    """The values that differ between two states, by the path of their keys; None where one has none."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {path: [a, b]} if a != b else {}
    found = {}
    for key in sorted(a.keys() | b.keys()):
        found.update(_state(a.get(key), b.get(key), f"{path}.{key}" if path else key))
    return found
