"""What every command shares: its --json flag, the log, the exit codes, and how a job of many ranks ends on an error."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from ..comm.detect import alone, launcher, start_mpi
from ..errors import HpcmpError, InputError

OK, FAILED, BAD_INPUT, OUT_OF_STEP, INTERNAL, CONTINUE, STUCK, SIGNAL = 0, 1, 2, 69, 70, 75, 78, 128

#: The exit codes of every command; docs/exit-codes.md explains them.
EXIT_CODES = {
    "0": "success",
    "1": "a check that was asked for failed: gradients or replicas differ, a checkpoint is damaged, doctor found a "
    "problem; or a loss is no number, or a checkpoint could not be saved",
    "2": "bad input, or a directory that another run is using: one line on stderr names the file, key or flag",
    "69": "a rank is gone, never came to a collective, called another one, or got an error from MPI: the verdict is on "
    "stderr",
    "70": "an internal error, or an exception on a rank: its traceback is on stderr, and names the rank",
    "75": "stopped early with a checkpoint, at the time limit or by SIGTERM, SIGUSR1 or SIGUSR2: run it again to go on",
    "78": "as 75, but not requeued (train.requeue): it began three times at one step, so running it again is no use",
    "128 + n": "ended by signal n: 130 after Ctrl-C, 139 after a segmentation fault, 143 after a second SIGTERM",
}


class UsageError(InputError):
    """A command line that cannot be understood. Every rank has the same one, and finds out before MPI starts."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print its usage and exit.

    A command's ``overrides`` may also follow its options, after ``--`` or not, where argparse knows them no more.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = self.parse_known_args(args, namespace)
        left = [word for word in left if word != "--"]
        if left and (not hasattr(found, "overrides") or any(word.startswith("-") for word in left)):
            self.error(f"unrecognized arguments: {' '.join(left)}")
        if left:
            found.overrides = [*found.overrides, *left]
        return found

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


#: The parent of every command's parser: ``subparsers.add_parser(name, parents=[common.parent], help=...)``, followed by
#: ``set_defaults(run=...)``, a function from the arguments to the result object, and if it has something to say on a
#: terminal ``set_defaults(show=...)``, from the result to text. ``last``, if it is there, gets the result on rank 0
#: when it has been printed. A result's "exit_code", 0 if absent, ends the process. Another rank than 0 prints where
#: ``args.speaks`` says so.
parent = Parser(add_help=False)
parent.add_argument(
    "--json", action="store_true", help="print the result as one JSON object on stdout; logs go to stderr"
)


def add_command(subparsers: Any, name: str, help: str, about: str, examples: str) -> argparse.ArgumentParser:
    """The parser of the command ``name``, with ``--json``; the texts of its help page keep their lines."""
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[parent],
    )
    return command


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Send the log of hpcmp to stderr: all of rank 0's, and the other ranks' warnings with their rank."""
    started = launcher()
    rank = started.rank if started else 0
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log = logging.getLogger("hpcmp")
    level = log.level
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def log_all() -> None:
    """Say all of the log from now on, as rank 0 does, in whose place this rank may be."""
    for handler in logging.getLogger("hpcmp").handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.INFO)
            handler.setFormatter(logging.Formatter("%(message)s"))


def to_json(value: Any) -> str:
    """``value`` as JSON on one line: NumPy numbers as numbers, NaN and infinities as null, paths as text."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _world() -> tuple[int, int, Any]:
    """This process's rank, how many there are, and the MPI module if MPI joins them: else what the launcher says."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        return mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, mpi
    started = launcher()
    return (started.rank, started.size, None) if started else (0, 1, None)


def finish(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Print a command's result on rank 0, as JSON or as ``args.show`` makes of it; return its exit code."""
    code = int(result.get("exit_code", OK))
    rank, _, mpi = _world()
    if getattr(args, "speaks", rank == 0):
        try:
            if args.json:
                print(to_json(result | {"exit_code": code}))
            elif hasattr(args, "show"):
                print(args.show(result))
            sys.stdout.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            _forget_stdout()
            raise InputError(f"stdout: {error.strerror}") from None
        finally:
            if hasattr(args, "last"):
                args.last(result)
    elif code != OK and mpi is None:
        _await_turn(rank)  # nothing else keeps rank 0 alive until it has printed
    return code


def _await_turn(rank: int) -> None:
    if rank > 0:
        time.sleep(1 + math.log2(rank) / 2)


def fail(error: BaseException, as_json: bool) -> int:
    """Say ``error`` on stderr once in the job, and end every rank with its code; return it if MPI has nothing to end.

    An error is raised by all ranks or by some, and no rank can ask the others: they may wait in a collective. So each
    waits its turn, rank 0 not at all and rank r for 1 + log2(r) / 2 seconds, then speaks and ends the job, which
    silences those behind it: the lowest rank that has the error is heard, once, within seconds.

    Before MPI joins the ranks nobody can end the job. Then rank 0 speaks, and after its turn the first rank of each
    host, which alone may lack a file; of a command line that is wrong everywhere, rank 0 alone. A launcher that ends
    the job at the first failed process has silenced the others by then: under it every rank speaks after its turn.
    Under one whose processes wait in MPI_Init for those that have ended, MPI is started first, so that it can end them.
    """
    started, (code, message) = launcher(), _explain(error)
    if (
        started is not None
        and started.awaits_all
        and "mpi4py.MPI" not in sys.modules
        and not isinstance(error, UsageError)
    ):
        _join(code, message)
    rank, size, mpi = _world()
    _await_turn(rank)
    first_here = started is not None and started.local_rank == 0 and not isinstance(error, UsageError)
    if rank == 0 or mpi is not None or first_here or (started is not None and started.ends_job):
        _say(code, message, error, f"rank {rank} of {size} on host {socket.gethostname()}" if size > 1 else "", as_json)
    if mpi is not None and not alone(mpi):
        time.sleep(0.2)  # what was said reaches the terminal before what mpirun has to say, and is not lost
        mpi.COMM_WORLD.Abort(code)
    return code


def _join(code: int, message: str) -> None:
    """Start MPI, where the other ranks wait for this one; should they have ended, too, this one does in a minute."""

    def give_up() -> None:
        sys.stderr.write(f"hpcmp: error: {message}\n")
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(60, give_up)
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):  # no MPI, or another launcher's: then nobody waits in it
        start_mpi()
    timer.cancel()


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what is said of it."""
    if isinstance(error, HpcmpError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return SIGNAL + signal.SIGINT, "interrupted"
    if isinstance(error, BrokenPipeError):
        return SIGNAL + signal.SIGPIPE, ""
    return INTERNAL, f"internal error: {type(error).__name__}: {error}"


def _forget_stdout() -> None:
    """What is left in the buffer of stdout goes nowhere, and so does what follows."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(code: int, message: str, error: BaseException, who: str, as_json: bool) -> None:
    if not message:  # the reader of stdout has gone, as `| head` does
        _forget_stdout()
        return
    if as_json:
        print(to_json({"error": message, "exit_code": code}), flush=True)
    text = f"hpcmp: error: {message}"
    if code == INTERNAL:
        text = "".join([f"hpcmp: {who}\n" if who else "", *traceback.format_exception(error), text])
    elif who and not who.startswith("rank 0 "):
        text += f" ({who})"
    sys.stderr.write(text + "\n")  # in one write, so that ranks do not mix their lines
    sys.stderr.flush()
