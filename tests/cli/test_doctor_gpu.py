"""``hpcmp doctor CONFIG.toml`` of a run on GPUs: whether the libraries that make it fast are there, by facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcmp.cli.checks import gpu, needs
from hpcmp.cli.checks.base import Ranks, guarded
from hpcmp.cli.checks.gpu import Gpus
from hpcmp.cli.checks.needs import Have, Needs
from hpcmp.comm.topology import Topology
from hpcmp.kernels.cuda import libraries
from hpcmp.training.config import load_config
from tests.cli.doctors import bad, good
from tests.corpus import config

ALONE = Ranks(None, Topology((0,), ("a",)))
FITS = "train.dtype=bfloat16", "model.dropout=0", "model.head_size=64"  # attention that cuDNN makes


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return config(tmp_path, tmp_path / "tokens.h5")


def lines(toml: Path, have: Have, *overrides: str) -> list[dict[str, Any]]:
    """The report of a rank that has all, and of one that has what is said."""
    wanted = Needs(load_config(toml, ["train.device=cuda", *FITS, *overrides]), ALONE, "x")
    checks = wanted.products_check, wanted.attention_check, wanted.fp8_check
    return [vars(line) for check in checks for line in guarded(check, [Have("a"), have])]


def test_packages_that_are_missing(toml: Path) -> None:
    """The remedy fits CuPy's CUDA."""
    why = "No module named 'nvmath'", "No module named 'cudnn'"
    found = lines(toml, Have("b", cuda=13, no_cublaslt=why[0], no_cudnn=why[1]))
    value = f"they go by cuBLAS through CuPy on b, slower: {why[0]}"
    assert bad(found, "matrix products", value, '`pip install "hpcmp[cuda13]"`') == "warn"
    assert bad(found, "attention", f"in tiles on b, slower than cuDNN's: {why[1]}", "hpcmp[cuda13,cudnn13]") == "warn"
    assert lines(toml, Have("b")) == []


def test_libraries_that_are_not_found_and_one_that_is_not_wanted(toml: Path) -> None:
    found = lines(toml, Have("b", no_cublaslt="Failure finding libcublasLt.so", no_cudnn="HPCMP_CUDNN=no"))
    assert bad(found, "matrix products", "Failure finding libcublasLt.so", "cupy-cuda12x[ctk]") == "warn"
    assert bad(found, "attention", "HPCMP_CUDNN=no", "`unset HPCMP_CUDNN`") == "warn"


EIGHT = "train.fp8=delayed", "train.batch=2", "layout.dp=1"
EIGHT += "model.hidden=128", "model.heads=2", "model.ffn=64", "model.sequence=64"


def test_products_of_8_bits(toml: Path) -> None:
    assert good(lines(toml, Have("b"), *EIGHT), "train.fp8", "cuBLASLt multiplies 8 bits")
    found = lines(toml, Have("b", capability=80), *EIGHT)
    value = "in bfloat16, slower than without: the GPU has compute capability 8.0, and products of 8 bits come with 8.9"
    assert bad(found, "train.fp8", f"{value} (b)", "train.fp8=none") == "warn"
    found = lines(toml, Have("b", no_cublaslt="No module named 'nvmath'"), *EIGHT)
    assert bad(found, "train.fp8", "no cuBLASLt (No module named 'nvmath') (b)", "`matrix products`") == "warn"
    found = lines(toml, Have("b"), *EIGHT, "model.ffn=100", "train.batch=3", "model.sequence=12")
    value = "no multiple of 16: tokens of a microbatch (12 or 24), ffn of a rank (100)"
    assert bad(found, "train.fp8", value, "change these numbers") == "warn"
    assert good(lines(toml, Have("b", capability=80)), "train.fp8", "")
    assert good(lines(toml, Have("b", device_wrong="no GPU"), *EIGHT), "train.fp8", "")
    found = lines(toml, Have("b"), *EIGHT, "train.device=cpu")
    assert bad(found, "train.fp8", "in float32, as there are no others on a CPU: slower", "train.fp8=none") == "warn"


OTHERS = "model.head_size=66", "model.head_size=264", "model.dropout=0.1", "train.dtype=float32"


@pytest.mark.parametrize("other", OTHERS)
def test_attention_that_cudnn_would_not_make(toml: Path, other: str) -> None:
    found = lines(toml, Have("b", no_cudnn="No module named 'cudnn'"))
    assert not good(found, "attention", "tiles")
    assert good(lines(toml, Have("b", no_cudnn="No module named 'cudnn'"), other), "attention", "")


def test_what_a_rank_looks_at(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "look", lambda ranks: Gpus("a", nccl=22809, runs=(13000, 13000)))
    monkeypatch.setattr(needs, "tokens", lambda path: (0, 300))
    monkeypatch.setattr(libraries, "cublaslt", lambda: libraries.Library(why="none"))
    monkeypatch.setattr(libraries, "cudnn", lambda: libraries.Library("9.12.0"))
    monkeypatch.setattr(libraries, "capability", lambda: 89)
    for why, expected in (("", ("none", "")), ("CuPy finds no GPU", ("", ""))):
        monkeypatch.setattr(needs, "_device", lambda device, why=why: (why, 1 << 30))
        seen = Needs(load_config(toml, ["train.device=cuda"]), ALONE, "x").look(ALONE)
        assert (seen.nccl, seen.cuda, seen.no_cublaslt, seen.no_cudnn) == (22809, 13, *expected)
        assert seen.capability == (90 if why else 89)
    assert Needs(load_config(toml, []), ALONE, "x").look(ALONE).nccl == 0
