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
    checks = wanted.products_check, wanted.attention_check
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
    for why, expected in (("", ("none", "")), ("CuPy finds no GPU", ("", ""))):
        monkeypatch.setattr(needs, "_device", lambda device, why=why: (why, 1 << 30))
        seen = Needs(load_config(toml, ["train.device=cuda"]), ALONE, "x").look(ALONE)
        assert (seen.nccl, seen.cuda, seen.no_cublaslt, seen.no_cudnn) == (22809, 13, *expected)
    assert Needs(load_config(toml, []), ALONE, "x").look(ALONE).nccl == 0
