"""Products with epilogues for GPUs over an interpreter of cuBLASLt's descriptors, and without them, on NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array, to_host
from hpcmp.kernels import REFERENCE
from hpcmp.kernels.cuda import epilogue, gemm, multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.layers.mlp import fuse
from hpcmp.module import Module, Sequential
from tests.kernels.cublaslt import CublasLt, make_lt, multiplying
from tests.kernels.cublaslt_names import Epilogue, MatmulDescAttribute
from tests.kernels.emulation.backend import Emulated, emulated, needs_gxx
from tests.kernels.test_cuda_gemm import ALL, EPSILON, HALVES, LAYOUTS, draw, inside
from tests.layers.common import place
from tests.layers.test_mlp import block

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

NAMES = "matmul_gelu", "matmul_gelu_backward", "add_outer_and_rows"
USED = {"matmul_gelu": Epilogue.GELU_AUX_BIAS, "matmul_gelu_backward": Epilogue.DGELU, NAMES[2]: Epilogue.BGRADA}


@pytest.fixture
def library() -> Iterator[CublasLt]:
    """cuBLASLt makes all products, and our kernels run, too."""
    with emulated(), multiplying(make_lt(CublasLt())) as binding:
        yield binding


def same(x: Array) -> Array:
    return x


def arguments(name: str, t: int, i: int, o: int, dtype: Any, lay: Callable[[Array], Array] = same) -> list[Array]:
    """Of a product of (t, i) and (i, o). lay: how matrices that are read may lie."""
    x, w, dy = lay(draw(1, dtype, t, i)), lay(draw(2, dtype, i, o)), lay(draw(3, dtype, t, o))
    if name == "matmul_gelu":
        return [x, w, draw(4, dtype, o)]
    if name == "matmul_gelu_backward":
        return [dy, w, draw(5, dtype, t, i)]
    wide = np.promote_types(dtype, np.float32)
    return [draw(6, wide, i, o), draw(7, wide, o), x, dy]


def check(name: str, given: list[Array], put: Callable[[Array], Any] = same) -> list[Any]:
    """The results of a kernel, of which it is held that they are the reference's in double precision. put: of an array
    on the host makes one where the kernel is to run."""
    wide = [np.array(x, np.float64) for x in given]
    made = getattr(REFERENCE, name)(*wide)
    expected = [*(made if isinstance(made, tuple) else [] if made is None else [made]), *wide]
    there = [put(x) for x in given]
    found = getattr(epilogue, name)(*there)
    results = [*(found if isinstance(found, tuple) else [] if found is None else [found])]
    for y, z in zip([*results, *there], expected, strict=True):
        scale = max(1.0, float(np.abs(z).max(initial=0)))
        assert np.abs(to_host(y).astype(np.float64) - z).max(initial=0) <= 4 * EPSILON[y.dtype.name] * scale
    return results


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_product_does_it_where_cublaslt_can(library: CublasLt, name: str, lay: str, dtype: Any) -> None:
    for t, i, o in (5, 16, 8), (1, 8, 24), (33, 40, 16):
        check(name, arguments(name, t, i, o, dtype, LAYOUTS[lay]))
        assert library.made == ([USED[name]] if t > 1 or name != NAMES[2] else [Epilogue.DEFAULT])
        library.made.clear()


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("lay", ["rows", "turned slice"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_do_it_elsewhere(library: CublasLt, name: str, lay: str, dtype: Any) -> None:
    """Of widths that are no multiple of 8, of one term or of none, and of 32 and 64 bits."""
    for t, i, o in (5, 7, 3), (4, 1, 1), (1, 9, 17), (6, 3, 1), (3, 0, 8), (0, 8, 8), (3, 8, 0):
        check(name, arguments(name, t, i, o, dtype, LAYOUTS[lay] if min(t, i, o) else same))
    if dtype not in HALVES or name != NAMES[2]:
        assert {Epilogue.DEFAULT, Epilogue.BIAS} >= set(library.made)


@pytest.mark.parametrize("without", ["algorithms", "nvmath"])
@pytest.mark.parametrize("name", NAMES)
def test_without_cublaslts(library: CublasLt, name: str, without: str) -> None:
    """Its plain products and our kernels; without nvmath-python, cuBLAS's, which add no bias."""
    (known,) = multiply.planners()
    if without == "algorithms":
        library.epilogues = {Epilogue.DEFAULT, Epilogue.BIAS}
        way: Any = contextlib.nullcontext()
    else:

        def cublas(p: Any, bias: int, aux: int = 0) -> Any:
            return None if p.bias or p.epilogue or p.onto else known(p, 0)

        way = mock.patch.multiple(multiply, planners=lambda: (cublas,), _cublas=cublas)
    with way:
        for dtype in ALL:
            for sizes in (5, 16, 8), (9, 7, 3), (70, 3, 520), (0, 3, 5):
                check(name, arguments(name, *sizes, dtype))
    assert {Epilogue.DEFAULT, Epilogue.BIAS} >= set(library.made)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_a_bias_and_gelu_in_one_kernel(library: CublasLt, dtype: Any) -> None:
    """In place, aligned or not: the same bits, those of the sum rounded and of the gelu of the sum."""
    for rows, n in (3, 8), (5, 33), (2, 4100), (700, 24), (0, 8), (4, 0):
        z, bias = draw(1, dtype, rows, n) * dtype.type(2), draw(2, dtype, n)
        whole = z.astype(np.float64) + bias.astype(np.float64)
        moved = inside(z.reshape(1, z.size), (0, 0), (1, 0)).reshape(z.shape)
        y, y_moved = epilogue._bias_gelu(z, bias), epilogue._bias_gelu(moved, inside(bias[None], (0, 0), (1, 0))[0])
        for found, expected in ((z, whole), (y, REFERENCE.gelu(whole))):
            scale = max(1.0, float(np.abs(expected).max(initial=0)))
            assert np.abs(found.astype(np.float64) - expected).max(initial=0) <= EPSILON[dtype.name] * scale
        np.testing.assert_array_equal(moved, z)
        np.testing.assert_array_equal(y_moved, y)


@pytest.mark.parametrize("way", ["cublaslt", "cublas"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_a_product_is_added_to_an_array(library: CublasLt, dtype: Any, way: str) -> None:
    """Which stays as it is, wherever it lies, and is not the result; in the product itself where cuBLASLt makes it."""
    (known,) = multiply.planners()

    def cublas(p: Any, bias: int, aux: int = 0) -> Any:
        return None if p.bias or p.onto else known(p, 0)

    with mock.patch.object(multiply, "planners", lambda: (known if way == "cublaslt" else cublas,)):
        for t, i, o in (5, 16, 8), (33, 40, 16), (4, 7, 3), (1, 9, 17), (3, 0, 8), (0, 8, 8):
            x, w, bias = draw(1, dtype, t, i), draw(2, dtype, i, o), draw(3, dtype, o)
            onto = draw(4, dtype, t, o) * dtype.type(3)
            for each in onto, inside(onto, (1, 1), (0, 1)) if onto.size else onto, np.asfortranarray(onto):
                before = each.copy()
                for given in [x, w, each, bias], [x, w, each]:
                    (found,) = check("matmul_onto", given)
                    assert found.shape == onto.shape and not np.shares_memory(found, each)
                np.testing.assert_array_equal(each, before)
    assert all(planned[0] is not None for planned in multiply._plans.values())
    assert {key[-1] and not planned[2] for key, planned in multiply._plans.items()} >= {way == "cublaslt"}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_serves_arrays_elsewhere(library: CublasLt, name: str) -> None:
    """The second time as the first, with the pointers of the second: what the first wrote stays."""
    first = arguments(name, 5, 16, 8, HALVES[0])
    results = check(name, first)
    before, plans = [x.tobytes() for x in (*first, *results)], len(multiply._plans)
    again = arguments(name, 5, 16, 8, HALVES[0])
    for x in again:
        x *= x.dtype.type(0.5)
    check(name, again)
    assert [x.tobytes() for x in (*first, *results)] == before and len(multiply._plans) == plans
    assert library.made == [USED[name]] * 2


def test_the_gradient_of_a_bias_is_added_up_in_float32(library: CublasLt) -> None:
    ones, grad, bias_grad = np.ones((1001, 8), HALVES[0]), np.zeros((8, 8), np.float32), np.ones(8, np.float32)
    epilogue.add_outer_and_rows(grad, bias_grad, ones, ones)
    assert (grad == 1001).all() and (bias_grad == 1002).all() and library.made == [Epilogue.BGRADA]
    with pytest.raises(TypeError, match="adding up in bfloat16"):
        epilogue.add_outer_and_rows(ones[:8], bias_grad, ones, ones)
    with pytest.raises(TypeError, match="adding up in bfloat16"):
        epilogue.add_outer_and_rows(grad, ones[0], ones, ones)


def test_a_bias_that_lies_elsewhere_or_is_wider(library: CublasLt) -> None:
    x, w, bias = arguments("matmul_gelu", 5, 16, 8, HALVES[0])
    for each in inside(bias[None], (0, 0), (1, 0))[0], np.repeat(bias, 2)[::2], bias.astype(np.float32):
        check("matmul_gelu", [x, w, each])
    assert library.made == [Epilogue.GELU_AUX_BIAS] * 3
    check("matmul_gelu", [x, w])
    assert library.made[3:] == [Epilogue.GELU_AUX]


def test_dtypes_that_differ(library: CublasLt) -> None:
    """The result has the first's; no epilogue takes them."""
    x, w, dy = draw(1, HALVES[0], 5, 16), draw(2, np.dtype("float32"), 16, 8), draw(3, HALVES[0], 5, 8)
    assert {y.dtype for y in check("matmul_gelu", [x, w, draw(4, HALVES[0], 8)])} == {HALVES[0]}
    assert check("matmul_gelu_backward", [dy, w, x])[0].dtype == HALVES[0]
    check(NAMES[2], [draw(5, w.dtype, 16, 8), draw(6, w.dtype, 8), x, dy.astype(np.float32)])
    assert {Epilogue.DEFAULT, Epilogue.BIAS} >= set(library.made)


def test_a_choice_is_one_of_an_epilogue(tmp_path: Path) -> None:
    """Of four products of one shape, each has its own; a file from before there were epilogues is of those without."""
    file = tmp_path / "choices"
    x, w, bias = draw(1, HALVES[0], 8, 16), draw(2, HALVES[0], 16, 16), draw(3, HALVES[0], 16)

    def run(choices: Choices, seconds: Any = None) -> list[int]:
        with emulated(), multiplying(make_lt(CublasLt(), choices, seconds)) as binding:
            gemm.matmul(x, w, bias)
            gemm.matmul(x, w)
            epilogue.matmul_gelu(x, w, bias)
            epilogue.matmul_gelu(x, w)
            return binding.used

    ways = iter([n for best in (3, 4, 5, 6) for n in range(1, 9) for n in (abs(n - best),)])
    run(Choices(tune=file), lambda call: call() or float(next(ways)))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["product"]["epilogue"], line["product"]["bias"]) for line in lines] == [
        ("", True), ("", False), ("gelu", True), ("gelu", False),
    ]  # fmt: skip
    assert run(Choices(read=file)) == [3, 4, 5, 6]
    for line in lines:
        del line["product"]["epilogue"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(Choices(read=file)) == [3, 4, 1, 1]


def launches(module: Module, x: Array) -> tuple[int, int]:
    """How many products, and how many kernels of ours, a forward and a backward are."""
    module.initialise(0, x.dtype)
    names: list[str] = []
    right = Emulated.__call__

    def call(self: Emulated, *args: Any, **more: Any) -> None:
        names.append(self.name)
        right(self, *args, **more)

    on_cuda = mock.patch.object(kernels, "of", lambda x: kernels.CUDA_HALF)
    with (
        emulated(),
        multiplying(make_lt(CublasLt())) as binding,
        on_cuda,
        mock.patch.object(Emulated, "__call__", call),
    ):
        y, saved = module.forward(x)
        module.backward(y, saved, wgrad.now)
    return len(binding.used), len(names)


def test_the_launches_of_a_feed_forward_layer() -> None:
    """6 products and, of CuPy's, 2 sums of vectors, where there were 6 products and 6 passes over activations."""
    x = draw(1, HALVES[0], 5, 2, 8)
    fused = fuse(block(place(5), 32, hidden=8)).layers["mlp"]
    assert launches(fused.layers["up activation down"], x) == (6, 0)
    layers = block(place(5), 32, hidden=8).layers["mlp"].layers
    with mock.patch.object(epilogue, "fused", lambda *args, **more: False):
        assert launches(Sequential(layers["up"], layers["activation"], layers["down"]), x) == (6, 6)


# --- errors of the kinds that are made, planted one at a time ----------------------------------------------------


def told(name: MatmulDescAttribute, wrong: Callable[[int], int | None]) -> Callable[[CublasLt], None]:
    """Another value of an attribute, or none."""

    def plant(binding: CublasLt) -> None:
        right = binding.matmul_desc_set_attribute

        def set_attribute(desc: int, attr: int, buf: int, size: int) -> None:
            value = int.from_bytes(ctypes.string_at(buf, size), "little")
            changed = wrong(value) if attr == name else value
            if changed is not None:
                number = ctypes.c_uint64(changed)
                right(desc, attr, ctypes.addressof(number), size)

        binding.matmul_desc_set_attribute = set_attribute  # type: ignore[method-assign]

    return plant


def once(name: MatmulDescAttribute) -> Callable[[CublasLt], None]:
    """A pointer that stays the first call's."""
    first: list[int] = []
    return told(name, lambda value: first[0] if first else first.append(value) or value)


def kind(wrong: dict[int, int]) -> Callable[[CublasLt], None]:
    return told(MatmulDescAttribute.EPILOGUE, lambda value: wrong.get(value, value))


A = MatmulDescAttribute
ERRORS: dict[str, tuple[str, Callable[[CublasLt], None]]] = {
    "no aux": (NAMES[0], told(A.EPILOGUE_AUX_POINTER, lambda value: None)),
    "no leading dimension": (NAMES[0], told(A.EPILOGUE_AUX_LD, lambda value: None)),
    "a leading dimension that is no multiple of 8": (NAMES[1], told(A.EPILOGUE_AUX_LD, lambda value: value + 4)),
    "the leading dimension of something wider": (NAMES[0], told(A.EPILOGUE_AUX_LD, lambda value: value + 8)),
    "a short leading dimension": (NAMES[1], told(A.EPILOGUE_AUX_LD, lambda value: value - 8)),
    "no bias": (NAMES[0], told(A.BIAS_POINTER, lambda value: None)),
    "nowhere for the sums": (NAMES[2], told(A.BIAS_POINTER, lambda value: None)),
    "the first call's aux, written": (NAMES[0], once(A.EPILOGUE_AUX_POINTER)),
    "the first call's aux, read": (NAMES[1], once(A.EPILOGUE_AUX_POINTER)),
    "the first call's bias": (NAMES[0], once(A.BIAS_POINTER)),
    "the first call's sums": (NAMES[2], once(A.BIAS_POINTER)),
    "a bias forgotten": (NAMES[0], kind({Epilogue.GELU_AUX_BIAS: Epilogue.GELU_AUX})),
    "no gelu": (NAMES[0], kind({Epilogue.GELU_AUX_BIAS: Epilogue.BIAS})),
    "no derivative": (NAMES[1], kind({Epilogue.DGELU: Epilogue.DEFAULT})),
    "sums of the other operand": (NAMES[2], kind({Epilogue.BGRADA: Epilogue.BGRADB})),
    "no sums": (NAMES[2], kind({Epilogue.BGRADA: Epilogue.DEFAULT})),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_found(error: str) -> None:
    name, plant = ERRORS[error]

    def calls() -> None:
        kept = []  # what the first call was given lives on, or the second might lie in its place
        for factor in (1, 2):
            given = arguments(name, 5, 16, 24, HALVES[0])
            kept.append((given, check(name, [x * x.dtype.type(factor) for x in given])))

    for wrong in (False, True):
        binding = CublasLt()
        if wrong:
            plant(binding)
        with emulated(), multiplying(make_lt(binding)):
            with pytest.raises((AssertionError, KeyError)) if wrong else contextlib.nullcontext():
                calls()
