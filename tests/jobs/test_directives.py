"""What stands in a script: directives, binding, environment and overrides of each scheduler, launcher and site."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcmp.errors import InputError
from hpcmp.jobs import load_site, script
from tests.jobs.cluster import CONFIG, Cluster, job

SCHEDULERS = ("slurm", "pbs", "lsf", "flux", "none")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("array", [None, "train.seed=1,2"])
@pytest.mark.parametrize("requeue", [True, False])
def test_bash_reads_every_script(config: str, scheduler: str, array: str | None, requeue: bool) -> None:
    Path("site.toml").write_text(f"batch.requeue = {str(requeue).lower()}\nnode.cores = 8\nnode.gpus = 4")
    text = script(job(config, scheduler, array=array, site=load_site("site.toml")))
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, text.splitlines())) < 200


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


@pytest.mark.parametrize("made", [{}, {"chained": True}])
def test_pbs_reads_scripts_by_bash_and_takes_arrays_only_if_they_can_run_again(
    config: str, made: dict[str, bool]
) -> None:
    Path("site.toml").write_text('batch.chunk = "mem=200gb:model=x"\nbatch.requeue = false')
    text = script(job(config, "pbs", site=load_site("site.toml"), array="train.seed=1,2", **made)).splitlines()
    wanted = {"#PBS -S /bin/bash", "#PBS -J 1-2", "#PBS -r y"}
    assert wanted | {"#PBS -l select=3:ncpus=4:mpiprocs=4:mem=200gb:model=x"} <= set(text)
    text = script(job(config, "pbs", site=load_site("site.toml"), **made)).splitlines()
    assert {"#PBS -r n", "#PBS -l place=scatter"} <= set(text)
    Path("site.toml").write_text('batch.options = "-l place=scatter:excl"')
    text = script(job(config, "pbs", site=load_site("site.toml"))).splitlines()
    assert [line for line in text if "place=" in line] == ["#PBS -l place=scatter:excl"]


@pytest.mark.parametrize(
    "launcher, bound, free",
    [
        ("srun", "--cpu-bind=cores", "--nodelist"),
        ("mpirun", "--map-by ppr:4:node:PE=16 --bind-to core", "--bind-to none"),
        ("mpiexec", "-bind-to core:16", "-bind-to none"),
        ("pals", "--depth 16 --cpu-bind depth", "--cpu-bind none"),
        ("flux", "-o cpu-affinity=per-task", "flux run"),
    ],
)
def test_each_launcher_binds_ranks_in_its_own_words(config: str, launcher: str, bound: str, free: str) -> None:
    scheduler = {"srun": "slurm", "flux": "flux"}.get(launcher, "pbs")
    for bind, there, absent in ("cores", bound, free if "none" in free else ""), ("none", free, bound):
        Path("site.toml").write_text(f'launch.launcher = "{launcher}"\nlaunch.bind = "{bind}"\nnode.cores = 64')
        text = script(job(config, scheduler, site=load_site("site.toml")))
        assert there in text and (not absent or absent not in text)
        assert ("mpiexec -n" in text) == (launcher in ("mpiexec", "pals"))


def test_all_ranks_of_a_node_see_all_its_gpus(config: str) -> None:
    """GPUs that are hidden from their neighbours may not copy to them."""
    Path("site.toml").write_text("node.cores = 64\nnode.gpus = 4")
    for scheduler in SCHEDULERS:
        text = script(job(config, scheduler, site=load_site("site.toml")))
        assert "gpu-affinity" not in text and "gpus-per-task" not in text and "gpu-bind" not in text


def test_the_name_of_a_job_has_no_sign_that_pbs_refuses(config: str) -> None:
    assert "#PBS -N lr_1e-3" in script(job(config, "pbs", name="lr=1e-3"))
