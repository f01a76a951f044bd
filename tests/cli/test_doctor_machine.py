"""What ``hpcmp doctor`` says of hosts: software, cores, limits, GPUs; by facts, where a defect cannot be planted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcmp.cli.checks import cgroup, cores, gpu, launch, limits, software
from hpcmp.cli.checks.base import Check, Ranks, guarded
from hpcmp.cli.checks.cores import Cores
from hpcmp.cli.checks.gpu import Gpus
from hpcmp.cli.checks.launch import Launch
from hpcmp.cli.checks.limits import Limits
from hpcmp.cli.checks.software import Software
from hpcmp.comm.detect import Share
from hpcmp.comm.topology import Topology
from tests.cli.doctors import bad, doctor, found, lines

GIB = 2**30


def ranked(host="a", *, on=(0, 1, 2, 3), threads=1, of=4, **rest):
    return Cores(host, Share(frozenset(on), threads), allowed=frozenset(range(of)), **rest)


def test_versions_that_differ_between_hosts_are_a_problem():
    ranks = [Software("a", {"NumPy": "2.4"}), Software("a", {"NumPy": "2.4"}), Software("b", {"NumPy": "2.3"})]
    (check,) = software.version_checks(ranks)
    assert check.status == "problem" and check.value == "2.4 on a; 2.3 on b" and "same environment" in check.advice
    (check,) = software.version_checks([Software("a", {}), Software("b", {"NCCL": "2.28.9"})])
    assert check.status == "problem" and "not found on a" in check.value
    alike = [Software("a", {"NumPy": "2.4"}), Software("b", {"NumPy": "2.4"})]
    assert software.version_checks(alike) == [Check("NumPy", "ok", "2.4")]


def test_many_hosts_are_counted_not_listed():
    ranks = [Software(f"node{i:03}", {"NumPy": "2.4" if i else "2.3"}) for i in range(100)]
    (check,) = software.version_checks(ranks)
    assert check.value == "2.3 on node000; 2.4 on node001, node002, node003 and 96 more"


@pytest.mark.parametrize("name", [*software.MISLEADING])
def test_each_variable_that_misleads(name):
    values, effect = software.MISLEADING[name]
    (check,) = software.settings_check([Software("a", {}, settings={name: values[0] if values else "x"})])
    assert check.status == "warn" and effect in check.value and check.advice == f"`unset {name}`"
    if values:
        assert software.settings_check([Software("a", {}, settings={name: "0"})]).status == "ok"


def test_packages_of_the_home_directory():
    folder = os.path.expanduser("~/.local/lib/python3.11/site-packages")
    check = software.packages_check([Software("a", {}, {"numpy": folder})])
    assert check.status == "warn" and "PYTHONNOUSERSITE=1" in check.advice
    assert software.packages_check([Software("a", {})]).status == "ok" and software.foreign() == {}


def test_ranks_on_some_of_the_jobs_nodes_alone():
    check = launch.launcher_check([Launch("a", job_nodes=2), Launch("a", job_nodes=2)])
    assert check.status == "warn" and "the job has 2 nodes" in check.value and "srun --mpi=pmix" in check.advice
    assert launch.launcher_check([Launch("a", job_nodes=2), Launch("b", job_nodes=2)]).status == "ok"


def test_no_mpirun_on_path():
    check = launch.mpirun_check([Launch("a", own="/opt/mpi/bin/mpirun")])
    assert (
        isinstance(check, Check) and check.status == "warn" and check.advice == "start ranks with /opt/mpi/bin/mpirun"
    )
    assert launch.mpirun_check([Launch("a", launcher="srun", own="/opt/mpi/bin/mpirun")]) == []


def test_threads_that_must_not_call_mpi_and_memory_that_mpi_does_not_take():
    check = launch.thread_check([Launch("a", level="funneled")])
    assert check.status == "warn" and "enable-mpi-thread-multiple" in check.advice
    assert launch.thread_check([Launch("a")]).status == "ok"
    check = launch.cuda_check([Launch("a", gpus=1)])
    assert check.status == "warn" and "load a CUDA-aware MPI" in check.advice
    assert (
        launch.cuda_check([Launch("a", gpus=1, aware=True)]).status == launch.cuda_check([Launch("a")]).status == "ok"
    )


def test_nodes_and_the_tensor_parallel_sizes_that_stay_on_one(monkeypatch):
    monkeypatch.delenv("HPCMP_NODES", raising=False)
    assert launch.node_check(Topology((0, 0, 0))) == Check("nodes", "ok", "3 ranks on one node")
    check = launch.node_check(Topology((0, 0, 0, 0, 1, 1, 1, 1)))
    assert (check.status, check.value) == ("ok", "2 nodes of 4 ranks; tp = 2 or 4 stays on a node")
    assert "a mesh sorts them" in launch.node_check(Topology((0, 1, 0, 1))).value
    check = launch.node_check(Topology((0, 0, 1)))
    assert check.status == "warn" and "no tp stays" in check.value and "as many ranks on every node" in check.advice


@pytest.mark.parametrize(
    ("ranks", "value", "advice"),
    [
        ([ranked(threads=2), ranked(threads=2)], "", ""),
        (
            [ranked(threads=2), ranked("b", threads=2), ranked("b", threads=3)],
            "5 threads of 2 ranks",
            "OMP_NUM_THREADS=2",
        ),
        ([ranked()] * 5, "5 threads of 5 ranks share 4 cores", "at most 4 ranks"),
        ([ranked(on=[0])] * 3, "3 ranks are bound to core 0, of 4", "--bind-to core"),
        ([ranked(on=[0, 1])] * 3, "3 ranks are bound to cores 0, 1, of 4", "srun --cpu-bind=cores"),
        ([ranked(on=[0]), ranked(on=[1])], "", ""),
        ([ranked(on=[0], threads=4)], "4 threads of a rank are bound to core 0", "--map-by slot:PE=4"),
        ([ranked(of=64, on=range(64), launched=True)], "1 of the job's 64 cores", "OMP_NUM_THREADS=64"),
        ([ranked(of=64, on=range(64), launched=True, gpus=4)], "", ""),
        ([ranked(of=64, on=range(64))], "", ""),
    ],
)
def test_threads_are_set_against_the_cores_of_each_host(ranks, value, advice):
    check = cores.core_check(ranks)
    assert check.status == ("warn" if advice else "ok") and value in check.value and advice in check.advice


def test_a_slow_host_a_loaded_one_and_one_at_low_frequency():
    assert cores.rate_check([ranked(rate=10), ranked("b", rate=6)]).status == "ok"
    check = cores.rate_check([ranked(rate=10), ranked("b", rate=4)])
    assert check.status == "warn" and "host b" in check.advice
    (check,) = cores.load_check([ranked(load=1.0), ranked("b", load=9.0)])
    assert check.status == "warn" and "9 processes want the 4 cores of b" in check.value and "top" in check.advice
    (check,) = cores.load_check([ranked(left=(4711, 4712))])
    assert check.status == "warn" and "2 processes of hpcmp" in check.value and "kill 4711 4712" in check.advice
    check = cores.governor_check([ranked(), ranked("b", governor="powersave")])
    assert check.status == "warn" and "on b (powersave)" in check.value and "performance" in check.advice
    assert cores.load_check([ranked(load=1.0)]) == cores.governor_check([ranked()]) == []


def test_ranks_across_numa_nodes():
    nodes = frozenset({0, 1}), frozenset({2, 3})
    check = cores.numa_check([ranked(numa=nodes)] * 2)
    assert check.status == "warn" and "2 NUMA nodes" in check.value and "--bind-to numa" in check.advice
    assert cores.numa_check([ranked(on=[0, 1], numa=nodes), ranked(on=[2, 3], numa=nodes)]) == []
    assert cores.numa_check([ranked(threads=4, numa=nodes)] * 2) == []  # it does not fit on one


def test_a_governor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    for driver, governor, said in (
        ("acpi-cpufreq", "powersave", "powersave"),
        ("intel_pstate", "powersave", ""),
        ("acpi-cpufreq", "performance", ""),
    ):
        (folder / "scaling_driver").write_text(f"{driver}\n")
        (folder / "scaling_governor").write_text(f"{governor}\n")
        assert cores._governor() == said


def test_a_quota_of_cores_is_found(tmp_path):
    """By a group of this machine's, where there may be one."""
    group = Path(f"/sys/fs/cgroup/cpu/hpcmp-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError:
        pytest.skip("no cgroup (version 1) can be made here")
    try:
        done = doctor("--json", shell=f'echo $$ >{group}/cgroup.procs; exec "$@"', cwd=tmp_path)
    finally:
        group.rmdir()
    bad(found(done), "CPU quota", "the time of 0.5 cores", "limits.cpu")
    assert cores.quota_check([ranked(quota=4.0)]) == cores.quota_check([ranked()]) == []


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_group_may_use(tmp_path, monkeypatch, version):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    files = {
        1: {
            "proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/job/step\n1:cpuset:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/cpuset/job/cpuset.cpus": "0-1,4\n",
        },
        2: {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory cpuset\n",
            "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{GIB + 4096}\n",
            "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 4096\n",
            "sys/fs/cgroup/job/cpuset.cpus.effective": "0-1,4\n",
        },
    }[version]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sys/fs/cgroup/job/step").mkdir(parents=True, exist_ok=True)
    assert (cgroup.quota(), cgroup.memory(), cgroup.cores()) == (1.5, (2 * GIB, GIB), frozenset({0, 1, 4}))
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "nothing")
    assert (cgroup.quota(), cgroup.memory(), cgroup.cores()) == (None, None, None)


def test_memory_that_ranks_do_not_start_in():
    check = limits.memory_check([Limits("a", free=4 * GIB), *[Limits("b", free=GIB, total=GIB, grouped=True)] * 4])
    assert check.status == "warn" and "1.0 GiB free, of 1.0 that the job may use (b, 4 ranks)" in check.value
    assert "--mem=0" in check.advice and limits.memory_check([Limits("a", free=GIB)] * 2).status == "ok"


def test_limits_that_depend_on_the_job():
    locked = {"l": 65536}
    check = limits.ulimit_check([Limits("a", locked, infiniband=True)])[0]
    assert "`ulimit -l` is 0.0625 MiB on a" in check.value and "MEMLOCK" in check.advice
    assert limits.ulimit_check([Limits("a", locked)]).status == "ok"
    assert limits.ulimit_check([Limits("a", {"n": 1024})] * 200).status == "ok"
    assert "ulimit -n 65536" in limits.ulimit_check([Limits("a", {"n": 1024})] * 300)[0].advice
    assert "ulimit -u" in limits.ulimit_check([Limits("a", {"u": 256})])[0].advice


def test_a_temporary_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    folder, wrong = limits._temporary()
    check = limits.tmp_check([Limits("a", tmp=folder, tmp_wrong=wrong)])
    assert check.status == "warn" and "not writable" in check.value and "TMPDIR=/tmp" in check.advice
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert limits._temporary() == ("/tmp", "")


CARD = {"cards": True, "driver": True, "nodes": True}
FINE = Gpus("a", ("gpu0", "gpu1"), "H100", nccl=22800, **CARD)


@pytest.mark.parametrize(
    ("ranks", "name", "status", "value", "advice"),
    [
        ([FINE, FINE], "GPUs", "ok", "2 x H100 for 2 ranks", ""),
        ([Gpus("a", why="No module named cupy")], "GPUs", "ok", "none", ""),
        ([Gpus("a", why="No module named cupy", **CARD)], "GPUs", "warn", "no CuPy on a", "pip install cupy-cuda12x"),
        ([Gpus("a")], "GPUs", "warn", "CuPy finds no GPU", "on the CPU"),
        ([Gpus("a", **CARD)], "GPUs", "warn", "where a driver is", "nvidia-smi"),
        ([Gpus("a", cards=True)], "GPUs", "warn", "and no driver", "modprobe nvidia"),
        ([Gpus("a", cards=True, driver=True)], "GPUs", "warn", "none of its devices", "docker run --gpus all"),
        ([Gpus("a", shown="", **CARD)], "GPUs", "warn", "CUDA_VISIBLE_DEVICES= hides", "unset CUDA_VISIBLE_DEVICES"),
        ([FINE, Gpus("b", why="no")], "GPUs", "warn", "none on b", "--constraint"),
        ([FINE] * 3, "GPUs of ranks", "warn", "3 ranks share 2 GPUs on a", "ppr:2:node"),
        ([FINE, Gpus("a", ("gpu1",), nccl=22800)], "GPUs", "ok", "", ""),
        (
            [Gpus("a", ("gpu0",), runs=(12040, 13000), nccl=22800)],
            "CUDA",
            "problem",
            "up to 12.4, and CuPy is of 13.0",
            "cupy-cuda12x",
        ),
        (
            [Gpus("a", ("gpu0",), wheels=("cupy-cuda12x", "cupy-cuda13x"), nccl=1)],
            "CUDA",
            "problem",
            "overwritten",
            "pip uninstall",
        ),
        ([Gpus("a", ("gpu0",))], "NCCL", "warn", "there is none on a", "nvidia-nccl-cu12"),
        ([Gpus("a", ("gpu0",), nccl=20700)], "NCCL", "warn", "2.7.0 is older", "nvidia-nccl-cu12"),
        ([Gpus("a", ("gpu0",), free=0.4, nccl=22800)], "GPU memory", "warn", "60% of a GPU's memory", "nvidia-smi"),
    ],
)
def test_gpus(ranks, name, status, value, advice):
    checks = [line for check in gpu.SUBJECT.checks for line in guarded(check, ranks)]
    (check,) = [check for check in checks if check.name == name]
    assert check.status == status and value in check.value and advice in check.advice
    assert all(check.status == "ok" for check in checks) or status != "ok"


def test_gpus_are_looked_at_through_cupy(monkeypatch):
    """CuPy's answers as they would be, by a stand-in: there is no GPU here."""
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda i: {"name": b"H100", "uuid": bytes([i])},
        deviceGetPCIBusId=lambda i: f"0000:0{i}:00.0",
        driverGetVersion=lambda: 12040,
        runtimeGetVersion=lambda: 12060,
    )
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", SimpleNamespace(get_version=lambda: 22809))
    seen = gpu.look(Ranks(None, Topology((0,), ("a",))))
    assert (len(set(seen.seen)), seen.name, seen.runs, seen.nccl) == (2, "H100", (12040, 12060), 22809)
    assert gpu.count() == 2 and gpu.driver_check([seen]) == []


@pytest.mark.gpu
def test_the_gpu_is_named():
    checks = lines(doctor("--json"))
    assert checks["GPUs"]["value"].startswith(f"{gpu.count()} x ") and checks["CUDA driver"]["value"] != "not found"
