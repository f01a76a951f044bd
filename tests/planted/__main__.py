"""The tables of docs/verification.md, measured: ``mpirun -n 8 python -m tests.planted [--write]``."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hpcmp.training.verify import source_of, verify
from tests.planted.machinery import Planted, topics

DOCS = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
BEGIN, END = "<!-- begin: python -m tests.planted -->", "<!-- end -->"
ZERO = 1e-12


def measured(error: Planted, comm: MPI.Intracomm) -> tuple[list[float], str]:
    """The largest differences of loss, norm, gradient and weight; or what ended the run. Collective."""
    config = error.config
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
        error.plant(patch)
        try:
            report = verify([config], comm, source_of(config))[0]
        except Exception as found:
            if error.raises is None or not isinstance(found, error.raises):
                raise RuntimeError(error.name) from found
            text = str(found).partition("\n")[0]
            return [], f"`{type(found).__name__}`" + (f": {text}" if len(text) > 8 else "")
    gradient = max(p.gradient for p in report.parameters)
    return [report.loss, report.norm, gradient, max(p.weight for p in report.parameters)], ""


def short(x: float) -> str:
    """One digit: 3e-2, 1, 0 for rounding."""
    mantissa, exponent = f"{x:.0e}".split("e")
    return "0" if x < ZERO else mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"


def tables(comm: MPI.Intracomm) -> Iterator[str]:
    """The lines; the same cases on every rank, each on the first ranks of ``comm``."""
    found = topics()
    every = [p for errors in found.values() for p in errors]
    seen: dict[str, tuple[list[float], str]] = {}
    for p in every:
        if p.check is None:
            part = comm.Split(int(comm.rank >= p.ranks), comm.rank)
            seen[p.name] = measured(p, part) if comm.rank < p.ranks else ([], "")
            comm.Barrier()
    numbers = [values for values, _ in seen.values() if values]
    same = sum(values[0] < ZERO for values in numbers)
    small = sum(ZERO <= values[0] <= 1e-8 for values in numbers)
    yield f"{len(every)} errors: `verify` notices {len(seen)}, other tests the rest. **{same} leave the loss as it"
    yield f"is, and {small} more change it by 1e-8 or less**: no loss curve would have shown them."
    for title, errors in found.items():
        if named := [p for p in errors if p.name in seen]:
            yield from ("", f"### {title}", "", "| error | what is wrong | run | loss | norm | gradient | weight |")
            yield "|---|---|---|---|---|---|---|"
            for p in named:
                values, text = seen[p.name]
                yield f"{p.row} {text} | | | |" if text else f"{p.row} {' | '.join(map(short, values))} |"
    yield from ("", "### Noticed by another test", "")
    yield "Some errors are the same on every layout, the serial one too, and some change no number, so that `verify`"
    yield from ("cannot see them. Other tests do; these stand for them:", "")
    yield from ("| error | what is wrong | the test that notices |", "|---|---|---|")
    yield from (p.row for p in every if p.check)


def main() -> None:
    try:
        lines = list(tables(MPI.COMM_WORLD))
    except Exception:
        traceback.print_exc(limit=-3)
        MPI.COMM_WORLD.Abort(1)
    if MPI.COMM_WORLD.rank:
        return
    if sys.argv[1:] != ["--write"]:
        print("\n".join(lines))
        return
    head, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text("\n".join([head + BEGIN, "", *lines, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
