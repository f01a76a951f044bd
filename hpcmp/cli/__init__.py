"""The command line, ``hpcmp COMMAND ...``: one module a command, each imported at once but light until it runs."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from . import common

#: The commands, in the order of the help page: ``hpcmp.cli.NAME`` has ``register(subparsers)``.
COMMANDS = ("train", "verify", "generate", "data", "checkpoint", "report", "doctor", "job")


def parser() -> common.Parser:
    """The parser of the whole command line."""
    top = common.Parser(
        prog="hpcmp", description="Train and run transformers too large for one device, under mpirun or srun."
    )
    top.add_argument("--version", action="version", version=f"hpcmp {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").register(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if None) and return its exit code, from ``common.EXIT_CODES``."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.filterwarnings("ignore", "suspicious MPI execution environment")  # hpcmp says it itself, and stops
    with common.log_to_stderr():
        try:
            args = parser().parse_args(argv)
            return common.finish(args.run(args), args)
        except SystemExit as exit:  # --help and --version
            return exit.code if isinstance(exit.code, int) else common.OK
        except (Exception, KeyboardInterrupt) as error:
            return common.fail(error, "--json" in argv)
