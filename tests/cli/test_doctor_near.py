"""`hpcmp doctor`: whether a rank's cores are next to its GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpcmp.cli.checks import gpu
from hpcmp.cli.checks.gpu import Gpus

LOW, HIGH = frozenset(range(8)), frozenset(range(8, 16))


def test_cores_far_from_a_gpu() -> None:
    mine = frozenset({3}), frozenset({9, 10})
    near = [Gpus("a", ("gpu0", "gpu1"), cores=cores, near=(LOW, HIGH)) for cores in mine]
    assert gpu.near_check(near) == []
    check = gpu.near_check(near[::-1])
    assert check.status == "warn" and "--gpu-bind=closest" in check.advice
    assert check.value == "no core of 2 ranks on a is next to its GPU, which has cores 0 to 7"
    turned = [replace(rank, local=1 - i) for i, rank in enumerate(near[::-1])]  # the launcher numbers them otherwise
    assert gpu.near_check(turned) == []
    assert gpu.near_check([Gpus("a", ("gpu0",), cores=LOW, near=(frozenset(),))]) == []  # the system does not say
    assert gpu.near_check([Gpus("a", cores=LOW)]) == []


def test_cores_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    for text, cores in {"0-3,8-9\n": {0, 1, 2, 3, 8, 9}, "5\n": {5}, "\n": set()}.items():
        (tmp_path / "0000:8a:00.0").mkdir(exist_ok=True)
        (tmp_path / "0000:8a:00.0" / "local_cpulist").write_text(text)
        assert gpu._near("0000:8A:00.0") == cores
    assert gpu._near("0000:8b:00.0") == frozenset()
