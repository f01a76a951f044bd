"""Which GPU each rank takes: the choice, as schedulers bind ranks, and what is said when there are too few; without a
GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hpcmp.comm import device
from hpcmp.comm.device import Device, Told, assign, select_device, visible
from hpcmp.errors import InputError
from hpcmp.kernels.cuda import libraries


def test_every_rank_has_a_gpu_of_its_own_as_long_as_there_are_some() -> None:
    assert assign([["a", "b", "c", "d"]] * 4) == [0, 1, 2, 3]
    assert assign([["a"], ["b"], ["c"]]) == [0, 0, 0]  # as the launcher binds them
    assert assign([["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]) == [0, 1, 0, 1]  # by socket
    assert assign([["a"], ["a", "b"], ["a", "b", "c"]]) == [0, 1, 2]
    assert assign([["x a", "x b"], ["y a", "y b"]]) == [0, 0]  # two hosts


def test_a_rank_gives_way_to_one_that_sees_fewer() -> None:
    assert assign([["a", "b"], ["a"]]) == [1, 0]
    assert assign([["a", "b"], ["b", "c"], ["a"], ["b"]]) == [1, 1, 0, 0]  # four ranks, three GPUs: one shares
    assert assign([["a", "b"], ["a", "c"], ["a"]]) == [1, 1, 0]


def test_ranks_share_evenly() -> None:
    assert assign([["a", "b"]] * 5) == [0, 1, 0, 1, 0]


class Node:
    """GPUs of a node, in place of CuPy's module: a process sees those that CUDA_VISIBLE_DEVICES names."""

    def __init__(self, count: int, name: str = "node", uuids: bool = True) -> None:
        self.name, self.shown, self.used = name, [str(i) for i in range(count)], -1
        self.cuda, self.uuids = self, uuids
        self.runtime = SimpleNamespace(
            getDeviceCount=lambda: len(self.shown),
            deviceGetPCIBusId=lambda i: f"0000:{self.number(i):02x}:00.0",
            getDeviceProperties=lambda i: {"name": b"H100", "uuid": self.uuid(i)},
        )

    def number(self, index: int) -> int:
        """A GPU's number on the node; slices MIG-g/s are of GPU g."""
        return int(self.shown[index].removeprefix("MIG-").split("/")[0])

    def uuid(self, index: int) -> bytes:
        return f"{self.name}{self.number(index)}".encode().ljust(16, b"-") if self.uuids else bytes(16)

    def Device(self, index: int) -> Any:
        return SimpleNamespace(use=lambda: setattr(self, "used", index))


Ranks = list[tuple[Node, str, dict[str, str]]]  # of each its node, its host's name, and its environment


def job(patch: pytest.MonkeyPatch, ranks: Ranks) -> list[str]:
    """The GPU that each rank takes, by its name; in the order of ranks."""
    tables = []
    every = {name for *_, environ in ranks for name in environ}

    def enter(node: Node, host: str, environ: dict[str, str]) -> None:
        for name in every:
            patch.delenv(name, raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        shown = environ.get("CUDA_VISIBLE_DEVICES")
        node.shown = shown.split(",") if shown else [str(i) for i in range(4)]
        patch.setattr(device, "module_for", lambda name: node)
        patch.setattr("socket.gethostname", lambda: host)

    for rank, each in enumerate(ranks):  # what every rank tells
        enter(*each)
        with pytest.raises(StopIteration):
            select_device(rank, lambda told: tables.append(told) or next(iter(())))  # type: ignore[func-returns-value]
    taken = []
    for rank, each in enumerate(ranks):
        enter(*each)
        found = select_device(rank, lambda told: tables)
        assert found.index == each[0].used and found.nccl is not found.shared
        taken.append(visible(each[1])[found.index])
    return taken


def launched(kind: str, local: int) -> dict[str, str]:
    """What a launcher of 4 tasks a node sets for one of them."""
    return {
        "srun": {"SLURM_PROCID": f"{local}", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": f"{local}"},
        "PALS": {"PALS_RANKID": f"{local}", "PMI_SIZE": "4", "PALS_LOCAL_RANKID": f"{local}", "PALS_LOCAL_SIZE": "4"},
        "jsrun": {
            "JSM_NAMESPACE_RANK": f"{local}",
            "JSM_NAMESPACE_SIZE": "4",
            "JSM_NAMESPACE_LOCAL_RANK": f"{local}",
            "JSM_NAMESPACE_LOCAL_SIZE": "4",
        },
        "Flux": {"FLUX_TASK_RANK": f"{local}", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": f"{local}"},
        "Open MPI": {
            "OMPI_COMM_WORLD_RANK": f"{local}",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": f"{local}",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
    }[kind] | ({"SLURM_STEP_ID": "0"} if kind == "srun" else {})


LAUNCHERS = ("srun", "PALS", "jsrun", "Flux", "Open MPI")
BINDINGS = {
    "all see all": [None, None, None, None],  # Slurm's --gpus-per-node, PBS, mpirun
    "one each": ["0", "1", "2", "3"],  # Slurm's --gpus-per-task, jsrun -g1, Flux -g1
    "one each, the other way": ["3", "2", "1", "0"],  # as sockets lie on some nodes
    "of a socket": ["0,1", "0,1", "2,3", "2,3"],  # Slurm's --gpu-bind=closest
    "some of many": ["0,1", "0", "2,3", "2"],
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and nothing set that is looked at."""
    for kind in LAUNCHERS:
        for name in launched(kind, 0):
            monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HPCMP_SHARE_GPU", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", LAUNCHERS)
@pytest.mark.parametrize("binding", BINDINGS)
def test_every_scheduler_and_binding(monkeypatch: pytest.MonkeyPatch, kind: str, binding: str) -> None:
    node, ranks = Node(4), Ranks()
    for local, shown in enumerate(BINDINGS[binding]):
        ranks.append((node, "node", launched(kind, local) | ({"CUDA_VISIBLE_DEVICES": shown} if shown else {})))
    taken = job(monkeypatch, ranks)
    assert len(set(taken)) == 4
    if binding == "all see all":
        assert [name.split()[0] for name in taken] == [f"0000:{i:02x}:00.0" for i in range(4)]


def test_local_ranks_decide_not_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = job(monkeypatch, [(Node(4), "node", launched("srun", local)) for local in (2, 0, 3, 1)])
    assert [name.split()[0] for name in taken] == [f"0000:{i:02x}:00.0" for i in (2, 0, 3, 1)]


@pytest.mark.parametrize("uuids", [True, False])
def test_hosts_have_gpus_of_the_same_bus_ids(monkeypatch: pytest.MonkeyPatch, uuids: bool) -> None:
    ranks = [(Node(4, host, uuids), host, launched("srun", local)) for host in ("a", "b") for local in range(4)]
    taken = job(monkeypatch, ranks)
    assert len(set(taken)) == 8
    assert [name.split()[0] for name in taken] == [f"0000:{i:02x}:00.0" for i in range(4)] * 2


def test_containers_of_one_node_with_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [(Node(4), f"container{local}", launched("srun", local)) for local in range(4)]
    assert len(set(job(monkeypatch, ranks))) == 4


def test_slices_of_a_gpu_are_nobodys_but_nccl_takes_them_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ("MIG-0/1", "MIG-0/2")
    ranks = [(Node(4), "node", launched("srun", i) | {"CUDA_VISIBLE_DEVICES": name}) for i, name in enumerate(shown)]
    assert [name.split()[-1] for name in job(monkeypatch, ranks)] == list(shown)
    assert not select_device(1, lambda told: [told._replace(seen=["0000:00:00.0 u MIG-0/1"]), told]).nccl
    ranks[1][2]["CUDA_VISIBLE_DEVICES"] = "MIG-1/1"
    assert len(set(job(monkeypatch, ranks))) == 2
    ranks[1][2]["CUDA_VISIBLE_DEVICES"] = "MIG-0/1"
    with pytest.raises(InputError, match="^2 ranks on host node have 1 GPU: "):
        job(monkeypatch, ranks)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(2)
    monkeypatch.setattr(device, "module_for", lambda name: made)
    return made


def test_it_becomes_current_and_is_logged(
    gpus: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hpcmp")
    chosen = select_device(1, lambda told: [told] * 2)
    assert (chosen, chosen.nccl, gpus.used) == (Device(1, "H100", False), True, 1)
    assert "rank 1: GPU 1 of the 2" in caplog.text and "matrix products" not in caplog.text
    for name, value in launched("jsrun", 1).items():
        monkeypatch.setenv(name, value)
    select_device(1, lambda told: [told] * 2)
    assert "rank 1 (local rank 1 of jsrun): GPU 1 of the 2" in caplog.text


def test_too_few(gpus: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hpcmp")
    with pytest.raises(InputError, match=r"^3 ranks on host \S+ have 2 GPUs: .* HPCMP_SHARE_GPU=1"):
        select_device(2, lambda told: [told] * 3)
    assert gpus.used == -1
    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    assert select_device(2, lambda told: [told] * 3) == Device(0, "H100", True)
    monkeypatch.setattr(libraries, "said", lambda: "matrix products by cuBLASLt")
    shared = select_device(0, lambda told: [told] * 3)
    assert caplog.messages.count("matrix products by cuBLASLt") == 1  # once a job
    assert shared.shared and not shared.nccl
    assert "3 ranks share 2 GPUs" in caplog.text


def test_nccl_connects_ranks_that_share_a_gpu_where_all_of_them_say_so(
    gpus: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    for setting, version, expected in (("1", 23003, True), ("1", 22907, False), ("0", 23003, False)):
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", setting)
        monkeypatch.setattr(device, "nccl_version", lambda version=version: version)
        assert select_device(0, lambda told: [told] * 3).nccl is expected
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setattr(device, "nccl_version", lambda: 23003)
    for rank in range(3):  # the same on every rank, whose environments may differ
        assert not select_device(rank, lambda told: [told, told, told._replace(together=False)]).nccl
    slices = ["0000:00:00.0 u MIG-0/1"], ["0000:00:00.0 u MIG-0/2"]
    assert not select_device(0, lambda told: [told._replace(seen=seen) for seen in slices]).nccl


def test_one_host_is_crowded_and_the_other_is_not(gpus: Node) -> None:
    def gather(told: Any) -> list[Any]:
        far = told._replace(host="far", seen=[f"far {gpu}" for gpu in told.seen])
        return [told, told, far, far, far]

    with pytest.raises(InputError, match="^3 ranks on host far have 2 GPUs"):
        select_device(0, gather)


def test_no_gpu_on_another_rank(gpus: Node) -> None:
    with pytest.raises(InputError, match=r"^no driver \(rank 1 on host far\)$"):
        select_device(0, lambda told: [told, Told("far", [], "no driver", False, False, None)])


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise InputError("needs CuPy")

    monkeypatch.setattr(device, "module_for", missing)
    with pytest.raises(InputError, match=r"^needs CuPy \(rank 0 on host"):
        select_device(0, lambda told: [told])
