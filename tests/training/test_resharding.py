"""Every pair of layouts, saved by one and loaded by the other: all numbers bit for bit, and the same next step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from hpcmp.training.config import Config
from hpcmp.training.engine import Engine, mesh_for
from hpcmp.training.state import load_slabs, save_slabs, tensors
from hpcmp.training.verify import source_of
from tests.layouts import engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.timeout(300)

STEPS = 2  # before a checkpoint: moments are not zero
ALL = os.environ.get("HPCMP_TEST_RESHARDING") == "all"  # whole loads and the next step for every pair
FIFTH = 5  # else one a layout: of the other pairs every fifth tensor, other ones from pair to pair

#: Uneven wherever there is something to share: 2 blocks, 3 key-value heads, 11 of ffn, 6 samples, 5 positions.
LAYOUTS = [
    "dp=1",
    "tp=3,sp=1",
    "pp=4,schedule=interleaved,virtual=2,micro=2",
    "pp=2,dp=2,schedule=zb-v,micro=2",
    "pp=3,tp=2,sp=0,stages=1+1+0,micro=3",
    "cp=4",
    "dp=2,cp=2,ulysses=2,tp=2,sp=1",
    "tp_y=2,tp=3",
    "tp_y=2,tp_z=2,tp=2",
    "dp=8,zero=1",
    "dp=2,pp=2,tp=2,zero=2,schedule=zb-h1,micro=2",
    "dp=3,cp=2,zero=3",
    "dp=4,pp=2,zero=3,zero_group=2,micro=1",
]
EXPERTS = [
    "dp=1",
    "dp=8,ep=4,zero=1",
    "dp=3,ep=3,zero=3",
    "dp=2,tp=2,ep=2",
    "dp=2,cp=2,pp=2,ep=2,schedule=zb-h1,micro=2",
    "cp=4,ulysses=2,ep=2,zero=2,zero_group=2",
    "dp=2,tp_z=2,ep=4,tp=2",
]

MODEL: dict[str, Any] = {"style": "llama", "layers": 2, "dropout": 0.1, "tied": True, "learning_rate": 1e-2}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "adamw": (MODEL | {"name": "adamw"}, LAYOUTS),
    "muon": (MODEL | {"name": "muon"}, LAYOUTS[::2]),
    "experts": (MODEL | {"name": "muon", "experts": 5, "expert_ffn": 7}, EXPERTS),
}

Wholes = dict[str, Any]  # tensor -> its numbers in the global shape


def wholes(e: Engine) -> Wholes:
    """The weights and states of all ranks put together; that copies are equal bit for bit is checked."""
    held = [
        (name, piece.parameter.shape, index, part.copy())
        for name, piece, array in tensors(e)
        for index, part in piece.cut(array, piece.parameter.index)
    ]
    found: Wholes = {}
    for name, shape, index, part in itertools.chain.from_iterable(e.mesh.gather_objects(held)):
        there = found.setdefault(name, np.full(shape, np.nan))[index]
        assert np.isnan(there).all() or np.array_equal(there[~np.isnan(there)], part[~np.isnan(there)]), name
        there[...] = part
    assert not [name for name, array in found.items() if np.isnan(array).any()]
    return found


def scramble(e: Engine) -> None:
    """So that nothing is right that was not loaded."""
    for _, _, array in tensors(e):
        array[...] = 777
    e.buckets.publish()
    e.optimizer.steps = 777


def held_equal(e: Engine, expected: Wholes) -> list[str]:
    """The tensors of ``expected`` of which this rank holds other numbers, in one bit or more."""
    pairs = [
        (name, part, index)
        for name, piece, array in tensors(e)
        for index, part in piece.cut(array, piece.parameter.index)
    ]
    pairs += [(f"model/{p.name}", p.data, p.index) for p in e.buckets.parameters if p.data is not None]
    wanted = (pair for pair in pairs if pair[0] in expected)
    return [name for name, part, index in wanted if part.tobytes() != expected[name][index].tobytes()]


def furthest(e: Engine, expected: Wholes) -> float:
    """The largest difference of this rank's numbers to ``expected``, relative to the tensor's largest, or to a tenth
    of the largest of all of its kind."""
    top: dict[str, float] = {}
    for name, array in expected.items():
        kind = name.rpartition("/blocks/")[0] or name.rpartition("/")[0]
        top[kind] = max(top.get(kind, 0.0), float(np.abs(array).max()))
    worst = 0.0
    for name, piece, array in tensors(e):
        kind = name.rpartition("/blocks/")[0] or name.rpartition("/")[0]
        scale = max(float(np.abs(expected[name]).max()), 0.1 * top[kind])
        for index, part in piece.cut(array, piece.parameter.index):
            worst = max(worst, float(np.abs(part - expected[name][index]).max()) / scale)
    return worst


def step(e: Engine, number: int) -> float:
    return e.step(number, *source_of(e.config)(number, e.share)).loss


def begun(stack: ExitStack, world: Intracomm, config: Config) -> Engine | None:
    """An engine on the first ranks of ``world``, as many as ``config`` asks for, until the stack is closed; None on the
    others."""
    part = world.Split(int(world.rank >= config.layout.ranks), world.rank)
    stack.callback(part.Free)
    return Engine(config, stack.enter_context(mesh_for(config, part))) if world.rank < config.layout.ranks else None


@pytest.mark.mpi(size=8)
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_layouts(world: Intracomm, mpi_tmp_path: Path, case: str) -> None:
    values, texts = CASES[case]
    configs = [spread(small(**values), text) for text in texts]
    with ExitStack() as stack:
        engines = [begun(stack, world, config) for config in configs]
        saved = [write(world, e, mpi_tmp_path / str(i)) for i, e in enumerate(engines)]
        serial = engines[0] and (step(engines[0], STEPS), wholes(engines[0]))
        loss, expected = world.bcast(serial)
        for target, e in enumerate(engines):
            for i, arrays in enumerate(saved if e else []):
                where, whole = f"{texts[i]} -> {texts[target]}", ALL or i == (target + 1) % len(saved)
                names = sorted(arrays)[0 if whole else (i + target) % FIFTH :: 1 if whole else FIFTH]
                scramble(e)
                resume(e, mpi_tmp_path / str(i), names)
                wrong = held_equal(e, {name: arrays[name] for name in names})
                assert e.mesh.gather_objects(wrong) == [[]] * e.mesh.size, where
                if whole:  # the state is the same bit for bit whoever saved it
                    found = step(e, STEPS)
                    worst = max(e.mesh.gather_objects(furthest(e, expected)))
                    assert worst <= 1e-12 and found == pytest.approx(loss, rel=1e-12), f"{where}: {worst:.1e}"


def write(world: Intracomm, e: Engine | None, root: Path) -> Wholes:
    """Take the first steps and save; returns all that there is then, on every rank of ``world``."""
    held = None
    if e is not None:
        for number in range(STEPS):
            step(e, number)
        held = wholes(e)
        save(root, STEPS, save_slabs(e, "the tokenizer"), {"optimizer_steps": e.optimizer.steps}, e.mesh)
    made: Wholes = world.bcast(held)
    return made


def resume(e: Engine, root: Path, names: Collection[str] | None = None) -> None:
    """Load all, or the tensors of these names."""
    checkpoint = open_checkpoint(root, e.mesh)
    slabs = [slab for slab in load_slabs(e) if names is None or slab.name in names]
    checkpoint.load(slabs, verify=False)  # which other tests do: it takes as long again
    e.buckets.publish()
    e.optimizer.steps = checkpoint.state["optimizer_steps"]
    assert e.optimizer.steps == STEPS


@pytest.mark.parametrize("then", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("now", ["float32", "float64", "bfloat16", "float16"])
def test_every_pair_of_precisions(tmp_path: Path, then: str, now: str) -> None:
    """Masters and moments are exactly those that were saved; only from float64 are they rounded, once."""
    config = small(**MODEL, dtype=then)
    with engine(config) as e:
        for number in range(STEPS):
            step(e, number)
        before = wholes_of(e)
        save(tmp_path, STEPS, save_slabs(e, ""), {"optimizer_steps": e.optimizer.steps}, Mesh())
    with engine(small(**MODEL, dtype=now)) as e:
        scramble(e)
        resume(e, tmp_path)
        after = wholes_of(e)
        wide = np.float64 if now == "float64" else np.float32
        assert before.keys() == after.keys() and {a.dtype for a in after.values()} == {np.dtype(wide)}
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array.astype(wide), err_msg=name)
        for p in e.buckets.parameters:
            np.testing.assert_array_equal(p.data, after[f"model/{p.name}"].astype(p.data.dtype), err_msg=p.name)


def wholes_of(e: Engine) -> Wholes:
    """Those of an engine on one rank, in their own dtype."""
    return {name: array.reshape(piece.parameter.shape).copy() for name, piece, array in tensors(e)}
