"""``run.tensorboard``: the numbers of the metrics in TensorBoard's own files, written without it.

An event file is a sequence of records, as TensorFlow's TFRecord frames them: length, checksum of it, data, checksum of
them. The data are Event messages of tensorboard/compat/proto/event.proto, in the encoding of Protocol Buffers.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("hpcmp")

FOLDER = "tensorboard"
_LARGEST = 3.4028234e38  # of float32, in which TensorBoard keeps scalars


class Events:
    """Appends scalars to an event file of this start in ``directory/tensorboard``. What cannot be written is lost, and
    said once; it never ends a run."""

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = directory / FOLDER / name
        self.failed = False

    def begin(self, step: int) -> None:
        """The run goes on after ``step`` steps: TensorBoard drops what earlier files tell of later ones."""
        start = _number(1, 1)  # SessionLog.status = START
        self._append(_event(step, _bytes(3, b"brain.Event:2")), _event(step, _bytes(7, start)))

    def write(self, record: dict[str, Any]) -> None:
        """The numbers of a record of the metrics, by their names, at its step."""
        step = record.get("step")
        values = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in scalars(record)
        )
        if isinstance(step, int) and values:
            self._append(_event(step, _bytes(5, values)))

    def _append(self, *events: bytes) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"".join(map(_framed, events)))
        except OSError as error:
            if not self.failed:
                log.warning("%s: %s; training goes on without", self.path, error.strerror or error)
            self.failed = True


def scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record as (tag, value); in a table the table's name comes before: ``phases/wait/most``."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "tokens"):
            if abs(value) <= _LARGEST:
                yield prefix + name, float(value)


def _event(step: int, what: bytes) -> bytes:
    """An Event: wall_time, step, and ``what`` it tells."""
    return b"\x09" + struct.pack("<d", time.time()) + _number(2, step) + what


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> Iterator[int]:
    """CRC-32C of each byte: the polynomial is 0x1EDC6F41, its bits here the other way round."""
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
        yield crc


_CRC = tuple(_table())
