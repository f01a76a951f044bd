"""Batch scripts, run by bash with a launcher and a scheduler that are not there: what follows from each exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcmp.jobs import load_site
from tests.jobs.cluster import LAUNCHER, REQUEUE, Cluster, job


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
    cluster.until("started", process)
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


def test_without_a_scheduler_the_time_is_the_runs_own(config: str) -> None:
    cluster = Cluster(job(config, "none"), "75")
    assert cluster.run() == 75
    assert {"train.minutes=120", "-n", "4"} <= set(cluster.steps[0]) and "train.requeue=true" not in cluster.steps[0]
    assert "start this script again" in cluster.said


@pytest.mark.parametrize("environ, requeue", [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "12"}, "12_2")])
def test_a_run_of_an_array_requeues_itself_and_not_the_array(
    config: str, environ: dict[str, str], requeue: str
) -> None:
    """One of the runs has the array's own id."""
    cluster = Cluster(job(config, array="train.seed=1,2" if environ else None), "75")
    assert cluster.run(SLURM_ARRAY_TASK_ID="2", **environ) == 75
    assert cluster.programs.calls[-2:] == [
        ["squeue", "-h", "-j", requeue, "-o", "%T"],
        ["scontrol", "requeue", requeue],
    ]


def test_a_site_may_set_options_of_the_shell(config: str) -> None:
    Path("site.toml").write_text('shell.setup = "set -euo pipefail"')
    cluster = Cluster(job(config, site=load_site("site.toml")), "75")
    assert cluster.run() == 75
    assert cluster.programs.calls[-1] == REQUEUE


def test_a_squeue_without_an_answer_keeps_no_job_from_being_requeued(config: str) -> None:
    cluster = Cluster(job(config), "75")
    cluster.programs.add("squeue", "exit 1")
    assert cluster.run() == 75
    assert cluster.programs.calls[-1] == REQUEUE


def test_where_no_node_answers_none_is_taken_for_lost(config: str) -> None:
    """The script runs on one of them, so it is the question that fails; requeueing would never end."""
    cluster = Cluster(job(config), "137", "139", "0")
    (cluster.folder / "dead").write_text("n1\nn2\nn3\n")
    assert cluster.run() == 139
    assert len(cluster.steps) == 2 and REQUEUE not in cluster.programs.calls


def test_a_run_without_progress_ends_the_job_whatever_nodes_are_lost(config: str) -> None:
    cluster = Cluster(job(config), "78", "0")
    (cluster.folder / "dead").write_text("n2\n")
    assert cluster.run() == 78
    assert len(cluster.steps) == 1 and REQUEUE not in cluster.programs.calls


def test_a_limit_that_comes_after_a_crash_requeues_the_job(config: str) -> None:
    cluster = Cluster(job(config), "137", "0")
    cluster.programs.add("srun", 'for a; do last=$a; done; [ "$last" != true ] || { touch asked; sleep 1; }' + LAUNCHER)
    process = cluster.start()
    cluster.until("asked", process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert len(cluster.steps) == 1 and cluster.programs.calls[-1] == REQUEUE


#: As mpirun does: it hands on USR1, and ends its ranks at INT, also where it was started with INT ignored.
MPIRUN = """\
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open("started", "w").close()
signal.pause()
"""


def test_ctrl_c_has_the_ranks_save(config: str) -> None:
    cluster = Cluster(job(config, "none"))
    cluster.programs.add("mpirun", f"exec {sys.executable} -SEc '{MPIRUN}'")
    process = cluster.start()
    cluster.until("started", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=20)
    assert process.returncode == 75
