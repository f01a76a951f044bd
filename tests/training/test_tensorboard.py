"""Event files: TensorBoard's own reader, where it is installed, and the bytes that its formats ask for."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.training.config import load_config
from hpcmp.training.metrics import Metrics
from hpcmp.training.tensorboard import Events, _checksum, _framed, scalars
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

RECORD: dict[str, Any] = {
    "step": 3,
    "tokens": 300,
    "loss": 2.5,
    "norm": None,
    "held": True,
    "rate": float("nan"),
    "huge": 1e300,
    "phases": {"wait": {"most": 0.25, "slowest": 1}},
}


def test_the_checksum_is_crc_32c_masked() -> None:
    """0xe3069283 is CRC-32C of the digits, by which the polynomial is published; the mask is TFRecord's."""
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _checksum(b"123456789") == struct.pack("<I", masked)
    length = struct.pack("<Q", 3)
    assert _framed(b"abc") == length + _checksum(length) + b"abc" + _checksum(b"abc")


def test_only_numbers_that_it_can_hold_are_scalars() -> None:
    assert dict(scalars(RECORD)) == {"loss": 2.5, "phases/wait/most": 0.25, "phases/wait/slowest": 1.0}


def test_a_file_is_what_was_written_down_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmp.training.tensorboard.time.time", lambda: 1.5)
    events = Events(tmp_path)
    events.begin(300)
    events.write({"step": 300, "loss": 2.5})
    wall = b"\x09" + struct.pack("<d", 1.5) + b"\x10\xac\x02"  # step 300 in two bytes
    value = b"\x0a\x04loss\x15" + struct.pack("<f", 2.5)
    summary = b"\x0a" + bytes([len(value)]) + value
    wanted = [
        wall + b"\x1a\x0dbrain.Event:2",
        wall + b"\x3a\x02\x08\x01",
        wall + b"\x2a" + bytes([len(summary)]) + summary,
    ]
    assert events.path.read_bytes() == b"".join(map(_framed, wanted))
    assert events.path.name.startswith("events.out.tfevents.0000000001.")


def test_tensorboard_reads_it_and_drops_what_a_resumed_run_takes_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, losses in (0, [4.0, 3.0, 2.0]), (2, [1.5]):
        metrics = Metrics(tmp_path, tensorboard=True)
        if start:
            metrics.events = Events(tmp_path)
            metrics.events.path = metrics.events.path.with_name(f"{metrics.events.path.name}.2")  # a second later
        metrics.forget_after(start)
        for step, loss in enumerate(losses, start):
            metrics.write({"step": step, "loss": loss})
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 4.0), (1, 3.0), (2, 1.5)]


def test_a_disk_that_takes_nothing_costs_events_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.forget_after(0)
    metrics.write(RECORD | {"rate": 0.0})
    metrics.write(RECORD | {"rate": 0.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.mpi
def test_a_run_writes_one_file_a_start_whatever_its_ranks(world: Intracomm, mpi_tmp_path: Path) -> None:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    given = ["run.tensorboard=true", "train.steps=2", f"layout.dp={world.size}"]
    with Trainer(load_config(mpi_tmp_path / "tiny.toml", given), world) as trainer:
        trainer.train()
    world.Barrier()
    (path,) = (mpi_tmp_path / "run" / "tensorboard").iterdir()
    assert path.read_bytes().count(b"\x0a\x04loss\x15") == 2
