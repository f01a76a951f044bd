"""``manifest.jsonl``: a record of each start of a run, with what, where, and as what; and of each end in order."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import process
from ..batch import find_job
from .alike import code
from .config import Config
from .records import Records
from .versions import git_commit, versions

if TYPE_CHECKING:
    from ..comm.mesh import Mesh
    from .inputs import Inputs

log = logging.getLogger("hpcmp")

NAME = "manifest.jsonl"
_TIME = "%Y-%m-%dT%H:%M:%S%z"
_SETTINGS = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HPCMP_NODES",
    "HPCMP_CUDA_AWARE",
    "HPCMP_CUDNN",
    "HPCMP_GEMM_CHOICES",
    "SLURM_JOB_NODELIST",
)


def begin(config: Config, mesh: Mesh, inputs: Inputs, folder: Path, run: str, step: int) -> None:
    """Write down in ``folder`` that the run starts: the resolved configuration, and a record more of ``start``.
    Collective over the mesh. What cannot be written is a warning."""
    record = start(config, mesh, inputs, run, step)
    if mesh.rank != 0:
        return
    Records(folder / NAME).write(record)
    path = folder / "config.toml"
    try:
        path.write_text(config.to_toml(), encoding="utf-8")
    except OSError as error:
        log.warning("%s: %s; training goes on without", path, error.strerror or error)


def end(summary: dict[str, Any], mesh: Mesh, folder: Path) -> None:
    """Write down in ``folder`` that the run has come to its end in order, as ``Trainer.train`` sums it up."""
    if mesh.rank == 0:
        record = {key: summary[key] for key in ("step", "steps", "finished", "reason", "checkpoint")}
        requeued = summary["requeue"] is not None
        Records(folder / NAME).write({"ended": time.strftime(_TIME), **record, "requeued": requeued})


def start(config: Config, mesh: Mesh, inputs: Inputs, run: str, step: int) -> dict[str, Any]:
    """The record of a start that goes on after ``step`` steps; ``run`` is the name by which checkpoints know the run.

    Of each rank: its host, as an index of ``hosts``, pid, cores that it may use, threads. Collective over the mesh.
    """
    ranks = mesh.gather_objects((socket.gethostname(), os.getpid(), sorted(process.cores()), process.threads()))
    hosts = list(dict.fromkeys(rank[0] for rank in ranks))
    job, root = find_job(), Path(__file__).parents[2]
    return {
        "time": time.strftime(_TIME),
        "run": run,
        "step": step,
        "argv": sys.argv,
        "directory": os.getcwd(),
        "python": sys.executable,
        "code": {"hpcmp": code(), "git": git_commit(root) if (root / ".git").exists() else None},
        "git": git_commit(Path.cwd()),
        "versions": versions(sys.modules.get("mpi4py.MPI")),
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        "job": job._asdict() if job.scheduler else None,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "hosts": hosts,
        "ranks": [{"host": hosts.index(h), "pid": p, "cores": c, "threads": t} for h, p, c, t in ranks],
        "nodes": str(mesh.topology),
        "layout": asdict(config.layout),
        "seed": config.train.seed,
        "data": {
            "path": str(inputs.file.path),
            "tokens": inputs.sampler.tokens,
            "train": inputs.sampler.digest,
            "valid": inputs.file.split("valid").digest,
        },
    }
