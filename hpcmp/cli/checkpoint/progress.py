"""A line on the terminal that says how far the reading or writing of bytes has come."""

from __future__ import annotations

import sys
import time

from .text import size

CLEAR = "\r\x1b[K"  # to the start of the terminal's line, and wipe it
EVERY = 0.2  # seconds between two states of the line, at least
CELLS = 30


class Bar:
    """``with Bar("verify") as bar: ... bar(done, total)``: a line on stderr, gone at the end; none if that is not a
    terminal, or ``rank`` is not 0."""

    def __init__(self, what: str, rank: int = 0) -> None:
        self.what, self.terminal = what, rank == 0 and sys.stderr.isatty()
        self._begun = self._shown = time.monotonic()
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        """So many bytes are done, of so many."""
        now = time.monotonic()
        if self.terminal and total and now - self._shown >= EVERY:
            self._shown, self._drawn = now, True
            rate = done / max(now - self._begun, 1e-6)
            bar = f"{'=' * (CELLS * done // total):{CELLS}}"
            left = f", {(total - done) / rate:.0f} s left" if done else ""
            line = f"{self.what}  [{bar}] {100 * done // total:3}%  {size(done)} of {size(total)}, {size(rate)}/s{left}"
            print(f"{CLEAR}{line}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._drawn:
            print(CLEAR, end="", file=sys.stderr, flush=True)
