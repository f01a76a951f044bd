"""The benchmarks import and parse; the peer has hpcmp's mathematics; figures are what they say."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import breakdown, checkpoint, common, devices, gpu_step, local_tier, overhead, report, saving, step
from benchmarks.peers import hpcmp_gpu_step, hpcmp_step
from hpcmp.comm.mesh import Mesh

XS = common.SIZES["XS"]


def test_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (step.main, gpu_step.main, overhead.main, checkpoint.main):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert "--torch PYTHON" in " ".join(capsys.readouterr().out.split())


def test_flops_are_those_of_the_matrix_products() -> None:
    calls = []
    timers = breakdown.Timers()
    steps = hpcmp_step.Steps(XS, "serial", None)
    kernels = breakdown.kernels.of(np.empty(0, np.float32))
    with pytest.MonkeyPatch.context() as patch, breakdown.timing(steps.engine, timers, []):
        timed = kernels.matmul

        def counted(x: Any, w: Any, *bias: Any) -> Any:
            if w.flags.c_contiguous:  # a transpose is a backward's
                calls.append(2 * x.size * w.shape[1])
            return timed(x, w, *bias)

        patch.setattr(kernels, "matmul", counted)
        steps(0)
    weights = 12 * XS.layers * XS.hidden**2 + XS.vocabulary * XS.hidden
    attention = 6.0 * XS.tokens * XS.layers * XS.sequence * XS.hidden
    assert XS.flops == 6.0 * XS.tokens * weights + attention
    blocks = 2 * XS.tokens * 12 * XS.layers * XS.hidden**2  # the forward; the head's backward is one more
    assert sum(calls) == blocks + 2 * XS.tokens * XS.vocabulary * XS.hidden
    assert timers.calls["gemm"] == len(calls) + (5 * XS.layers + 1) * 2  # dX and dW of each weight


def test_a_timer_counts_its_own_time_alone() -> None:
    timers = breakdown.Timers()
    inner = timers.wrap("inner", lambda: sum(range(200_000)))
    outer = timers.wrap("outer", lambda: [inner(), inner()])
    outer()
    assert timers.calls == {"inner": 2, "outer": 1}
    assert timers.seconds["outer"] < timers.seconds["inner"]


def test_a_job_takes_turns_and_says_why_it_fails(tmp_path: Path) -> None:
    serving = "import os; from benchmarks import common; common.serve(os.environ['BENCH_ADDRESS'], 0, "
    serving += "common.at_once(float), 7, {})"
    job = common.Job("toy", [[sys.executable, "-c", serving]], 1, {"PYTHONPATH": str(common.ROOT)})
    assert job.turn(2, warm=1)["losses"] == [0.0, 1.0, 2.0]
    turn = job.turn(1)
    assert turn["losses"] == [3.0, 4.0] and 0 <= turn["seconds"] < 1
    most, base = job.ask("memory")[0]
    assert most > 1e6 and base == 7
    job.stop()
    with pytest.raises(SystemExit, match="toy: it did not start\nalas"):
        common.Job("toy", [[sys.executable, "-c", "raise SystemExit('alas')"]], 1, {})


def test_steps_are_begun_ahead_and_timed_from_result_to_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that beginning moves by 1, and waiting by 10."""
    clock, did = [0.0], list[tuple[str, int]]()
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def work(kind: str, i: int, seconds: float) -> float:
        did.append((kind, i))
        clock[0] += seconds
        return float(i)

    def begin(i: int) -> Any:
        work("begin", i, 1)
        return lambda: work("wait", i, 10)

    found = common._steps(begin, 7, 1, 3, 1)
    order = [("begin", 7), *((kind, i + back) for i in (7, 8, 9) for kind, back in (("begin", 1), ("wait", 0)))]
    assert did == [*order, ("wait", 10)]
    assert found["losses"] == [7, 8, 9, 10] and found["seconds"] == [11, 11, 10] and found["begun"] == [1] * 4
    found = common._steps(begin, 0, 0, 2, 0)
    assert found["losses"] == [0, 1] and found["seconds"] == [11, 11]


def test_losses_that_differ_are_refused() -> None:
    assert step.check_losses({"hpcmp": [2.0, 1.0], "peer": [2.0, 1.000001]}) == pytest.approx(1e-6)
    for wrong in (1.0001, float("nan")):
        with pytest.raises(SystemExit, match="do not compute the same"):
            step.check_losses({"hpcmp": [2.0, 1.0], "peer": [2.0, wrong]})


@pytest.mark.timeout(120)
def test_hpcmp_alone(tmp_path: Path) -> None:
    step.main(["--size", "XS", "--variants", "", "--rounds", "2", "--steps", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["programs"]["hpcmp"]["ratio"]["median"] == 1
    parts = result["breakdown"]
    assert sum(parts[kind] for kind in breakdown.ROWS) == pytest.approx(parts["step"])
    assert min(parts[kind] for kind in breakdown.ROWS) >= 0 and parts["communication"] == 0
    assert path.with_suffix(".txt").read_text() == report.text(result)
    assert "XS serial, 1" in report.table([result])


def test_peer_has_the_same_loss_and_weights() -> None:
    pytest.importorskip("torch")
    from benchmarks.peers import torch_step

    steps = hpcmp_step.Steps(XS, "serial", None)
    weights = {p.name: p.data.copy() for p in steps.engine.buckets.parameters}
    peer = torch_step.stepper(XS, "serial", weights, False, 1)
    mine, theirs = [[run(i) for i in range(3)] for run in (steps, peer)]
    np.testing.assert_allclose(mine, theirs, rtol=step.TOLERANCE)


def test_a_rank_of_the_peer_has_its_share_of_every_weight() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.peers import torch_step

    steps = hpcmp_step.Steps(XS, "serial", None)
    weights = {p.name: p.data.copy() for p in steps.engine.buckets.parameters}
    whole = torch_step.GPT(XS)
    torch_step.load(whole, weights)
    shares = [torch_step.GPT(XS, parts=2) for _ in range(2)]
    for rank, share in enumerate(shares):
        torch_step.load(share, weights, rank)
    q, k, v = whole.blocks["1"].qkv.weight.chunk(3)
    parts = [share.blocks["1"].qkv.weight.chunk(3) for share in shares]
    for i, all_rows in enumerate((q, k, v)):
        assert torch.equal(torch.cat([p[i] for p in parts]), all_rows)
    assert torch.equal(torch.cat([s.blocks["0"].down.weight for s in shares], 1), whole.blocks["0"].down.weight)
    assert torch.equal(torch.cat([s.table.weight for s in shares]), whole.table.weight)


def test_a_run_that_saves_is_measured(tmp_path: Path) -> None:
    found = saving.measure(XS, "serial", None, tmp_path, rounds=1)
    assert 0 < found["held up"] < found["asynchronous"] and found["step alone"] > 0 and found["steps under it"] >= 1
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_the_local_tier_is_measured(tmp_path: Path) -> None:
    size, found = local_tier.measure(Mesh(), tmp_path / "disk", tmp_path / "memory", 0.25, rounds=1)
    assert size == 2**18 and all(seconds > 0 for seconds in found.values())
    kinds = ("ordinary", "local, disk", "local, memory")
    assert set(found) == {f"{what}, {kind}" for what in ("save", "restart") for kind in kinds}
    assert list((tmp_path / "memory").glob("node*/*")) == []


def test_checkpoints_are_measured(tmp_path: Path) -> None:
    small = ["--hidden", "32", "--blocks", "1", "--rounds", "1", "--ranks", "2"]
    checkpoint.main([*small, "--place", str(tmp_path), "--results", str(tmp_path / "results")])
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert result["bytes"] == 3 * 4 * (12 * 32 * 32 + 32)
    assert {"save files", "save node", "save shared", "save raw", "save gather", "load raw"} <= set(result["programs"])
    assert result["programs"]["save raw"]["of_raw"]["median"] == 1
    assert path.with_suffix(".txt").read_text() == checkpoint.text(result)
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]


def test_an_interpreter_without_torch_is_refused() -> None:
    for python in ("/bin/false", "/no/such/python"):
        with pytest.raises(SystemExit, match=f"--torch {python}: "):
            step.find_torch(python)


CUPTI = """
typedef void (*callback)(void *, int, unsigned, const void *);
static callback called;
int cuptiSubscribe(void **handle, callback f, void *data) { called = f; *handle = &called; return 0; }
int cuptiEnableDomain(unsigned on, void *handle, int domain) { return 0; }
int cuptiUnsubscribe(void *handle) { called = 0; return 0; }
static void at(int domain, int site, const char *name) {
    struct { int site; const char *name; const void *rest; } data = {site, name, 0};
    if (called) called(0, domain, 7, &data);
}
void by_runtime(void) { at(2, 0, "cudaLaunchKernel_v7000"); at(1, 0, "cuLaunchKernel"); at(1, 1, "cuLaunchKernel");
                        at(2, 1, "cudaLaunchKernel_v7000"); }
void by_driver(void) { at(1, 0, "cuLaunchKernelEx"); at(1, 1, "cuLaunchKernelEx"); }
void graph(void) { at(2, 0, "cudaGraphLaunch_v10000"); at(2, 1, "cudaGraphLaunch_v10000"); }
void others(void) { at(2, 0, "cudaLaunchHostFunc_v10000"); at(2, 1, "cudaLaunchHostFunc_v10000"); at(1, 0, "cuInit"); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_launches_are_counted_once_each(tmp_path: Path) -> None:
    """On a stand-in for CUPTI. What the runtime launches, the driver does too."""
    (tmp_path / "cupti.c").write_text(CUPTI)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "cupti.so"), str(tmp_path / "cupti.c")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "cupti.so"))

    def run() -> None:
        for call in (library.by_runtime, library.by_driver, library.graph, library.others, library.by_runtime):
            call()
        thread = threading.Thread(target=library.by_driver)
        thread.start()
        thread.join()

    assert devices.launches(run, library) == 5
    run()
    assert devices.launches(library.by_driver, library) == 1
    library.cuptiSubscribe = lambda *args: 15  # refused
    assert devices.launches(run, library) is None


def test_peaks_are_of_the_very_device() -> None:
    names = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
    assert [devices.peak(name, "bfloat16") for name in names] == [756.5e12, 835.5e12, 989.4e12, 989.4e12, 312e12]
    assert devices.peak("NVIDIA H100 PCIe", "float32") is None is devices.peak("cpu", "bfloat16")


def test_gpu_step_on_the_cpu(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--models", "tiny", "--sequences", "16,32", "--tokens", "64", "--dtype", "float32"]
    gpu_step.main([*small, "--variants", "", "--rounds", "2", "--steps", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*-gpu-step.json")
    result = json.loads(path.read_text())
    assert [(cell["size"]["sequence"], cell["size"]["batch"]) for cell in result["cells"]] == [(16, 4), (32, 2)]
    for cell in result["cells"]:
        found, size = cell["programs"]["hpcmp"], common.Size(**cell["size"])
        assert found["ratio"] == 1 and len(found["turns"]) == 2 and cell["loss_difference"] == 0
        assert 0 < found["host"]["median"] <= found["seconds"]["max"]
        assert found["mfu"] == pytest.approx(size.flops / found["seconds"]["median"] / cell["peak"])
        assert found["tokens_per_second"] == pytest.approx(64 / found["seconds"]["median"])
    text = path.with_suffix(".txt").read_text()
    assert text == gpu_step.text(result) and text.count("| hpcmp |") == 2 and "Model FLOPs of a step: 6 x" in text
    with pytest.raises(SystemExit, match="--models huge: there are tiny, 125M"):
        gpu_step.main(["--models", "huge"])
    with pytest.raises(
        SystemExit, match="--variants eagre: there are eager, compiled, graphs; before them autocast-, cudnn-"
    ):
        gpu_step.main(["--variants", "eager,eagre"])


def test_models_have_the_parameters_of_their_names() -> None:
    for model, number in {"125M": 125e6, "1.3B": 1.3e9, "2.7B": 2.7e9}.items():
        assert gpu_step.parameters(gpu_step.size_of(model, 1024, 8192)) == pytest.approx(number, rel=0.03)


def test_a_program_that_fails_has_its_error_in_the_table_and_the_others_go_on() -> None:
    orders = '{"usage": lambda: {}, "facts": lambda: {"device": "d"}, "peak": lambda: 1, "launches": lambda: None}'
    serving = "import os; from benchmarks import common; common.serve(os.environ['BENCH_ADDRESS'], 0, "
    serving += f"common.at_once(float), 7, {orders})"
    commands = [
        ("good", [sys.executable, "-c", serving]),
        ("bad", [sys.executable, "-c", "raise SystemExit('out of memory')"]),
    ]
    found = gpu_step.sessions(commands, False, 3, 1)
    assert found["bad"] == {"failed": "bad: it did not start: out of memory"}
    assert len(found["good"]["turns"]) == 4 and found["good"]["losses"] == [0.0, 1.0, 2.0]  # there and back
    cell = {"model": "m", "size": {"sequence": 8, "batch": 1}, "programs": found}
    row = "| m | 8 | 1 | bad | bad: it did not start: out of memory" + 7 * " | –" + " |"
    assert gpu_step.row(cell, "bad") == row and row.count("|") == gpu_step.HEAD.splitlines()[-2].count("|")


def test_peer_on_a_device_has_the_same_loss() -> None:
    pytest.importorskip("torch")
    from benchmarks.peers import torch_gpu_step

    for dtype, autocast in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        steps = hpcmp_gpu_step.Steps(XS, "cpu", dtype)
        peer = torch_gpu_step.Steps(XS, "cpu", dtype, steps.weights(), autocast=autocast)
        mine, theirs = [common._steps(program.begin, 0, 0, 8, 1)["losses"] for program in (steps, peer)]
        np.testing.assert_allclose(mine, theirs, rtol=gpu_step.TOLERANCE[dtype])
        narrow = dtype == "bfloat16" and not autocast
        assert {str(p.dtype) for p in peer.model.parameters()} == {"torch.bfloat16" if narrow else "torch.float32"}
        assert {str(p.dtype) for group in peer.optimizer.param_groups for p in group["params"]} == {"torch.float32"}
        master, weight = peer.masters[0], peer.parameters[0]
        assert (master is weight) != narrow and (master.to(weight.dtype) == weight).all()
