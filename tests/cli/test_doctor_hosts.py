"""``hpcmp doctor`` on several ranks and hosts, with defects that are planted on one of them."""

from __future__ import annotations

import os
import shutil
import socket
import sys

import pytest

from hpcmp.cli.checks import network
from hpcmp.cli.checks.network import Network
from tests.cli.doctors import DOCTOR, ROOT, bad, found, good, lines, needs_mounts, site, two_hosts

#: On rank 1 the clock is five seconds ahead, and Python another one.
PLANTED = """
import platform, time
if rank == "1":
    clock = time.time
    time.time = lambda: clock() + 5
    platform.python_version = lambda: "3.10.1"
"""

#: A program that starts as every rank does; rank 1 with files of its own in the current directory.
APART = (
    'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then exec unshare -m sh -c \'mount -t tmpfs t "$PWD" && exec "$@"\' sh "$@"; '
)
APART += 'else exec "$@"; fi'


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A job of two hosts, by HPCMP_NODES, the second of which differs in its sources, Python, clock and directory."""
    from tests.harness.launch import run_mpi

    needs_mounts()
    folder = tmp_path_factory.mktemp("apart")
    (folder / "work").mkdir()
    shutil.copytree(ROOT / "hpcmp", folder / "other" / "hpcmp", ignore=shutil.ignore_patterns("__pycache__", "*.orig"))
    with (folder / "other" / "hpcmp" / "random.py").open("a") as file:
        file.write("# changed\n")
    planted = site(folder / "site", PLANTED)
    other = f'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then export PYTHONPATH="{folder}/other:{planted}"; fi; {APART}'
    env = two_hosts() | {"PYTHONPATH": planted}
    return run_mpi(2, ["bash", "-c", other, "sh", *DOCTOR, "--json"], env=env, cwd=folder / "work")


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """The same, with nothing planted."""
    from tests.harness.launch import run_mpi

    folder = tmp_path_factory.mktemp("alike")
    done = run_mpi(2, [*DOCTOR, "--json"], env=two_hosts(), cwd=folder)
    assert list(folder.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("hpcmp", " on node 1 of HPCMP_NODES", "from the same environment"),
        ("Python", "3.10.1 on node 1", "from the same environment"),
        ("clocks", "node 1 of HPCMP_NODES is 5.0 s ahead", "chronyc tracking"),
        ("directory", "is another one on node 1", "that all hosts share"),
    ],
)
def test_a_host_that_differs_is_named(apart, alike, name, value, advice):
    status = bad(found(apart), name, value, advice)
    assert status == ("problem" if name in ("hpcmp", "Python") else "warn")
    assert lines(alike)[name]["status"] == "ok"


def test_two_hosts_of_one_machine_are_told(alike):
    checks = found(alike)
    bad(checks, "nodes", "HPCMP_NODES=0,1", "unset HPCMP_NODES")
    assert "2 nodes of 1 rank" in lines(alike)["nodes"]["value"]
    assert "ms apart" in lines(alike)["clocks"]["value"] and "GB/s from node 0" in lines(alike)["links"]["value"]


def test_nodes_of_a_job_and_by_the_environment(run_mpi, tmp_path):
    done = run_mpi(4, [*DOCTOR, "--json"], env=two_hosts(), cwd=tmp_path)
    check = lines(done)["nodes"]
    assert check["value"].startswith("2 nodes of 2 ranks; tp = 2 stays on a node; ranks of a node are not consecutive")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_ranks_on_one_core_and_a_small_dev_shm(run_mpi, tmp_path):
    """Both ranks are bound to core 0, and /dev/shm has 4 MiB for their windows, of which 2 are a dead job's."""
    needs_mounts()
    shm = 'mount -t tmpfs -o size=4m t /dev/shm && head -c 2100000 /dev/zero >/dev/shm/sm_segment.dead && exec "$@"'
    core = min(os.sched_getaffinity(0))
    argv = ["taskset", "-c", str(core), "unshare", "-m", "sh", "-c", shm, "sh", *DOCTOR, "--json"]
    done = run_mpi(2, argv, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    checks = found(done)
    assert bad(checks, "cores", f"2 ranks are bound to core {core}, of ", "--bind-to core") == "warn"
    assert bad(checks, "/dev/shm", "MiB left", "--shm-size") == "warn"
    bad(checks, "/dev/shm", "too small on ", "2 MiB that dead jobs left")


def test_with_a_core_each_and_room_there_is_nothing_to_say(run_mpi, tmp_path):
    done = run_mpi(2, [*DOCTOR, "--json"], env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    checks = found(done)
    assert good(checks, "/dev/shm", "")
    assert (os.cpu_count() or 1) < 2 or good(checks, "cores", "bound")


def network_of(host, **addresses):
    return Network(host, addresses)


def test_an_address_that_two_hosts_have():
    shared = [
        network_of("a", eth0="10.0.0.1", docker0="172.17.0.1"),
        network_of("b", eth0="10.0.0.2", docker0="172.17.0.1"),
    ]
    check = network.address_check(shared)
    assert check.status == "warn" and "docker0 has the address 172.17.0.1 on a, b" in check.value
    assert "btl_tcp_if_include=eth0 UCX_NET_DEVICES=eth0" in check.advice
    assert network.address_check([network_of("a", eth0="10.0.0.1"), network_of("b", eth0="10.0.0.2")]) == []
    assert network.address_check([network_of("a", eth0="10.0.0.1"), network_of("a", eth0="10.0.0.1")]) == []
    assert network.addresses().keys() <= {name for _, name in socket.if_nameindex()}


def test_a_name_that_a_host_does_not_know(monkeypatch):
    """Of a host that is not there, which the resolver is asked for."""
    from hpcmp.cli.checks import Ranks
    from hpcmp.comm.topology import Topology

    here = socket.gethostname()

    class Two:
        rank, size = 0, 2

    nodes = network.look(Ranks(Two(), Topology((0, 1), (here, "no-such-host.invalid"))))
    check = network.name_check([nodes])
    assert check.status == "warn" and "no-such-host.invalid" in check.value and "getent hosts" in check.advice
    assert network.name_check([network.look(Ranks(Two(), Topology((0, 1), (here, here))))]) == []


def test_a_port_that_is_down():
    up, down = ({"mlx5_0 port 1": state} for state in ("4: ACTIVE", "1: DOWN"))
    check = network.port_check([Network("a", ports=up), Network("b", ports=down)])
    assert check.status == "warn" and "0 ports are up on b, and 1 on others" in check.value and "ibstat" in check.advice
    assert network.port_check([Network("a", ports=up), Network("b", ports=up)]) == []


def test_links_that_are_slow():
    fast = {("a", "b"): 10e9, ("b", "c"): 9e9, ("c", "a"): 9.5e9}
    assert network.judge_links(fast).status == "ok" and network.judge_links({}) == []
    check = network.judge_links(fast | {("b", "c"): 1e9})
    assert check.status == "warn" and "1.00 GB/s from b to c" in check.value and "--exclude" in check.advice
    check = network.judge_links(dict.fromkeys(fast, 0.11e9))
    assert check.status == "warn" and "ucx_info" in check.advice


def test_a_clock_is_the_one_of_the_fastest_answer(run_mpi, tmp_path):
    """Messages of rank 1 that take long now and then do not move its clock."""
    program = tmp_path / "slow.py"
    program.write_text(
        "import itertools, sys, time\nfrom hpcmp.cli import main\nclock, pause = time.time, itertools.cycle([0.3, 0])\n"
        "def slow():\n    time.sleep(next(pause))\n    return clock() - 3\n"
        "if __import__('os').environ['OMPI_COMM_WORLD_RANK'] == '1':\n    time.time = slow\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    checks = found(run_mpi(2, [sys.executable, str(program)], env=two_hosts(), cwd=tmp_path))
    bad(checks, "clocks", "is 3.0 s behind that of node 0", "timedatectl")
