"""Errors that hpcmp raises on purpose, each with the exit code of the command line (see docs/exit-codes.md)."""

from __future__ import annotations

import re


class HpcmpError(Exception):
    """Base of every error that hpcmp raises on purpose. Its message is one line, written for the user."""

    exit_code = 1


class CheckFailed(HpcmpError):
    """A check that the user asked for did not hold: gradients of a layout differ, a checkpoint is damaged."""

    exit_code = 1


class MismatchError(HpcmpError):
    """Ranks call different collectives at the same time: a bug of the program. The same on every rank of the group."""

    exit_code = 69


class InputError(HpcmpError):
    """Bad input: the message names the file, key or flag, and what would be right. Nothing has been changed."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not fit the model. No weight has been changed."""


class InUseError(InputError):
    """A directory that another run is using. Nothing in it has been changed."""


class DataError(InputError):
    """A data file that is missing, damaged or of another kind."""


def reason(error: BaseException) -> str:
    """Why something failed, in one printable line that names the file if the system did."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not isinstance(error, HpcmpError):
        if found := re.search(r"error message = '([^']*)'", text):  # how HDF5 wraps the system's errors
            text = found[1]
        elif not text or not isinstance(error, OSError | ValueError):
            text = f"{type(error).__name__}: {text}"
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
