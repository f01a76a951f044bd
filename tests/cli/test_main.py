"""The frame of every command: exit codes, what goes to stdout and stderr, and how a job of many ranks ends."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import hpcmp
from hpcmp import cli
from hpcmp.cli import common, main
from hpcmp.errors import CheckFailed, InputError

ROOT = Path(__file__).resolve().parents[2]

# A command "boom" that fails in the given way on the given ranks, while the others wait for them.
BOOM = """
import sys, time, types
from hpcmp import cli, errors
from hpcmp.cli.common import parent

def register(subparsers):
    command = subparsers.add_parser("boom", parents=[parent])
    command.add_argument("kind", choices=("early", "input", "check", "bug"))
    command.add_argument("ranks")
    command.set_defaults(run=run)

def run(args):
    ranks = [int(rank) for rank in args.ranks.split(",")]
    from hpcmp.comm.detect import launcher, start_mpi
    if args.kind == "early" and launcher().rank in ranks:
        raise errors.InputError("no such file: early")
    world = start_mpi().COMM_WORLD
    if world.rank in ranks:
        raise {"input": errors.InputError, "check": errors.CheckFailed, "bug": ValueError}[args.kind]("planted")
    world.Barrier()
    time.sleep(60)

sys.modules["hpcmp.cli.boom"] = module = types.ModuleType("hpcmp.cli.boom")
module.register = register
cli.COMMANDS = ("boom",)
sys.exit(cli.main())
"""


@pytest.fixture
def command(monkeypatch):
    """command(run, show=None) adds the command "do", which runs ``run(args)``."""
    for name in [name for name in os.environ if name.startswith(("OMPI_COMM_", "PMI_", "SLURM_"))]:
        monkeypatch.delenv(name)

    def add(run, show=None):
        def register(subparsers):
            subparsers.add_parser("do", parents=[common.parent]).set_defaults(
                run=run, **({"show": show} if show else {})
            )

        module = ModuleType("hpcmp.cli.do")
        module.register = register  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "hpcmp.cli.do", module)
        monkeypatch.setattr(cli, "COMMANDS", ("do",))

    return add


def raising(error):
    def run(args):
        raise error

    return run


def program(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m hpcmp argv``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    command = [sys.executable, "-m", "hpcmp", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def ours(stderr: str) -> list[str]:
    """The lines of stderr that hpcmp wrote, without mpirun's."""
    return [line for line in stderr.splitlines() if line.lstrip().startswith("hpcmp: ")]


def test_version_and_help():
    assert program("--version").stdout == f"hpcmp {hpcmp.__version__}\n"
    done = program("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_every_command_has_a_page_of_help():
    for name in cli.COMMANDS:
        done = program(name, "--help")
        assert done.returncode == 0 and f"hpcmp {name}" in done.stdout, done.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from hpcmp.cli import main; main(['--help']);"
        "print('LOADED', sorted({'numpy', 'mpi4py', 'h5py', 'cupy', 'matplotlib'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize(
    ("argv", "part"), [([], "COMMAND"), (["trian"], "'trian'"), (["doctor", "--jsn"], "--jsn"), (["doctor", "x"], "x")]
)
def test_a_wrong_command_line_is_one_line_and_code_2(argv, part):
    done = program(*argv)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hpcmp: error: ") and done.stderr.count("\n") == 1 and part in done.stderr


def test_a_result_is_shown_or_printed_as_one_json_object(command, capsys):
    command(
        lambda args: {"loss": np.float32(0.5), "path": Path("a"), "bad": float("nan"), "n": np.arange(2)}, show=repr
    )
    assert main(["do"]) == 0
    assert capsys.readouterr().out.startswith("{'loss': ")
    assert main(["do", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 0.5, "path": "a", "bad": None, "n": [0, 1], "exit_code": 0}


def test_a_result_carries_its_exit_code(command, capsys):
    command(lambda args: {"exit_code": common.CONTINUE})
    assert main(["do", "--json"]) == 75
    assert json.loads(capsys.readouterr().out) == {"exit_code": 75}
    assert main(["do"]) == 75
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("x.toml: no"), 2, "hpcmp: error: x.toml: no"),
        (CheckFailed("differ"), 1, "hpcmp: error: differ"),
        (KeyboardInterrupt(), 130, "hpcmp: error: interrupted"),
    ],
)
def test_an_error_is_one_line_without_traceback(command, capsys, error, code, line):
    command(raising(error))
    assert main(["do"]) == code
    assert capsys.readouterr() == ("", line + "\n")
    assert main(["do", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": line.removeprefix("hpcmp: error: "), "exit_code": code} and err == line + "\n"


def test_an_internal_error_has_its_traceback_first(command, capsys):
    command(raising(ZeroDivisionError("a bug")))
    assert main(["do"]) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-2:] == [
        "ZeroDivisionError: a bug",
        "hpcmp: error: internal error: ZeroDivisionError: a bug",
    ]


def test_the_log_goes_to_stderr_and_leaves_no_handler(command, capsys):
    log = logging.getLogger("hpcmp")
    before = log.handlers[:], log.level

    def run(args):
        log.info("step 1")
        log.debug("hidden")
        return {}

    command(run)
    assert main(["do", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "step 1\n" and json.loads(out) == {"exit_code": 0}
    assert (log.handlers, log.level) == before


def test_other_ranks_log_their_warnings_alone_and_print_nothing(command, capsys, monkeypatch):
    def run(args):
        logging.getLogger("hpcmp").info("step 1")
        logging.getLogger("hpcmp").warning("slow")
        return {"loss": 1}

    command(run)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main(["do", "--json"]) == 0
    assert capsys.readouterr() == ("", "rank 3: slow\n")


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m hpcmp doctor | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(
    ("launcher", "rank", "heard"),
    [
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, 1, False),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, 1, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, 0, True),
    ],
)
def test_before_mpi_one_rank_of_a_host_speaks(command, capsys, monkeypatch, launcher, rank, heard):
    """Under a launcher that goes on, ranks beside another stay silent; under one that does not, who lives has news."""
    monkeypatch.setattr(common, "_await_turn", lambda rank: None)
    command(raising(InputError("x.toml: no")))
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert main(["do"]) == 2
    assert ("hpcmp: error: x.toml: no" in capsys.readouterr().err) is heard


def test_a_wrong_command_line_is_said_by_rank_0_alone():
    for rank, heard in (("0", True), ("1", False)):
        done = program("doctor", "--nonsense", env={"PMI_RANK": rank, "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"})
        assert done.returncode == 2 and ("--nonsense" in done.stderr) is heard


@pytest.mark.parametrize(
    ("kind", "ranks", "code", "said"),
    [
        ("input", "0,1,2,3", 2, "hpcmp: error: planted"),
        ("input", "2", 2, "hpcmp: error: planted (rank 2 of 4 on host "),
        ("input", "1,3", 2, "hpcmp: error: planted (rank 1 of 4 on host "),
        ("check", "3", 1, "hpcmp: error: planted (rank 3 of 4 on host "),
        ("early", "0,1,2,3", 2, "hpcmp: error: no such file: early"),
        ("early", "2", 2, "hpcmp: error: no such file: early (rank 2 of 4 on host "),
    ],
)
@pytest.mark.fault(9)
def test_an_error_is_said_once_and_ends_the_job_in_seconds(run_mpi, tmp_path, kind, ranks, code, said):
    (tmp_path / "boom.py").write_text(BOOM)
    start = time.monotonic()
    done = run_mpi(4, [sys.executable, str(tmp_path / "boom.py"), "boom", kind, ranks], env={"PYTHONPATH": str(ROOT)})
    assert time.monotonic() - start < 45  # and not the 60 that the others would sleep
    assert done.returncode == code and done.stdout.strip() == ""
    (line,) = ours(done.stderr)
    assert line.strip().startswith(said) and "Traceback" not in done.stderr


@pytest.mark.fault(9)
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(run_mpi, tmp_path):
    (tmp_path / "boom.py").write_text(BOOM)
    argv = [sys.executable, str(tmp_path / "boom.py"), "boom", "bug", "1", "--json"]
    done = run_mpi(2, argv, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 70
    first, last = (line.strip() for line in ours(done.stderr))
    assert first.startswith("hpcmp: rank 1 of 2 on host ") and last.endswith("internal error: ValueError: planted")
    assert done.stderr.index(first) < done.stderr.index("Traceback") < done.stderr.index(last)
    assert json.loads(done.stdout) == {"error": "internal error: ValueError: planted", "exit_code": 70}


def test_a_wrong_command_line_of_many_ranks_is_said_once(run_mpi):
    done = run_mpi(4, [sys.executable, "-m", "hpcmp", "doctor", "--nonsense"], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(ours(done.stderr)) == 1


def test_the_page_holds_the_table_of_exit_codes():
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [f"| {code} | {meaning} |" for code, meaning in common.EXIT_CODES.items()]
    for code in (common.OK, common.FAILED, common.BAD_INPUT, common.INTERNAL, common.CONTINUE):
        assert str(code) in common.EXIT_CODES
