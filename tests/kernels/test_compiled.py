"""What the compiled kernels promise beside the specification: precision, the same bits on any number of threads, one
compilation for all processes of a node, and a package that works without Numba."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.kernels import attention as specification
from tests.kernels.test_kernels import CALLS, Sizes, attention_mask, first_keys, run

pytest.importorskip("numba")

from hpcmp.kernels import threads  # noqa: E402
from hpcmp.kernels.compiled import jit  # noqa: E402

FOUND = kernels.with_numba()
assert FOUND is not None
COMPILED = FOUND[0]
NAMES = [name for name in CALLS if getattr(COMPILED, name) is not getattr(kernels.NUMPY, name)]
RNG = np.random.default_rng


def test_what_is_compiled() -> None:
    assert {"layer_norm", "gelu", "swiglu", "rope", "attention", "cross_entropy_parts", "adamw"} <= set(NAMES)
    assert not {"matmul", "embedding"} & set(NAMES)  # the BLAS's, or as fast in NumPy


@jit.jit
def _exp(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = jit.exp(x[i])


def test_exp_of_float32_to_2e_6_and_of_float64_to_the_last_bits() -> None:
    for dtype, tolerance in ((np.float32, 2e-6), (np.float64, 4e-16)):
        x = np.concatenate([np.linspace(-87, 88, 200_001), RNG(0).normal(size=50_000)]).astype(dtype)
        y = np.empty_like(x)
        _exp(x, y)
        assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < tolerance
    x, y = np.array([-1e30, -np.inf, 1e30, np.nan], np.float32), np.empty(4, np.float32)
    _exp(x, y)
    assert (y[:2] == 0).all() and y[2] > 1e38 and np.isnan(y[3])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_is_noticed(name: str) -> None:
    """A step looks for it in the loss and in the gradient's norm: no kernel may swallow it."""
    arguments = CALLS[name](Sizes(5, 7, np.float32))
    i = 1 if name == "embedding_backward_weight" else 0
    place = next(n for n, v in enumerate(arguments) if n >= i and isinstance(v, np.ndarray) and v.dtype == np.float32)
    arguments[place].reshape(-1)[...] = np.nan
    found = run(COMPILED, name, arguments)
    assert any(np.isnan(np.asarray(y, np.float64)).any() for y in found[: -len(arguments)] or found[:1])


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("s", "t", "causal"), [(150, 150, True), (64, 64, True), (70, 201, False), (200, 3, False)])
def test_attention_over_several_blocks(s: int, t: int, causal: bool, groups: int) -> None:
    """Queries beyond a block, with and without a mask, and with documents apart."""
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        rng = RNG(s + t)
        q, do, kv = rng.normal(size=(s, 2, 6, 8)), rng.normal(size=(s, 2, 6, 8)), rng.normal(size=(t, 2, groups, 2, 8))
        settings = product((None, attention_mask(s, 2, 6, t)), (None, first_keys(s, 2, t, causal)))
        for keep, first in settings:
            o, lse = specification.attention(q, kv, 0.4, keep, causal, first)
            expected = (o, lse, *specification.attention_backward(do, q, kv, o, lse, 0.4, keep, causal, first))
            q1, do1, kv1 = (x.astype(dtype) for x in (q, do, kv))
            o1, lse1 = COMPILED.attention(q1, kv1, 0.4, keep, causal, first)
            found = (o1, lse1, *COMPILED.attention_backward(do1, q1, kv1, o1, lse1, 0.4, keep, causal, first))
            for x, y in zip(found, expected, strict=True):
                assert x.dtype == dtype
                largest = np.abs(y[np.isfinite(y)]).max(initial=0)
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CALLS[name](Sizes(300, 31, np.float32))
    expected = run(COMPILED, name, arguments)
    monkeypatch.setattr(threads, "_WORTH", 1)
    monkeypatch.setattr(threads, "count", lambda: 4)
    for x, y in zip(run(COMPILED, name, arguments), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_work_is_shared_over_threads_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 3)
    done: list[tuple[int, int]] = []
    threads.share(10, 100, lambda a, b: done.append((a, b)))
    assert done == [(0, 10)]
    done.clear()
    threads.share(10, 10 * threads._WORTH, lambda a, b: done.append((a, b)))
    assert sorted(done) == [(0, 4), (4, 7), (7, 10)]
    with pytest.raises(ZeroDivisionError):  # of any thread
        threads.share(10, 10 * threads._WORTH, lambda a, b: 1 // (a - 4))


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


ONE = "import numpy as np; from hpcmp import kernels; x = np.ones(3, np.float32); k = kernels.of(x); k.square_sum(x); "


def test_one_process_compiles_and_the_others_load(tmp_path: Path) -> None:
    code = ONE + (
        "from hpcmp.kernels.compiled import update; print(update._square_sum.compiled.stats.cache_misses.total())"
    )
    ranks = [python(code, NUMBA_CACHE_DIR=str(tmp_path), TMPDIR=str(tmp_path)) for _ in range(4)]
    assert sorted(rank.communicate()[0].strip() for rank in ranks) == ["0", "0", "0", "1"]


def test_without_numba_and_when_told_kernels_are_those_in_numpy() -> None:
    told = "print(k is kernels.NUMPY is kernels.CPU, 'numba' in sys.modules)"
    assert python("import sys; " + ONE + told, HPCMP_KERNELS="reference").communicate()[0].split() == ["True", "False"]
    none = "import sys; sys.modules['numba'] = None; " + ONE + "print(k is kernels.NUMPY)"
    assert python(none).communicate()[0].split() == ["True"]


def test_use_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kind", kernels._kind)
    monkeypatch.delenv("HPCMP_KERNELS", raising=False)
    x = np.zeros(3)
    kernels.use("reference")
    assert kernels.of(x) is kernels.NUMPY
    kernels.use("auto")
    assert kernels.of(x) is COMPILED
    monkeypatch.setenv("HPCMP_KERNELS", "reference")
    kernels.use("auto")
    assert kernels.of(x) is kernels.NUMPY
