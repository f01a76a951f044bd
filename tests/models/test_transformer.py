"""GPT and Llama: the layout never changes the mathematics, the names, the shapes or the initial values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array
from hpcmp.comm.base import Communicator, Solo
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import Stage, build
from hpcmp.module import Module, Parameter, Recompute, Sequential
from hpcmp.testing import equals_serial, gradcheck, share, whole
from hpcmp.wgrad import WGrad

GPT = Architecture("gpt", 2, 12, 6, 3, 4, 7, 11, 16, dropout=0.2)
LLAMA = dataclasses.replace(GPT, style="llama", tied=False, bias=False)
ARCHITECTURES = {
    "gpt": GPT,
    "llama": LLAMA,
    "gpt of odd sizes": Architecture("gpt", 1, 20, 5, 1, 4, 77, 1003, 16, dropout=0.1, tied=False),
    "llama with tied weights and biases": dataclasses.replace(LLAMA, tied=True, bias=True, kv_heads=1),
    "gpt without bias, fewer heads and rows than ranks": Architecture("gpt", 1, 8, 2, 2, 4, 3, 3, 16, bias=False),
}


class Member(Solo):
    """A rank of a group that never communicates: enough to build its shards."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def place(length: int, tp: Communicator | None = None, *, sequence: bool = False) -> ModelParallel:
    cursor = Cursor(seed=5)
    cursor.place = Place(3, np.array([7, 4]), length)
    return ModelParallel(tp, cursor, sequence=sequence)


def tokens(a: Architecture, length: int, low: int = 0) -> Array:
    return np.random.default_rng(length).integers(low, a.vocabulary, (length, 2))


class WithLoss(Module):
    """(tokens, targets) -> the loss."""

    def __init__(self, a: Architecture, p: ModelParallel, *, recompute: bool = False) -> None:
        self.model, self.loss = (
            build(a, p, wrap=(lambda block, _: Recompute(block)) if recompute else None),
            VocabularyParallelCrossEntropy(p, a.vocabulary),
        )

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Any]:
        logits, saved = self.model.forward(x[0])
        loss, kept = self.loss.forward((logits, x[1]))
        return loss, (saved, kept)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> None:
        self.model.backward(self.loss.backward(dy, saved[1], wgrad)[0], saved[0], wgrad)


@pytest.fixture(scope="module")
def tp() -> Iterator[Communicator]:
    from mpi4py import MPI

    from hpcmp.comm.mesh import Mesh

    with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
        yield mesh["tp"]


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name: str, recompute: bool) -> None:
    a = ARCHITECTURES[name]
    gradcheck(WithLoss(a, place(5), recompute=recompute), (tokens(a, 5), tokens(a, 5, -1)), elementwise=0)


@pytest.mark.mpi
@pytest.mark.parametrize(("length", "sequence"), [(5, False), (13, True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_equal_serial(tp: Communicator, name: str, length: int, sequence: bool) -> None:
    a, p = ARCHITECTURES[name], place(length, tp, sequence=sequence)
    errors = equals_serial(lambda p: build(a, p), p, tokens(a, length), cut_x=whole, cut_y=share(2))
    assert set(errors) == {"output", "input", *(q.name for q in build(a).parameters())}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_loss_and_its_gradients_equal_serial(tp: Communicator, name: str) -> None:
    """With fewer positions than ranks, recomputed."""
    a, p, x = ARCHITECTURES[name], place(2, tp, sequence=True), (tokens(GPT, 2), tokens(GPT, 2, -1))
    equals_serial(lambda p: WithLoss(a, p, recompute=True), p, x, cut_x=whole, cut_y=whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recompute_changes_nothing(name: str) -> None:
    a = ARCHITECTURES[name]
    found = []
    for recompute in (False, True):
        model = build(a, place(5), wrap=(lambda block, _: Recompute(block)) if recompute else None)
        parameters = model.initialise(2, np.float64)
        y, saved = model.forward(tokens(a, 5))
        model.backward(np.cos(y), saved, wgrad.now)
        found.append([y, *(p.grad for p in parameters)])
        assert [p.name for p in parameters] == [p.name for p in build(a).parameters()]
    for x, again in zip(*found, strict=True):
        np.testing.assert_array_equal(x, again)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_single_precision_stays_single(name: str) -> None:
    a = ARCHITECTURES[name]
    model = build(a, place(5))
    parameters = model.initialise(2)
    y, saved = model.forward(tokens(a, 5))
    model.backward(np.ones_like(y), saved, wgrad.now)
    assert {x.dtype for p in parameters for x in (p.data, p.grad)} | {y.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("name", ["gpt", "llama", "llama with tied weights and biases"])
def test_stages_in_a_row_are_the_model(name: str, stages: int) -> None:
    """Also with more stages than layers. Tied weights are copies on both ends, whose gradients owe each other a sum."""
    a = ARCHITECTURES[name]
    model = build(a, place(5))
    expected = {p.name: p for p in model.initialise(2, np.float64)}
    x = tokens(a, 5)
    y, saved = model.forward(x)
    dy = np.cos(y)
    model.backward(dy, saved, wgrad.now)
    pipe = [build(a, place(5), Stage(i, stages)) for i in range(stages)]
    for stage in pipe:
        stage.initialise(2, np.float64)
    kept, z = [], x
    for stage in pipe:
        z, saved = stage.forward(z)
        kept.append(saved)
    np.testing.assert_array_equal(z, y)
    for stage in reversed(pipe):
        dy = stage.backward(dy, kept.pop(), wgrad.now)
    found: dict[str, Array] = {}
    for stage in pipe:
        for p in stage.parameters():
            assert p.name not in found or p.shared == ("ends",)
            found[p.name] = found.get(p.name, 0) + p.grad
    assert set(found) == set(expected)
    for key, grad in found.items():
        np.testing.assert_allclose(grad, expected[key].grad, rtol=1e-12, atol=1e-15)


# --- parameters on every layout ----------------------------------------------------------------------------------


def shards(a: Architecture, tp: int, pp: int, sequence: bool) -> list[list[Parameter]]:
    """The parameters of every rank of a model replica."""
    return [
        build(a, place(5, Member(i, tp), sequence=sequence), Stage(j, pp)).parameters()
        for i, j in itertools.product(range(tp), range(pp))
    ]


LAYOUTS = [(tp, pp) for tp in (1, 2, 3, 4, 8) for pp in (1, 2, 3, 5)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_shapes_and_owned_parts_on_every_layout(name: str) -> None:
    """Every layout has the same names and shapes, and owns every number once."""
    a = ARCHITECTURES[name]
    serial = {p.name: p for p in build(a).parameters()}
    for tp, pp in LAYOUTS:
        for sequence in (False, True):
            counts = {key: np.zeros(p.shape, int) for key, p in serial.items()}
            for rank in shards(a, tp, pp, sequence):
                for p in rank:
                    assert (p.shape, p.decay) == (serial[p.name].shape, serial[p.name].decay)
                    counts[p.name][p.owned] += 1
                    inside = np.zeros(p.shape, int)
                    inside[p.index] = 1
                    inside[p.owned] += 1
                    assert set(np.unique(inside)) <= {0, 1, 2} and (inside[p.owned] == 2).all()
            wrong = [key for key, count in counts.items() if (count != 1).any()]
            assert not wrong, (tp, pp, sequence)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_rank_holds_what_is_shared_and_says_so(name: str) -> None:
    """Where several ranks of tp hold a number without each having its whole gradient, the sum over tp is owed."""
    a = ARCHITECTURES[name]
    for tp, sequence in itertools.product((2, 3, 4, 8), (False, True)):
        held: dict[str, Array] = {}
        groups = shards(a, tp, 1, sequence)
        for p in itertools.chain(*groups):
            held.setdefault(p.name, np.zeros(p.shape, int))[p.index] += 1
        for p in itertools.chain(*groups):
            replicated = (held[p.name] == tp).all() and p.local_shape == p.shape and "qkv" not in p.name
            overlapping = (held[p.name] > 1).any() and not replicated
            assert p.overlaps == overlapping
            assert p.shared == (("tp",) if overlapping or (replicated and sequence) else ()), p.name


@pytest.mark.parametrize("name", ["gpt", "llama with tied weights and biases"])
def test_initial_values_are_slabs_of_the_serial_ones(name: str) -> None:
    a = ARCHITECTURES[name]
    serial = {p.name: p for p in build(a).initialise(9)}
    for tp, pp in ((2, 1), (3, 2), (8, 3)):
        for i, j in itertools.product(range(tp), range(pp)):
            for p in build(a, place(5, Member(i, tp)), Stage(j, pp)).initialise(9):
                np.testing.assert_array_equal(p.data, serial[p.name].data[p.index])


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_initial_values_of_residual_branches_are_smaller(style: str) -> None:
    a = Architecture(style, 8, 64, 4, 4, 16, 256, 300, 16)
    for p in build(a).initialise(0):
        if p.data.ndim > 1 and "bias" not in p.name:
            branch = p.name.endswith(("out/weight", "down/weight"))
            assert abs(p.data.std() / (0.02 / 4 if branch else 0.02) - 1) < 0.05, p.name


@pytest.mark.parametrize(
    ("tied", "bias", "style"), [*itertools.product([False, True], [False, True], ["gpt", "llama"])]
)
def test_the_number_of_parameters(tied: bool, bias: bool, style: str) -> None:
    for kv in (1, 2, 6):
        a = Architecture(style, 3, 10, 6, kv, 4, 7, 13, 16, tied=tied, bias=bias)
        assert a.parameters == sum(int(np.prod(p.shape)) for p in build(a).parameters())


def test_gpt2_small_and_llama2_7b_have_as_many_parameters_as_published() -> None:
    assert Architecture("gpt", 12, 768, 12, 12, 64, 3072, 50257, 1024).parameters == 124_439_808
    llama = Architecture("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, tied=False, bias=False)
    assert llama.parameters == 6_738_415_616


@pytest.mark.parametrize(("style", "tied"), [("gpt", True), ("gpt", False), ("llama", True), ("llama", False)])
def test_flops_are_those_of_the_matrix_products(style: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as they are computed; norms, which are no products, are the formula's only excess."""
    a = Architecture(style, 2, 24, 6, 3, 4, 50, 101, 16, tied=tied, bias=False)
    counted = 0

    def count(name: str) -> None:
        right = getattr(kernels.CPU, name)

        def kernel(*args: Array) -> Any:
            nonlocal counted
            x, w = (args[1], args[2]) if name == "add_outer" else args[:2]
            width = w.shape[-1] if name != "matmul_transposed" else w.shape[0]
            counted += 2 * x.size * width
            return right(*args)

        monkeypatch.setattr(kernels.CPU, name, kernel)

    for name in ("matmul", "matmul_transposed", "add_outer"):
        count(name)
    model = build(a, place(5))
    norms = sum(p.data.size for p in model.initialise(0) if p.data.ndim == 1)
    y, saved = model.forward(tokens(a, 5))
    model.backward(y, saved, wgrad.now)
    attention = 6 * a.layers * a.heads * a.head_size * 5
    assert a.flops_per_token(5) - 6 * norms - attention == counted / y[..., 0].size


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_gradient_is_asked_for_once(name: str) -> None:
    """A pipeline's W slot, and gradient buckets, count on it."""
    model = build(ARCHITECTURES[name], place(5))
    model.initialise(0)
    y, saved = model.forward(tokens(ARCHITECTURES[name], 5))
    called: list[Any] = []
    model.backward(y, saved, lambda fn, *args: called.append(fn.__self__))
    assert sorted(map(id, called)) == sorted({id(holder) for _, holder, _ in model.walk()})


def test_blocks_are_named_by_their_place_in_the_whole() -> None:
    a = dataclasses.replace(GPT, layers=3)
    names = [[p.name for p in build(a, stage=Stage(i, 2)).parameters()] for i in range(2)]
    assert [{name.split("/")[1] for name in stage if name.startswith("blocks")} for stage in names] == [
        {"0", "1"},
        {"2"},
    ]
    assert isinstance(build(a), Sequential)
