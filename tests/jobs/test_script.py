"""Batch scripts, run by bash with a launcher and a scheduler that are not there: what follows from each exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hpcmp.errors import InputError
from hpcmp.jobs import Job, load_site, make_job, script
from tests.batch.fakes import Programs

CONFIG = "[model]\nlayers = 4\nheads = 8\n[layout]\ntp = 2\npp = 2\n"
SCHEDULERS = ("slurm", "pbs", "lsf", "flux", "none")

#: A launcher that ends with the codes in ``codes``, one after the other, and runs nothing on the nodes in ``dead``.
#: "wait": it ends with 75 once it has got USR1. "lose NODE": with 137, and the node is dead.
LAUNCHER = """
for a; do last=$a; case $a in --nodelist=*) node=${a#*=} ;; esac; done
if [ "$last" = true ]; then ! grep -qx "$node" dead; exit; fi
read -r code node <codes && sed -i 1d codes
case $code in
wait) trap 'exit 75' USR1; touch started; while :; do sleep 0.02; done ;;
lose) printf '%s\\n' $node >>dead; exit 137 ;;
*) exit $code ;;
esac
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a configuration whose layout needs a multiple of 4 ranks, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("gpt.toml").write_text(CONFIG)
    return "gpt.toml"


def job(config: str, scheduler: str = "slurm", *overrides: str, **more: Any) -> Job:
    settings = {"nodes": 1 if scheduler == "none" else 3, "ranks_per_node": 4, "time": "2:00:00"} | more
    return make_job(config, overrides, scheduler=scheduler, **settings)


class Cluster:
    """Programs of a Slurm, and a job's script that runs among them, on the nodes n1, n2 and n3."""

    def __init__(self, made: Job, *codes: str) -> None:
        self.folder = Path.cwd()
        self.programs = Programs(self.folder / "bin")
        for name in "srun", "mpirun":
            self.programs.add(name, LAUNCHER)
        self.programs.add("scontrol", '[ "$1" != show ] || printf "n1\\nn2\\nn3\\n"')
        self.programs.add("squeue", "cat state")
        for name in "sbatch", "hpcmp":
            self.programs.add(name, "")
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        (self.folder / "dead").touch()
        (self.folder / "state").write_text("RUNNING\n")
        (self.folder / "script").write_text(script(made))

    def start(self, **environ: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_ON_NODE": "8"}
        env = dict(os.environ) | {"PATH": self.programs.path} | slurm | environ
        return subprocess.Popen(["bash", "script"], env=env, stderr=subprocess.PIPE, text=True, cwd=self.folder)

    def run(self, **environ: str) -> int:
        """The exit code of the script."""
        process = self.start(**environ)
        self.said = process.communicate(timeout=30)[1]
        return process.returncode

    def calls(self, *words: str) -> list[list[str]]:
        """The calls that begin with ``words``."""
        return [call for call in self.programs.calls if call[: len(words)] == list(words)]

    @property
    def steps(self) -> list[list[str]]:
        """The calls that started ranks."""
        return [call for call in self.programs.calls if "train" in call]


REQUEUE = ["scontrol", "requeue", "12"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("array", [None, "train.seed=1,2"])
@pytest.mark.parametrize("requeue", [True, False])
def test_bash_reads_every_script(config: str, scheduler: str, array: str | None, requeue: bool) -> None:
    Path("site.toml").write_text(f"batch.requeue = {str(requeue).lower()}\nnode.cores = 8\nnode.gpus = 4")
    text = script(job(config, scheduler, array=array, site=load_site("site.toml")))
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("code", [0, 1, 2, 70, 78])
def test_a_run_that_has_ended_ends_the_job_with_its_code(config: str, code: int) -> None:
    cluster = Cluster(job(config), str(code))
    assert cluster.run() == code
    assert len(cluster.steps) == 1 and REQUEUE not in cluster.programs.calls and not cluster.calls("sbatch")


def test_75_requeues_the_job(config: str) -> None:
    cluster = Cluster(job(config), "75")
    assert cluster.run() == 75
    assert cluster.programs.calls[-1] == REQUEUE


def test_a_run_is_told_to_find_out_whether_there_is_progress_and_to_leave_the_requeueing_to_the_script(
    config: str,
) -> None:
    cluster = Cluster(job(config), "0")
    cluster.programs.add("srun", 'echo "$HPCMP_RESUBMIT" >resubmit; sh -c "$HPCMP_RESUBMIT"')
    assert cluster.run() == 0
    assert "train.requeue=true" in cluster.steps[0]
    assert Path("resubmit").read_text().startswith("true ")


def test_75_submits_the_script_anew_where_jobs_cannot_be_requeued(config: str) -> None:
    Path("site.toml").write_text("batch.requeue = false")
    cluster = Cluster(job(config, site=load_site("site.toml"), array="train.seed=1,2"), "75")
    assert cluster.run(SLURM_ARRAY_TASK_ID="2") == 75
    assert cluster.programs.calls[-1] == ["sbatch", "--array=2", "script"]
    assert REQUEUE not in cluster.programs.calls


def test_75_submits_the_script_anew_where_requeueing_fails(config: str) -> None:
    cluster = Cluster(job(config), "75")
    cluster.programs.add("scontrol", '[ "$1" = show ] && echo n1 && echo n2 || exit 1')
    assert cluster.run() == 75
    assert cluster.programs.calls[-2:] == [REQUEUE, ["sbatch", "script"]]


def test_a_job_that_has_been_cancelled_stays_so(config: str) -> None:
    cluster = Cluster(job(config), "75")
    Path("state").write_text("COMPLETING\n")
    assert cluster.run() == 75
    assert REQUEUE not in cluster.programs.calls and not cluster.calls("sbatch")


@pytest.mark.parametrize("made", [{"chained": True}, {"overrides": ("train.requeue=false",)}])
def test_75_is_the_end_of_a_job_of_a_chain_and_of_one_that_asks_for_no_requeue(config: str, made: Any) -> None:
    cluster = Cluster(job(config, "slurm", *made.pop("overrides", ()), **made), "75")
    assert cluster.run() == 75
    assert REQUEUE not in cluster.programs.calls and not cluster.calls("sbatch")


@pytest.mark.parametrize("number, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_signals_reach_the_ranks_and_only_the_limit_requeues(
    config: str, number: signal.Signals, requeued: bool
) -> None:
    cluster = Cluster(job(config), "wait")
    process = cluster.start()
    end = time.monotonic() + 20
    while not Path("started").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 75  # of the launcher, which got USR1
    assert (REQUEUE in cluster.programs.calls) == requeued


def test_the_nodes_that_are_left_go_on(config: str) -> None:
    cluster = Cluster(job(config), "lose n2", "0")
    assert cluster.run() == 0
    first, second = cluster.steps
    assert {"--nodes=3", "--ntasks=12", "--nodelist=n1,n2,n3"} <= set(first)
    assert {"--nodes=2", "--ntasks=8", "--nodelist=n1,n3"} <= set(second)
    assert ["scontrol", "update", "JobId=12", "NodeList=n1,n3"] in cluster.programs.calls
    assert "these answer: n1 n3" in cluster.said


def test_only_as_many_nodes_go_on_as_the_layout_fits(config: str) -> None:
    """4 nodes of 2 ranks in replicas of 4: with 3 left, 2 go on."""
    cluster = Cluster(job(config, nodes=4, ranks_per_node=2), "lose n2", "0")
    cluster.programs.add("scontrol", 'printf "n1\\nn2\\nn3\\nn4\\n"')
    assert cluster.run() == 0
    assert {"--nodes=2", "--nodelist=n1,n3"} <= set(cluster.steps[1])


def test_too_few_nodes_for_the_layout_requeue_the_job(config: str) -> None:
    cluster = Cluster(job(config, "slurm", "layout.dp=3"), "lose n2")
    assert cluster.run() == 75
    assert len(cluster.steps) == 1 and cluster.programs.calls[-1] == REQUEUE


def test_a_job_with_too_few_nodes_from_the_start_is_an_error(config: str) -> None:
    cluster = Cluster(job(config, "slurm", "layout.dp=4", nodes=4))
    assert cluster.run() == 2
    assert "3 nodes; the layout runs on 4" in cluster.said and cluster.steps == []


def test_a_crash_of_a_rank_is_tried_once_more(config: str) -> None:
    cluster = Cluster(job(config), "137", "139", "0")
    assert cluster.run() == 139
    assert len(cluster.steps) == 2 and REQUEUE not in cluster.programs.calls


def test_mpirun_that_ends_with_0_after_a_node_was_lost_is_not_believed(config: str) -> None:
    Path("site.toml").write_text('launch.launcher = "mpirun"')
    cluster = Cluster(job(config, site=load_site("site.toml")), "0", "0")
    probe = 'case "$*" in *"--host n3:1 "*) [ ! -e lost ] ;; *train*) touch lost ;; esac'
    cluster.programs.add("mpirun", probe)
    assert cluster.run() == 0
    assert [call[2] for call in cluster.steps] == ["n1:4,n2:4,n3:4", "n1:4,n2:4"]


def test_hostile_names_stay_words(tmp_path: Path, config: str) -> None:
    odd = 'a "b" $(touch pwned) `touch pwned`; \'c.toml'
    Path(odd).write_text(CONFIG)
    value = "run.directory=x'; touch pwned; #"
    made = job(odd, "slurm", value, name="two words; $(touch pwned)")
    cluster = Cluster(made, "0")
    assert cluster.run() == 0
    assert cluster.steps[0][-4:] == ["train", odd, "train.requeue=true", value]
    assert not (tmp_path / "pwned").exists()
    assert "#SBATCH --job-name=two_words_touch_pwned" in script(made)
    with pytest.raises(InputError, match="line break"):
        job(config, "slurm", "run.directory=x\n#SBATCH --uid=0")


def test_each_run_of_an_array_has_its_overrides_and_its_directory(config: str) -> None:
    Path("sweep").write_text("# two runs\ntrain.seed=1 'data.path=with space'\n\noptimizer.betas=[0.8,0.9]\n")
    made = job(config, array="sweep")
    cluster = Cluster(made)
    for number, words in ("1", ["train.seed=1", "data.path=with space"]), ("2", ["optimizer.betas=[0.8,0.9]"]):
        Path("codes").write_text("0\n")
        assert cluster.run(SLURM_ARRAY_TASK_ID=number) == 0
        assert cluster.steps[-1][-len(words) - 1 : -1] == words
        assert cluster.steps[-1][-1].startswith(f"run.directory=runs/gpt/{number}-")
    assert cluster.run(SLURM_ARRAY_TASK_ID="3") == 2
    by_value = job(config, array="optimizer.betas=[0.8,0.9],[0.9,0.95]").members
    assert [member.overrides[1] for member in by_value] == ["optimizer.betas=[0.8,0.9]", "optimizer.betas=[0.9,0.95]"]


def test_without_a_scheduler_the_time_is_the_runs_own(config: str) -> None:
    cluster = Cluster(job(config, "none"), "75")
    assert cluster.run() == 75
    assert {"train.minutes=120", "-n", "4"} <= set(cluster.steps[0]) and "train.requeue=true" not in cluster.steps[0]
    assert "start this script again" in cluster.said


def test_threads_are_the_cores_of_a_rank(config: str) -> None:
    cluster = Cluster(job(config), "0")
    cluster.programs.add("srun", 'echo "$OMP_NUM_THREADS" >threads')
    assert cluster.run() == 0
    assert Path("threads").read_text() == "2\n"  # 8 cores for 4 ranks
    Path("site.toml").write_text("node.cores = 64\n[environment]\nNCCL_SOCKET_IFNAME = 'a b'")
    text = script(job(config, site=load_site("site.toml")))
    assert "export OMP_NUM_THREADS=16" in text and "--cpus-per-task=16" in text and "--cpu-bind=cores" in text
    assert "export NCCL_SOCKET_IFNAME='a b'" in text


@pytest.mark.parametrize(
    "scheduler, lines",
    [
        ("slurm", ["#SBATCH --nodes=3", "#SBATCH --time=02:00:00", "#SBATCH --signal=B:USR1@120", "#SBATCH --requeue"]),
        ("pbs", ["#PBS -l select=3:ncpus=8:mpiprocs=4:ngpus=2", "#PBS -l walltime=02:00:00", "#PBS -r y"]),
        ("lsf", ["#BSUB -n 12", '#BSUB -R "span[ptile=4]"', "#BSUB -W 120", '#BSUB -r -Q "75"', '#BSUB -gpu "num=2"']),
        ("flux", ["# flux: --nodes=3 --exclusive", "# flux: --time-limit=7200s"]),
    ],
)
def test_directives(config: str, scheduler: str, lines: list[str]) -> None:
    Path("site.toml").write_text("node.cores = 8\nnode.gpus = 2")
    text = script(job(config, scheduler, site=load_site("site.toml"))).splitlines()
    assert set(lines) <= set(text)
    directives = [line.startswith(lines[0].split(" -")[0]) for line in text]
    assert directives.index(False, 1) == 1 + sum(directives), "all directives come before the first command"
