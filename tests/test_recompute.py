"""Recomputation: the same numbers and names, less that is kept, and no more communication than is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.comm.mesh import Mesh
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.transformer import block
from hpcmp.module import Module, Recompute, Residual, Sequential
from hpcmp.recompute import UNITS, RecomputeInput, recompute
from hpcmp.testing import gradcheck
from hpcmp.training.engine import architecture
from tests.layouts import assert_serial, engine, small, spread
from tests.test_module import Affine, Square, gradients

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

KINDS = ("none", "full", *UNITS)


class Linear(Affine):
    """One that keeps its input alone, and counts its forwards."""

    forwards = 0

    def forward(self, x: Array) -> tuple[Array, Array]:
        self.forwards += 1
        return super().forward(x)


def model(kind: type[Module] | None = None) -> tuple[Sequential, Square, Linear]:
    square, linear = Square(), Linear(4, 4)
    made = Residual(square=square, linear=linear, last=Square())
    if kind is not None:
        made.group("square", "linear", kind)
    return Sequential(body=made), square, linear


def test_the_input_of_the_last_is_made_again_and_nothing_else() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    plain, _, _ = model()
    made, square, linear = model(RecomputeInput)
    (dx, grads), (dx_again, again) = gradients(plain, x), gradients(made, x)
    assert list(again) == list(grads) == ["body/linear/weight", "body/linear/bias"]
    np.testing.assert_array_equal(dx_again, dx)
    for name in grads:
        np.testing.assert_array_equal(again[name], grads[name])
    assert (square.forwards, linear.forwards) == (2, 1)
    y, saved = made.forward(x)
    assert saved[0][0] is x  # in place of the square's input and the linear's


def test_gradcheck() -> None:
    gradcheck(model(RecomputeInput)[0], np.random.default_rng(0).normal(size=(3, 4)))


def test_a_layer_that_keeps_more_is_refused() -> None:
    class Greedy(Square):
        def forward(self, x: Array) -> tuple[Array, Any]:
            return x, (x, x)

    with pytest.raises(TypeError, match="Greedy keeps more than its input"):
        RecomputeInput(a=Square(), b=Greedy()).forward(np.ones(3))


def test_group_leaves_alone_what_is_not_there() -> None:
    made = Sequential(a=Square(), b=Square(), c=Square())
    made.group("a", "x", RecomputeInput)
    assert list(made.layers) == ["a", "b", "c"]
    made.group("a", "b", RecomputeInput)
    assert list(made.layers) == ["a b", "c"]


def kept(tree: Any, found: dict[int, int] | None = None) -> dict[int, int]:
    """The bytes of every distinct buffer among the arrays in ``tree``."""
    found = {} if found is None else found
    if isinstance(tree, np.ndarray):
        base = tree
        while isinstance(base.base, np.ndarray):
            base = base.base
        found[id(base)] = base.nbytes
    elif isinstance(tree, list | tuple):
        for item in tree:
            kept(item, found)
    return found


def saved_bytes(style: str, kind: str, parallel: ModelParallel | None = None) -> int:
    config = small(style=style, hidden=24, heads=6, kv_heads=3, head_size=4, ffn=36)
    cursor = Cursor()
    cursor.place = Place(length=10)
    a = architecture(config)
    made = recompute(block(a, parallel or ModelParallel(cursor=cursor), "b"), kind)
    made.initialise(0, np.float64)
    return sum(kept(made.forward(np.ones((10, 2, a.hidden)))[1]).values())


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_what_each_kind_keeps(style: str) -> None:
    """The formulas of docs/memory.md, exactly: numbers for each token of a block, h = 24, q = 24, k = 12, f = 36."""
    h, q, k, f, n, stats = 24, 24, 12, 36, 6, 2 if style == "gpt" else 1
    up = f if style == "gpt" else 2 * f
    norms = h + stats + h + h + stats + h  # the input of each, which is the residual stream's, and of the linear after
    numbers = {
        "none": norms + (q + 2 * k) + (q + n) + up + f,
        "attention": norms + (q + 2 * k) + up + f,
        "activations": 2 * h + (q + 2 * k) + (q + n) + up,
        "full": h,
    }
    tokens, size = 10 * 2, 8
    found = {kind: saved_bytes(style, kind) / tokens / size for kind in KINDS}
    assert found == numbers


LAYOUTS = {
    1: "{}",
    2: "tp=2,sp=1,{}",
    3: "pp=3,micro=2,schedule=1f1b,{}",
    4: "tp=2,pp=2,micro=1,schedule=zb-h1,{}",
    8: "tp=2,cp=2,pp=2,micro=2,{}",
}


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_model_is_the_serial_one(world: Intracomm, style: str) -> None:
    """With dropout, masks included, and with a mixture of experts in every second block."""
    config = small(layers=3, style=style, dropout=0.1, experts=3, experts_every=2, sequence=7)
    kinds = [f"recompute={kind}" for kind in KINDS[1:]] + ["recompute=full,recompute_every=2"]
    assert_serial([spread(config, LAYOUTS[world.size].format(kind)) for kind in kinds], world)


@pytest.mark.mpi(min_size=2)
def test_what_is_sent_again(world: Intracomm) -> None:
    """Recomputing a whole block repeats its forward's communication; the two other kinds repeat none."""
    config = small(hidden=24, heads=world.size, kv_heads=world.size, sequence=2 * world.size)
    sent = {}
    for kind in KINDS:
        with Mesh(world, tp=world.size) as mesh:
            cursor = Cursor()
            cursor.place = Place(length=2 * world.size)
            parallel = ModelParallel(mesh["tp"], cursor, sequence=True)
            made = recompute(block(architecture(config), parallel, "b"), kind)
            made.initialise(0, np.float64)
            counts = []
            for name in ("forward", "backward"):
                before = mesh["tp"].traffic.sent
                if name == "forward":
                    y, saved = made.forward(np.ones((2, 2, 24)))
                else:
                    made.backward(y, saved, wgrad.now)
                counts.append(mesh["tp"].traffic.sent - before)
            sent[kind] = counts
    forward, backward = sent["none"]
    assert sent["full"] == [forward, backward + forward]
    assert sent["attention"] == sent["activations"] == [forward, backward]


def test_every_so_many_blocks() -> None:
    with engine(small(layers=5, recompute="full", recompute_every=2)) as e:
        blocks = [layer for name, layer in e.stages[0].layers.items() if name.startswith("blocks")]
        assert [isinstance(made, Recompute) for made in blocks] == [False, True, False, True, False]
