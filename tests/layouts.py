"""What the tests of training share: small configurations of odd sizes, every layout of some ranks, and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpcmp.parallel.schedules import SCHEDULES
from hpcmp.training.config import SECTIONS, Config, Layout, with_layout
from hpcmp.training.engine import Engine, mesh_for
from hpcmp.training.verify import source_of, verify

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden": 8,
    "heads": 6,  # on two ranks the middle key-value head is read by both
    "kv_heads": 3,
    "head_size": 4,
    "ffn": 11,
    "vocabulary": 19,
    "sequence": 5,
    "batch": 6,
    "dtype": "float64",
    "steps": 10,
    "warmup": 2,
    "dp": 1,
    "clip": 0.5,  # less than the gradient's norm: clipping takes part
}

ODD: dict[str, Any] = SMALL | {
    "layers": 7,
    "hidden": 20,
    "ffn": 77,
    "vocabulary": 1003,
    "sequence": 13,
    "batch": 7,
    "dropout": 0.1,
    "tied": True,
}


def small(**values: Any) -> Config:
    """A resolved configuration of the sizes in ``SMALL``, except for ``values``: keys of any section."""
    values = SMALL | values
    tables = {
        name: {f.name: values.pop(f.name) for f in dataclasses.fields(section) if f.name in values}
        for name, section in SECTIONS.items()
    }
    assert not values, f"no such keys: {list(values)}"
    return Config.from_dict(tables).resolved()


def spread(config: Config, text: str, ranks: int | None = None) -> Config:
    """``config`` in the layout of ``text``, such as "tp=2,sp=1,micro=3"; ``dp`` is what is left of ``ranks``, or 1."""
    config = with_layout(config, text)
    return config.resolved(ranks=ranks or config.layout.ranks)


def layouts(config: Config, ranks: int, *, schedules: bool = False) -> list[Config]:
    """``config`` in every dp x pp x tp = ranks, with and without sequence parallelism; every second one recomputes.

    schedules: with each schedule, else with one after the other in turn.
    """
    kinds = list(SCHEDULES)
    found: list[Config] = []
    for tp in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for pp in (n for n in range(1, ranks // tp + 1) if ranks // tp % n == 0):
            shape: dict[str, Any] = {"dp": ranks // tp // pp, "pp": pp, "tp": tp}
            for sequence in (True, False) if tp > 1 else (False,):
                for kind in kinds if schedules and pp > 1 else [kinds[len(found) % len(kinds)]]:
                    layout = Layout(
                        **shape,
                        sequence_parallel=sequence,
                        schedule=kind,
                        virtual=2 if kind == "interleaved" else 1,
                        recompute=("none", "full")[len(found) % 2],
                    )
                    found.append(dataclasses.replace(config, layout=layout))
    return found


def assert_serial(configs: list[Config], world: Intracomm | None, limit: float = 1e-12) -> None:
    """Every layout gives the serial model's numbers; says how far off it is, and where most."""
    for report in verify(configs, world, source_of(configs[0])):
        worst = sorted(report.parameters, key=lambda p: max(p.gradient, p.weight), reverse=True)[:3]
        where = ", ".join(f"{p.name}: gradient {p.gradient:.1e}, weight {p.weight:.1e}" for p in worst)
        assert report.worst <= limit, f"{report.layout}: loss {report.loss:.1e}, norm {report.norm:.1e}, {where}"


@contextmanager
def engine(config: Config, comm: Intracomm | None = None) -> Iterator[Engine]:
    """An engine on all ranks of ``comm``; its communicators are freed at the end."""
    with mesh_for(config, comm) as mesh:
        yield Engine(config, mesh)
