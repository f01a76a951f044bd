"""Which GPU each rank takes: the choice, and what is said when there are too few; without a GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hpcmp.comm import device
from hpcmp.comm.device import assign, select_device
from hpcmp.errors import InputError


def test_every_rank_has_a_gpu_of_its_own_as_long_as_there_are_some() -> None:
    assert assign([["a", "b", "c", "d"]] * 4) == [0, 1, 2, 3]
    assert assign([["a"], ["b"], ["c"]]) == [0, 0, 0]  # as the launcher binds them
    assert assign([["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]) == [0, 1, 0, 1]  # by socket
    assert assign([["a"], ["a", "b"], ["a", "b", "c"]]) == [0, 1, 2]
    assert assign([["x a", "x b"], ["y a", "y b"]]) == [0, 0]  # two hosts


def test_ranks_share_evenly() -> None:
    assert assign([["a", "b"]] * 5) == [0, 1, 0, 1, 0]


class Cuda:
    """Some GPUs, in place of CuPy's module."""

    def __init__(self, count: int) -> None:
        self.cuda, self.used = self, -1
        self.runtime = SimpleNamespace(
            getDeviceCount=lambda: count,
            deviceGetPCIBusId=lambda i: f"0000:{i:02x}:00.0",
            getDeviceProperties=lambda i: {"name": b"GPU", "uuid": bytes([i])},
        )

    def Device(self, index: int) -> Any:
        return SimpleNamespace(use=lambda: setattr(self, "used", index))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda(2)
    monkeypatch.setattr(device, "module_for", lambda name: made)
    monkeypatch.delenv("HPCMP_SHARE_GPU", raising=False)
    return made


def test_it_becomes_current_and_is_logged(gpus: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hpcmp")
    chosen = select_device(1, lambda value: [value] * 2)
    assert (chosen.index, chosen.name, chosen.shared, chosen.nccl, gpus.used) == (1, "GPU", False, True, 1)
    assert "rank 1: GPU 1 of the 2" in caplog.text


def test_too_few(gpus: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"^3 ranks on host \S+ have 2 GPUs: .* HPCMP_SHARE_GPU=1"):
        select_device(2, lambda value: [value] * 3)
    assert gpus.used == -1
    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    assert select_device(2, lambda value: [value] * 3) == device.Device(0, "GPU", True)
    shared = select_device(0, lambda value: [value] * 3)
    assert shared.shared and not shared.nccl
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert shared.nccl
    assert "3 ranks share 2 GPUs" in caplog.text


def test_one_host_is_crowded_and_the_other_is_not(gpus: Cuda) -> None:
    def gather(value: Any) -> list[Any]:
        host, seen, *rest = value
        return [value, value, *(("far", [s.replace(host, "far") for s in seen], *rest) for _ in range(3))]

    with pytest.raises(InputError, match="^3 ranks on host far have 2 GPUs"):
        select_device(0, gather)


def test_no_gpu_on_another_rank(gpus: Cuda) -> None:
    with pytest.raises(InputError, match=r"^no driver \(rank 1 on host far\)$"):
        select_device(0, lambda value: [value, ("far", [], "no driver", False)])


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise InputError("needs CuPy")

    monkeypatch.setattr(device, "module_for", missing)
    with pytest.raises(InputError, match=r"^needs CuPy \(rank 0 on host"):
        select_device(0, lambda value: [value])
