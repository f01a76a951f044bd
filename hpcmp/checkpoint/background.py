"""Work in a thread behind the training, which can be given up without harm."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds that a thread which is given up has, to come to a place where it can stop


class GivenUp(Exception):
    """Raised in a task by ``check``, once it is given up."""


class Task(threading.Thread, Generic[T]):
    """A call that runs in a thread of its own from the start. It must make no call of MPI.

    It is a daemon, so that a disk that does not answer never keeps the process from its end. But the process may crash
    if it ends while a thread is within HDF5; hence at its end every task is given up, and waited for a while.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="hpcmp-checkpoint", daemon=True)
        self._work = work
        self._outcome: list[T] = []
        self._failure: BaseException | None = None
        self._given_up = threading.Event()
        atexit.register(self.give_up)
        try:
            self.start()
        except RuntimeError:  # the system has no thread for us
            self.run()

    def run(self) -> None:
        """The thread."""
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # whoever asks for the result gets it
            self._failure = error

    def finish(self, seconds: float | None = None) -> None:
        """Wait until it has ended, at most so long."""
        if self.ident is not None:  # else it never was a thread
            self.join(seconds)

    def result(self) -> T:
        """What the call returns or raises; waits for it."""
        self.finish()
        atexit.unregister(self.give_up)
        if self._failure is not None:
            raise self._failure
        return self._outcome[0]

    def give_up(self) -> None:
        """Let it stop at its next ``check``, and wait until it has, but no longer than PATIENCE."""
        self._given_up.set()
        self.finish(PATIENCE)
        atexit.unregister(self.give_up)

    def check(self) -> None:
        """Raises GivenUp if it is given up."""
        if self._given_up.is_set():
            raise GivenUp


def check() -> None:
    """Called by work where it can stop: raises GivenUp if it runs in a task that is given up."""
    thread = threading.current_thread()
    if isinstance(thread, Task):
        thread.check()
