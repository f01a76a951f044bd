"""Which libraries of NVIDIA's are told to be there, by stand-ins for their packages."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hpcmp.kernels.cuda import libraries


def fail() -> Any:
    raise RuntimeError("Failure finding libcublasLt.so\nin many places")


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, and what they find."""
    lt = SimpleNamespace(get_version=lambda: 130102)
    dnn = SimpleNamespace(backend_version_string=lambda: "9.12.0", __version__="1.28.0")
    monkeypatch.setitem(sys.modules, "nvmath", SimpleNamespace(__version__="1.0.0"))
    monkeypatch.setitem(sys.modules, "nvmath.bindings", SimpleNamespace(cublasLt=lt))
    monkeypatch.setitem(sys.modules, "cudnn", dnn)
    monkeypatch.delenv("HPCMP_CUDNN", raising=False)


def test_what_is_there() -> None:
    assert libraries.cublaslt() == ("13.1.2 (nvmath-python 1.0.0)", "")
    assert libraries.cudnn() == ("9.12.0 (frontend 1.28.0)", "")
    said = "matrix products by cuBLASLt 13.1.2 (nvmath-python 1.0.0); attention by cuDNN 9.12.0 (frontend 1.28.0)"
    assert libraries.said() == f"{said} where it can, else in tiles"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", SimpleNamespace(cublasLt=SimpleNamespace(get_version=fail)))
    assert libraries.cublaslt() == ("", "Failure finding libcublasLt.so")
    version, why = libraries.cudnn()
    assert not version and "cudnn" in why
    assert libraries.said().startswith("matrix products by cuBLAS through CuPy (Failure finding libcublasLt.so); ")
    assert libraries.said().endswith(f"attention in tiles ({why})")
    monkeypatch.setitem(sys.modules, "nvmath", None)
    assert "nvmath" in libraries.cublaslt().why
    monkeypatch.setenv("HPCMP_CUDNN", "no")
    assert libraries.cudnn() == ("", "HPCMP_CUDNN=no")


def test_versions_are_numbers_with_points() -> None:
    assert [libraries.dotted(n) for n in (130102, 22809, 120900)] == ["13.1.2", "2.28.9", "12.9.0"]
