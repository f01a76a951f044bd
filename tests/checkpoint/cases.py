"""A small set of tensors, cut up over the ranks of any mesh, and what the tests ask of a checkpoint of it."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.checkpoint import Slab, open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from hpcmp.partition import part

TENSORS = {
    "model/blocks/0/up/weight": ((7, 11), "float32"),
    "model/blocks/1/up/weight": ((5, 13), "float32"),
    "model/blocks/1/qkv": ((9, 3, 2, 5), "float64"),
    "model/blocks/0/norm": ((19,), "float32"),
    "model/scale": ((), "float32"),
    "model/wide": ((3, 4099), "float16"),
    "optimizer/m/blocks/0/up/weight": ((7, 11), "float32"),
    "tokenizer": ((23,), "uint8"),
    "empty": ((0, 4), "float32"),
}
MPIO = pytest.param("mpio", marks=pytest.mark.mpio)
TOGETHER = ["files", "node", "shared", MPIO]  # the storages, on several ranks
STATE = {"config": {"model": {"layers": 2, "style": "gpt"}}, "layout": {"dp": 1, "tp": 2}, "loss": 1.25, "who": "ü"}


def value(name: str, version: int = 0) -> Any:
    """The whole tensor ``name``, in one of many versions."""
    shape, dtype = TENSORS[name]
    return (np.random.default_rng([zlib.crc32(name.encode()), version]).normal(size=shape) * 50).astype(dtype)


def held(mesh: Mesh, name: str) -> tuple[slice, ...]:
    """What this rank holds: a part of the last axis."""
    shape = TENSORS[name][0]
    cut = part(shape[-1], mesh.shape["tp"], mesh.coordinates["tp"]) if shape else None
    return (*(slice(0, n) for n in shape[:-1]), cut) if cut else ()


def on_stage(mesh: Mesh) -> Iterator[str]:
    """The tensors of this rank's pipeline stage."""
    for i, name in enumerate(TENSORS):
        if i % mesh.shape["pp"] == mesh.coordinates["pp"]:
            yield name


def owned(mesh: Mesh, version: int = 0) -> Iterator[Slab]:
    """What this rank writes: its replica's part of what it holds, as strided views."""
    dp, tp = mesh.shape["dp"], mesh.shape["tp"]
    for name in on_stage(mesh):
        index = held(mesh, name)
        if index:
            rows = part(index[0].stop - index[0].start, dp, mesh.coordinates["dp"])
            index = (slice(index[0].start + rows.start, index[0].start + rows.stop), *index[1:])
        elif mesh.coordinates["dp"] != dp - 1 or mesh.coordinates["tp"] != tp - 1:
            continue
        yield Slab(name, TENSORS[name][0], index, value(name, version)[index])


def targets(mesh: Mesh) -> list[Slab]:
    """Arrays for all that this rank holds, with NaN or 77 in them."""
    made = []
    for name in on_stage(mesh):
        shape, dtype = TENSORS[name]
        index = held(mesh, name)
        data = np.full([s.stop - s.start for s in index], 77 if dtype == "uint8" else np.nan, dtype)
        made.append(Slab(name, shape, index, data))
    return made


def assert_filled(slabs: list[Slab], version: int = 0) -> None:
    for slab in slabs:
        np.testing.assert_array_equal(slab.data, value(slab.name, version)[slab.index], err_msg=slab.name)


def assert_untouched(slabs: list[Slab]) -> None:
    for slab in slabs:
        assert (np.isnan(slab.data) if slab.data.dtype.kind == "f" else slab.data == 77).all(), slab.name


def write(root: Path, step: int, version: int | None = None, **options: Any) -> Path:
    """Save version ``version`` (else that of the step's number) from this process alone."""
    mesh = Mesh()
    return save(root, step, owned(mesh, step if version is None else version), STATE, mesh, **options)


def version_at(path: Path) -> int:
    """Which version a checkpoint has in it, all of it."""
    slabs = targets(Mesh())
    open_checkpoint(path).load(slabs)
    (version,) = (v for v in range(100) if (value("tokenizer", v) == by_name(slabs)["tokenizer"].data).all())
    assert_filled(slabs, version)
    return version


def by_name(slabs: list[Slab]) -> dict[str, Slab]:
    return {slab.name: slab for slab in slabs}


def shapes(ranks: int) -> list[dict[str, int]]:
    """Every dp x pp x tp of ``ranks`` ranks."""
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [
        {"dp": dp, "pp": pp, "tp": ranks // dp // pp} for dp in divisors for pp in divisors if ranks // dp % pp == 0
    ]


def same_everywhere(world, text):
    """The text, which all ranks must have alike."""
    assert len(set(world.allgather(text))) == 1, world.allgather(text)
    return text


def visible(root):
    """The names in a directory."""
    return sorted(p.name for p in root.iterdir())


def killed_in(phase: str, save: Callable[[], Any]) -> None:
    """A child process that does ``save`` and is killed in that phase of it."""
    child = os.fork()
    if child == 0:
        os.environ["HPCMP_FAILPOINT"] = f"{phase}:0"
        try:
            save()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{phase} is not a phase of a save"
