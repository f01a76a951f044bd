"""``hpcmp doctor CONFIG.toml``: what a run needs, and each thing of it that is not there."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from hpcmp.checkpoint import Lock
from hpcmp.cli.checks import storage
from hpcmp.cli.checks.base import Check, Ranks, Trouble
from hpcmp.cli.checks.files import Files, Seen
from hpcmp.cli.checks.launch import job_check
from hpcmp.cli.checks.needs import Have, Needs, _blas, held
from hpcmp.cli.checks.storage import Place
from hpcmp.comm.topology import Topology
from hpcmp.training.config import load_config
from tests.batch.fakes import Programs, enter
from tests.cli.doctors import DOCTOR, ROOT, bad, doctor, found, good, lines, needs_mounts, two_hosts
from tests.conftest import gpu_present
from tests.corpus import config, corpus

HUGE = ["model.layers=96", "model.hidden=12288", "model.heads=96", "model.vocabulary=50000"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def toml(tmp_path, data):
    return config(tmp_path, data)


def test_a_run_that_has_all_it_needs(toml):
    done = doctor(str(toml), "--json")
    assert done.returncode == 0 and "directory" not in lines(done)
    fine = {check["name"] for check in found(done) if check["status"] == "ok"}  # a busy disk is a line of its own
    assert fine >= {"layout", "data.path", "train.device", "memory of the run", "checkpoint.directory"}
    assert not (toml.parent / "run").exists() and sorted(p.name for p in toml.parent.iterdir()) == ["tiny.toml"]


@pytest.mark.parametrize(
    ("overrides", "name", "value", "advice", "status"),
    [
        (["layout.tp=4", "layout.pp=2"], "layout", "it is for 8 ranks", "mpirun -n 8 hpcmp doctor", "warn"),
        (["data.path=/nowhere/tokens.h5"], "data.path", "/nowhere/tokens.h5", "hpcmp data prepare", "problem"),
        (["model.vocabulary=7"], "data.path", "is less than the", "or leave it out", "problem"),
        (HUGE, "memory of the run", "weights, gradients and moments", "layout.zero=3", "problem"),
        (HUGE, "checkpoint.directory", " GB needed", "quota -s", "problem"),
        (
            ["checkpoint.local=$NOWHERE/fast", "checkpoint.local_every=1"],
            "checkpoint.local",
            "$NOWHERE",
            "/dev/shm",
            "problem",
        ),
        (["checkpoint.initial=/nowhere"], "checkpoint.initial", "/nowhere", "hpcmp checkpoint list", "problem"),
        (["train.requeue=true"], "train.requeue", "nothing would run it again", "HPCMP_RESUBMIT", "warn"),
    ],
)
def test_what_a_run_lacks(toml, overrides, name, value, advice, status):
    ranks = Ranks(None, Topology((0,), ("a",)))
    wanted, plain = load_config(toml, overrides), load_config(toml)
    lines = report(wanted, ranks, toml)
    assert bad(lines, name, value, advice) == status
    assert good(report(plain, ranks, toml), name, value)


def report(wanted, ranks, toml):
    """The lines of what a run needs, in this process."""
    from hpcmp.cli.checks import examine

    needs, files = Needs(wanted, ranks, str(toml)), Files(wanted, ranks)
    checks = [*examine(ranks, needs.subject), *examine(ranks, files.subject), *files.directory_checks()]
    return [vars(check) for check in checks]


def test_a_missing_gpu_is_a_problem(run_mpi, toml):
    if gpu_present():
        pytest.skip("there is a GPU")
    done = run_mpi(2, [*DOCTOR, str(toml), "train.device=cuda", "--json"], env={"PYTHONPATH": str(ROOT)})
    assert bad(found(done), "train.device", 'train.device = "cuda"', "") == "problem" and done.returncode == 1


@pytest.mark.parametrize(
    ("why", "value", "advice"),
    [
        ('train.device = "cuda" needs CuPy: pip install "hpcmp[cuda12]" (or cuda13)', "needs CuPy (b)", "`pip install"),
        ('train.device = "cuda": CuPy finds no GPU (is the driver there?)', "finds no GPU", "nodes with GPUs"),
    ],
)
def test_a_host_without_a_gpu(toml, why, value, advice):
    needs = Needs(load_config(toml, ["train.device=cuda"]), Ranks(None, Topology((0,), ("a",))), "x")
    check = needs.device_check([Have("a"), Have("b", device_wrong=why)])
    assert check.status == "problem" and value in check.value and advice in check.advice
    assert needs.device_check([Have("a")]).status == "ok"


def test_libraries_that_keys_ask_for(toml, monkeypatch):
    ranks = Ranks(None, Topology((0,), ("a",)))
    needs = Needs(load_config(toml, ["train.device=cuda", "communication.backend=nccl", "run.plot=true"]), ranks, "x")
    assert not [line for line in needs.keys_check([Have("a", nccl=22800)]) if line.name == "communication.backend"]
    monkeypatch.setattr("hpcmp.cli.checks.needs.find_spec", lambda name: None)
    lines = [vars(line) for line in needs.keys_check([Have("a", nccl=22800), Have("b")])]
    assert bad(lines, "communication.backend", "there is no NCCL", "nvidia-nccl-cu12") == "problem"
    assert bad(lines, "run.plot", "no matplotlib", "run.plot=false") == "problem"
    monkeypatch.setattr("hpcmp.kernels.blas.find", lambda name: None)
    why = _blas("mkl")
    monkeypatch.undo()
    (line,) = [needs.blas_check([Have("a", blas_wrong=why)])]
    assert isinstance(line, Check) and line.status == "problem" and "train.blas=auto" in line.advice
    assert 'train.blas = "mkl"' in line.value and needs.blas_check([Have("a")]) == [] and _blas("auto") == ""


def test_two_defects_at_once_are_a_problem_each_and_the_exit_code_is_1(toml):
    done = doctor(str(toml), "data.path=/nowhere/tokens.h5", "--json", *HUGE)
    assert done.returncode == 1
    assert [c["name"] for c in found(done) if c["status"] == "problem"] == [
        *("memory of the run", "data.path", "checkpoint.directory")
    ]


def test_a_key_that_nobody_knows_is_bad_input(toml):
    done = doctor(str(toml), "train.stepz=3", "--json")
    assert done.returncode == 2 and "stepz" in done.stdout


def test_ranks_that_do_not_fit_and_a_serial_h5py(run_mpi, toml):
    import h5py

    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [*DOCTOR, str(toml), "layout.tp=4", "checkpoint.storage=mpio", "--json"]
    done = run_mpi(2, argv, env=env)
    assert done.returncode == 1
    assert bad(found(done), "layout", "does not divide the 2 ranks", "would fit") == "problem"
    if not h5py.get_config().mpi:
        advice = "checkpoint.storage=shared"
        assert bad(found(done), "checkpoint.storage", "h5py was built without MPI", advice) == "problem"
    recovers = found(run_mpi(2, [*DOCTOR, str(toml), "layout.tp=2", "train.recover=true", "--json"], env=env))
    assert bad(recovers, "train.recover", "MPI ends the job", "--with-ft ulfm") == "problem"
    assert good(recovers, "layout", "") and good(recovers, "checkpoint.storage", "")


def test_data_that_another_host_does_not_have(run_mpi, toml, data):
    """On rank 1, another host by HPCMP_NODES, other data lie where rank 0's do; tp is on both."""
    needs_mounts()
    other = toml.parent / "other.h5"
    folder = toml.parent / "again"
    folder.mkdir()
    shutil.copy(data, other)
    from hpcmp.data.prepare import prepare

    (folder / "a.py").write_text("x = 1\n" * 2000)
    prepare([folder], toml.parent / "changed.h5", held_out=0.2)
    script = f'[ "$OMPI_COMM_WORLD_RANK" = 1 ] && mount --bind {toml.parent}/changed.h5 {other}; exec "$@"'
    argv = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        "sh",
        *DOCTOR,
        str(toml),
        f"data.path={other}",
        "layout.tp=2",
        "--json",
    ]
    done = run_mpi(2, argv, env=two_hosts())
    assert bad(found(done), "data.path", "is another file on node 1", "that all hosts share") == "problem"
    bad(found(done), "layout", "tp x tp_y = 2 ranks lie on nodes of 1", "layout.tp=1")


def with_mount(toml, command):
    """The checks where ``command`` has mounted the run's directory, ``{0}`` in it."""
    needs_mounts()
    folder = toml.parent / "run"
    folder.mkdir()
    script = f'{command.format(folder)} && exec "$@"'
    return found(doctor(str(toml), "--json", shell=f"exec unshare -m sh -c '{script}' sh \"$@\""))


def test_a_read_only_run_directory_is_a_problem(toml):
    checks = with_mount(toml, "mount --bind {0} {0} && mount -o remount,bind,ro {0}")
    assert bad(checks, "checkpoint.directory", "is not writable on ", "remount,rw") == "problem"


def test_a_file_system_without_inodes_is_a_problem(toml):
    checks = with_mount(toml, "mount -t tmpfs -o nr_inodes=100 t {0}")
    assert bad(checks, "checkpoint.directory", "and room for 9", "du --inodes") == "problem"


def test_a_directory_that_another_run_has_and_a_checkpoint_that_is_damaged(toml):
    ranks = Ranks(None, Topology((0,), ("a",)))
    folder = toml.parent / "run" / "checkpoints"
    (folder / "step_00000002").mkdir(parents=True)
    checks = report(load_config(toml), ranks, toml)
    assert bad(checks, "checkpoints", "step_00000002", "hpcmp checkpoint verify") == "warn"
    (toml.parent / "run" / "lock").write_text("someone\n")
    checks = report(load_config(toml), ranks, toml)
    assert (
        bad(checks, "run.directory", "is in use by a run that does not say who it is", "wait for its end") == "problem"
    )
    old = time.time() - 7200
    os.utime(toml.parent / "run" / "lock", (old, old))
    assert good(report(load_config(toml), ranks, toml), "run.directory", "is in use")
    with Lock(toml.parent / "run"):
        assert good(report(load_config(toml), ranks, toml), "run.directory", "is in use")  # it is our own


def test_a_run_that_hung_before(toml):
    ranks = Ranks(None, Topology((0,), ("a",)))
    folder = toml.parent / "run" / "diagnosis"
    folder.mkdir(parents=True)
    assert good(report(load_config(toml), ranks, toml), "last start", "")
    (folder / "rank_00000.json").write_text("{")
    assert bad(report(load_config(toml), ranks, toml), "last start", "it hung: ", "hpcmp report") == "warn"


def test_a_time_limit_that_is_too_short(monkeypatch, tmp_path):
    programs = Programs(tmp_path / "bin")
    enter(monkeypatch, {"SLURM_JOB_ID": "4711", "PATH": programs.path})
    programs.add("squeue", "echo 0:30")
    check = job_check(Ranks(None, Topology((0,), ("a",))), 60.0)
    assert check.status == "problem" and "0:30 left; train.margin = 60 s" in check.value and "--time" in check.advice
    programs.add("squeue", "echo 2:00")
    assert job_check(Ranks(None, Topology((0,), ("a",))), 60.0).status == "ok"


RUN = Path("/scratch/run")


@pytest.mark.parametrize(
    ("place", "value", "advice"),
    [
        (Place(), "", ""),
        (Place(free=2**29), "GB needed", "quota -s"),
        (Place(sync=9.0), "a megabyte took 9.0 s", "checkpoint.asynchronous"),
        (Place(ahead=-75.0), "-75.0 s from that of a", "time synchronisation"),
        (Place(locks="Function not implemented"), "cannot be locked on a", "mount option flock"),
        (Trouble("no answer in 5 s"), "no answer in 5 s", "file server"),
        (Place(why="Read-only file system"), "Read-only file system", "remount,rw"),
    ],
)
def test_a_directory_as_a_host_finds_it(place, value, advice):
    checks = storage.judge("run.directory", RUN, [("a", place)], set(), firm=True)
    assert any(value in check.value and advice in check.advice for check in checks)
    assert all(check.status == "ok" for check in checks) is (value == "")


def test_a_directory_that_another_host_does_not_share():
    (check,) = storage.judge("run.directory", RUN, [("a", Place()), ("b", Place())], {"b"}, firm=True)
    assert check.status == "problem" and check.value.endswith("is another one on b") and "not in /tmp" in check.advice


def test_room_on_the_nodes(toml):
    """checkpoint.local holds four times what a node's ranks own: 12 bytes a parameter over two nodes."""
    ranks = Ranks(None, Topology((0, 1), ("a", "b")))
    files = Files(load_config(toml, ["checkpoint.local=/dev/shm", "checkpoint.local_every=1"]), ranks)
    size = files.size(300)
    have = [Seen("a", vocabulary=300, local=2 * size), Seen("b", vocabulary=300, local=2 * size - 1)]
    check = files.local_check(have)
    assert isinstance(check, Check) and check.status == "problem" and "free on b" in check.value and check.advice
    enough = files.local_check([have[0], have[0]])
    assert isinstance(enough, Check) and enough.status == "ok"
    (wrong,) = [files.local_check([Seen("a", local_wrong="/ssd is not writable: Permission denied")])]
    assert isinstance(wrong, Check) and wrong.status == "problem" and "own disks" in wrong.advice


def test_memory_is_what_the_table_of_zero_says(toml):
    """16, 10, 7 and 4 bytes a parameter of float32 on four ranks; 18, 9, 6 and 4 of bfloat16 (docs/zero.md)."""
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        for zero in range(4):
            wanted = load_config(toml, [f"train.dtype={dtype}", f"layout.zero={zero}"]).resolved(
                ranks=4, vocabulary=300
            )
            bytes_of[dtype, zero] = held(wanted, 300)
    one = bytes_of["float32", 3] / 4
    assert [round(n / one, 6) for n in bytes_of.values()] == [16, 10, 7, 4, 18, 9, 6, 4]
    needs = Needs(load_config(toml), Ranks(None, Topology((0,), ("a",))), "x")
    tight = needs.memory_check([Have("a", vocabulary=300, free=int(17 * one))])
    assert isinstance(tight, Check) and tight.status == "warn" and "activations come besides" in tight.value
    full = needs.memory_check([Have("a", vocabulary=300, free=int(31 * one))] * 2)
    assert isinstance(full, Check) and full.status == "problem" and "those of 2 ranks" in full.value
