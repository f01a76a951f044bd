"""Signals of a run: the first asks it to stop after the step at hand, the second of its kind ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .common import SIGNAL

#: Those that ask to stop, and whether they come from a time limit, after which the job may be run again: SIGUSR1 is
#: what schedulers are told to send before it, SIGUSR2 is LSF's. SIGTERM comes from whoever wants the job to end.
NUMBERS = {signal.SIGTERM: False, signal.SIGUSR1: True, signal.SIGUSR2: True}
_TWICE = 1.0  # seconds in which a signal is still the same one: scheduler and launcher may both deliver it


@contextmanager
def stopping(request_stop: Callable[[str, bool], None]) -> Iterator[None]:
    """In the body, a signal of ``NUMBERS`` calls ``request_stop(reason, whether the job may be run again)``.

    A second one of its kind, more than a second later, ends the process at once with 128 + its number, even if it waits
    in a call of MPI, in which Python's handlers do not run. In the main thread alone.
    """

    def stop(number: int, frame: object) -> None:
        known = signal.Signals(number)
        request_stop(f"received {known.name}", NUMBERS[known])

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, stop) for number in NUMBERS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def _watch(reader: int) -> None:
    """Read the numbers of signals, which the system's handler writes as they come; ends when nobody writes any more."""
    first: dict[int, float] = {}
    while numbers := os.read(reader, 16):
        for number in numbers:
            if number in NUMBERS and time.monotonic() - first.setdefault(number, time.monotonic()) > _TWICE:
                os._exit(SIGNAL + number)
    os.close(reader)
