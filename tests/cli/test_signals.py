"""Signals of a run: the first asks it to stop, the second of its kind ends it, even where Python cannot run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from hpcmp.cli.signals import NUMBERS, stopping

PROGRAM = """
import ctypes, signal, sys, time
from hpcmp.cli import signals
signals._TWICE = {twice}
asked = []
with signals.stopping(lambda *given: asked.append(given)):
    print("ready", flush=True)
    {body}
print(asked, flush=True)
"""
#: A call that is begun again after every signal, and in which no handler of Python's runs: as a wait in MPI.
BLOCKED = "ctypes.CDLL(None).system(b'exec sleep 60')"


@contextmanager
def running(body: str, twice: float) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PROGRAM.format(body=body, twice=twice)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        with suppress(ProcessLookupError):  # a child of a process that has ended is still of its group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.fault(18)
def test_a_second_one_ends_a_process_that_waits_in_c(number: signal.Signals) -> None:
    with running(BLOCKED, twice=0.2) as process:
        end = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.returncode == 128 + number


def test_the_same_one_delivered_twice_asks_to_stop() -> None:
    with running("sys.stdin.readline()", twice=3600) as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        out, _ = process.communicate("\n", timeout=30)
        assert "('received SIGTERM', False)" in out and process.returncode == 0


def test_one_of_another_kind_is_no_second() -> None:
    body = "while len(asked) < 3: time.sleep(0.01)"
    with running(body, twice=0.0) as process:
        for number in NUMBERS:
            process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        for number, again in NUMBERS.items():
            assert f"('received {number.name}', {again})" in out


def test_afterwards_all_is_as_it_was() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in NUMBERS}
    try:
        with stopping(lambda reason, again: None):
            assert all(signal.getsignal(number) is not mine for number in NUMBERS)
            assert signal.set_wakeup_fd(-1) != -1
        assert all(signal.getsignal(number) is mine for number in NUMBERS)
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
