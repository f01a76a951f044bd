"""A few hundred fuzzed inputs of every kind, and that the fuzzer sees what it looks for.

At full size: ``python -m tests.checkpoint.fuzz --inputs 100000``.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

import h5py
import numpy as np
import pytest

from tests.checkpoint import fuzz
from tests.checkpoint.fuzz_base import Damage, refusal

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_readers(target: str, tmp_path: Path) -> None:
    report = fuzz.fuzz([target], 200, 1, tmp_path)
    assert not report.failures, fuzz.show(report)
    assert report.counts.total() == 200
    assert report.of("refused") > 80 and report.of("not made") < 20, fuzz.show(report)


class Fake:
    """A reader that is bad in a way that its input, a number, tells."""

    def prepare(self, folder: Path, outside: Path) -> None:
        with h5py.File(outside / "secret.h5", "w") as file:
            file["x"] = 1
        self.secret = outside / "secret.h5"
        self.number = -1

    def damage(self, draw: Random, run: Path, outside: Path) -> Damage:
        self.number += 1
        return Damage(["fake"], forged=self.number == 1)

    def read(self, run: Path) -> str:
        match self.number:
            case 1 | 2:
                return "other"
            case 3:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 5:
                time.sleep(3600)
            case 7:
                np.ones(1 << 30, np.uint8)
            case 8:
                raise KeyError("x")
            case 9:
                h5py.File(self.secret).close()
            case 10:
                open("/etc/hostname").close()
            case 11:
                return refusal(ValueError("two\nlines"))  # type: ignore[arg-type]
        return "refused"


def test_the_fuzzer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.TARGETS, "fake", Fake)
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    found: dict[int, str] = {}
    target = fuzz._prepared("fake", tmp_path)
    number = 0
    while number < 13:  # as ``fuzz``, with a reader that counts on through the processes
        target.number = number - 1  # type: ignore[attr-defined]
        for done, _, outcome in fuzz._batch("fake", target, range(number, 13), 0, tmp_path):
            found[done] = outcome
        number = done + 1
    assert [found[i] for i in (0, 1, 4, 6, 12)] == ["refused", "other", "refused", "refused", "refused"]
    assert found[2].startswith("wrong") and found[3] == "crash: SIGSEGV" and found[5] == "time-out"
    assert found[7].startswith("memory") and found[8].startswith("exception: KeyError")
    assert found[9] == f"escape: ['{tmp_path}/outside/secret.h5']" and found[10] == "escape: ['/etc/hostname']"
    assert found[11].startswith("wrong: a message")
    report = fuzz.Report()
    for number, outcome in found.items():
        report.add("fake", number, ["fake"], outcome)
    assert [number for _, number, _, _ in report.failures] == [2, 3, 5, 7, 8, 9, 10, 11]
    assert "8 failures" in fuzz.show(report)
