"""A Slurm that is not there, on three nodes, and a job's script that runs among its programs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from hpcmp.jobs import Job, make_job, script
from tests.batch.fakes import Programs

CONFIG = "[model]\nlayers = 4\nheads = 8\n[layout]\ntp = 2\npp = 2\n"

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
        more: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(["bash", "script"], env=env, cwd=self.folder, **more)

    def run(self, **environ: str) -> int:
        """The exit code of the script."""
        process = self.start(**environ)
        self.said = process.communicate(timeout=30)[1]
        return process.returncode

    def until(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until there is a file ``name``."""
        end = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)

    def calls(self, *words: str) -> list[list[str]]:
        """The calls that begin with ``words``."""
        return [call for call in self.programs.calls if call[: len(words)] == list(words)]

    @property
    def steps(self) -> list[list[str]]:
        """The calls that started ranks."""
        return [call for call in self.programs.calls if "train" in call]


REQUEUE = ["scontrol", "requeue", "12"]
