"""The analyser: what it says of dumps, whole and damaged."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest

from hpcmp.comm import recorder
from hpcmp.comm.recorder import Flight, Recorder
from hpcmp.errors import InputError
from hpcmp.training import dumps, failures
from hpcmp.training.diagnosis import diagnose

ALL = [0, 1, 2, 3]


class Job:
    """Four ranks' dumps, made one after the other by their own recorders. ``calls``: of (axes, ranks, operation, count,
    whether it is blocked in, more of ``Flight.begin``)."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.folder, self.patch = run, run / dumps.FOLDER, monkeypatch
        self.folder.mkdir()

    def dump(
        self, rank: int, *calls: tuple[Any, ...], gone: dict[int, str] | None = None, failed: tuple[int, ...] = ()
    ) -> None:
        """``failed``: the calls that an error has ended, counted from 1."""
        fresh = Recorder()
        for module in (recorder, dumps):
            self.patch.setattr(module, "RECORDER", fresh)
        flights: dict[Any, Flight] = {}
        for number, (axes, ranks, operation, count, blocked, *more) in enumerate(calls, 1):
            key = axes, tuple(ranks)
            flight = flights[key] = flights.get(key) or Flight(axes, ranks)
            record = flight.begin(operation, "float32", count, *more)
            if blocked or number in failed:
                record.block()
            if number in failed:
                record.leave(False)
            elif not blocked:
                record.finish()
        dumps.dump(self.folder, rank, 4, "a test", gone or {})

    def told(self) -> list[str]:
        return diagnose(self.run)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def dp(count: int = 8, blocked: bool = False, operation: str = "all_reduce") -> tuple[Any, ...]:
    return "dp", ALL, operation, count, blocked


def test_nothing_is_said_of_a_run_without_dumps(tmp_path: Path, job: Job) -> None:
    assert diagnose(tmp_path) == [] and diagnose(tmp_path / "none") == []


def test_ranks_that_have_not_come(job: Job) -> None:
    for rank in (0, 2):
        job.dump(rank, dp(), dp(16, True))
    for rank in (1, 3):
        job.dump(rank, dp())
    assert job.told()[0].startswith("ranks 1, 3 have not joined all_reduce 2 of dp (float32, 16) at ")
    assert ", in which ranks 0, 2 wait since 0 s; ranks 1, 3 are at " in job.told()[0]


def test_the_rank_that_waits_for_nobody_comes_first(job: Job) -> None:
    """3 is absent; 2 waits for it in tp, and 0 and 1 for 2 in dp."""
    job.dump(0, ("dp", [0, 2], "all_reduce", 8, True))
    job.dump(1, ("tp", [0, 1], "all_gather", 8, False))
    job.dump(2, ("tp", [2, 3], "all_gather", 8, True))
    job.dump(3)
    first, second = job.told()[:2]
    assert first.startswith("rank 3 has not joined all_gather 1 of tp")
    assert second.startswith("rank 2 has not joined all_reduce 1 of dp")
    assert "rank 2 waits in all_gather 1 of tp" in second


def test_ranks_that_wait_for_one_another(job: Job) -> None:
    """Two orders of two communicators' collectives."""
    a, b = ("dp", [0, 1], "all_reduce", 8, True), ("tp", [0, 1], "all_reduce", 8, True)
    for rank, call in ((0, a), (1, b), (2, dp(1)), (3, dp(1))):
        job.dump(rank, call)
    told = job.told()
    assert told[0] == "ranks wait for one another:"
    assert {text[:10] for text in told[1:3]} == {"rank 0 has", "rank 1 has"}


@pytest.mark.parametrize("other", [dp(9, True), dp(8, True, "all_gather"), (*dp(8, True, "broadcast"), 2)])
def test_ranks_that_disagree(job: Job, other: tuple[Any, ...]) -> None:
    call = (*dp(8, True, "broadcast"), 1) if len(other) > 5 else dp(8, True)
    for rank in (0, 1, 3):
        job.dump(rank, dp(), call)
    job.dump(2, dp(), other)
    assert job.told()[0].startswith(f"ranks disagree in collective 2 of dp: ranks 0-1, 3: {call[2]} (float32, 8")
    assert "; rank 2: " in job.told()[0] and "not joined" not in job.told()[0]


def test_all_to_alls_may_differ_in_their_counts(job: Job) -> None:
    for rank in ALL:
        job.dump(rank, dp(rank, False, "all_to_all"), dp(8, True))
    assert job.told()[0].startswith("all ranks have joined all_reduce 2 of dp (float32, 8) at ")


def test_a_message_that_nobody_sends(job: Job) -> None:
    job.dump(0, ("pp", ALL, "recv", 5, True, 1, 6))
    for rank in (1, 2, 3):
        job.dump(rank)
    assert job.told()[0].startswith("rank 0 waits in recv (float32, 5) of pp from rank 1 (tag 6) at ")
    assert "; rank 1 is at " in job.told()[0]


def test_ranks_without_a_dump(job: Job) -> None:
    for rank in (0, 1):
        job.dump(rank, dp(8, True), gone={2: "process 4711 of me on node7"})
    (job.folder / dumps.alive_name(3)).write_text("{}")
    told = job.told()
    assert told[0] == "rank 2 is gone: process 4711 of me on node7; a signal or want of memory has ended it"
    assert told[1].startswith("ranks 2-3 have not joined all_reduce 1 of dp") and "left no dump" in told[1]
    assert told[2].startswith("rank 3 left no dump; its last sign of life: 0 s before")


def test_a_process_that_is_a_different_communicator_s(job: Job) -> None:
    """Groups made again of the same axes and ranks are others."""
    job.patch.setattr(recorder, "RECORDER", Recorder())
    for rank in ALL:
        job.dump(rank, dp())
    told = json.loads((job.folder / dumps.dump_name(0)).read_text())
    told["groups"][0]["number"] = 2
    told["records"][0] |= {"count": 3}
    (job.folder / dumps.dump_name(0)).write_text(json.dumps(told))
    assert not any("disagree" in text for text in job.told())


def test_damaged_dumps_are_named_and_passed_over(job: Job) -> None:
    for rank in ALL:
        job.dump(rank, dp(8, rank < 3))
    path = job.folder / dumps.dump_name(2)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[" * 100_000, b"\xff" * 50, b'{"format": "hpcmp diagnosis 1"}'):
        path.write_bytes(damaged)
        told = job.told()
        assert told[0].startswith("rank 2 has not joined all_reduce 1 of dp")
        assert told[0].endswith("rank 2 left no dump that can be read")
        assert any(str(path) in text and "damaged" in text for text in told)


def test_whatever_the_files_hold_it_is_printable_text(job: Job) -> None:
    for rank in ALL:
        job.dump(rank, dp(), dp(8, rank < 3), ("pp", ALL, "send", 1, True, 1, 2), gone={3: "x"})
    draw, paths = random.Random(0), sorted(job.folder.iterdir())
    originals = {path: path.read_text() for path in paths}
    values = [None, -1, 10**40, 1e308, "\x1b[31m", [], {}, True, "nan", float("nan")]
    for _ in range(300):
        path = draw.choice(paths)
        told = json.loads(originals[path])
        place = draw.choice([told, told["groups"][0], draw.choice(told["records"])])
        place[draw.choice(sorted(place))] = draw.choice(values)
        path.write_text(json.dumps(told))
        assert all(text.isprintable() for text in job.told())
        path.write_text(originals[path])


def raised(text: str = "planted") -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_by_what_ranks_have_ended(job: Job) -> None:
    """Without a dump of anybody; the first one first, and together those that say the same."""
    lines, first = inspect.getsourcelines(raised)
    failures.leave_error(job.folder, 2, 4, raised())
    where = f"{__file__}:{first + 2} raised: {lines[2].strip()}"
    assert job.told() == [f"rank 2: ValueError: planted, at {where}"]
    for rank in (0, 3, 1):
        failures.leave_error(job.folder, rank, 4, InputError("no such file\x1b[2J"))
    told = job.told()
    assert told == [f"rank 2: ValueError: planted, at {where}", "ranks 0-1, 3: no such file?[2J"]
    failures.leave_error(job.folder, 2, 4, InputError("no such file\x1b[2J"))
    assert job.told() == ["no such file?[2J"]  # all ranks say it
    for damaged in (b"", b"{", b"[" * 100_000, b'{"format": 3}', b'{"rank": "x"}'):
        (job.folder / failures.error_name(0)).write_bytes(damaged)
        assert job.told() == ["ranks 1-3: no such file?[2J"]


def test_an_error_in_a_collective_stands_with_what_ranks_called(job: Job) -> None:
    """Of an all_to_all, whose counts may differ otherwise, and of a message, with what was sent."""
    for rank, count, failed in ((0, 8, True), (1, 8, False), (2, 9, False), (3, 8, False)):
        message = ("pp", ALL, "send", 7, False, 2, 6) if rank == 0 else ("pp", ALL, "recv", 5, False, 0, 6)
        job.dump(rank, dp(count, False, "all_to_all"), message, failed=(1,) if failed else (2,) if rank == 2 else ())
        if failed or rank == 2:
            failures.leave_error(job.folder, rank, 4, raised(f"on {rank}"))
    told = job.told()
    assert told[0].startswith("ranks disagree in collective 1 of dp: ranks 0-1, 3: all_to_all (float32, 8) at ")
    assert "; rank 2: all_to_all (float32, 9) at " in told[0]
    assert told[1].startswith("rank 0: ValueError: on 0, in all_to_all 1 of dp (float32) at ")
    assert told[2].startswith("rank 2: ValueError: on 2, in recv (float32, 5) of pp from rank 0 (tag 6) at ")
    assert "; rank 0 last sent it (float32, 7) at " in told[2]
