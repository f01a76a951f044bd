"""Errors that hpcmp raises on purpose, each with the exit code of the command line (see docs/exit-codes.md)."""

from __future__ import annotations


class HpcmpError(Exception):
    """Base of every error that hpcmp raises on purpose. Its message is one line, written for the user."""

    exit_code = 1


class CheckFailed(HpcmpError):
    """A check that the user asked for did not hold: gradients of a layout differ, a checkpoint is damaged."""

    exit_code = 1


class InputError(HpcmpError):
    """Bad input: the message names the file, key or flag, and what would be right. Nothing has been changed."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not fit the model. No weight has been changed."""


class DataError(InputError):
    """A data file that is missing, damaged or of another kind."""
