"""Faults that the system itself makes: calls that fail in the kernel, and permissions that hold for root too. Linux."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIBC = ctypes.CDLL(None, use_errno=True)
#: System calls, by machine: those that write to a file, and those that force it to the disk.
CALLS = {
    "x86_64": {"write": [1, 18, 20, 296, 328], "fsync": [74, 75, 277]},
    "aarch64": {"write": [64, 66, 68, 70, 287], "fsync": [82, 83, 84]},
}.get(platform.machine(), {})
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CAPABILITIES = 0x20080522  # version 3 of capset's structures
_OVERRIDES = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: whoever has them writes anywhere


def fail(kind: str, code: int = errno.EIO) -> None:
    """From now on every call of ``kind`` (see CALLS) in this process fails with ``code``: for a child, since there is
    no way back. A filter of seccomp(2), so that C libraries see it as well."""
    numbers, load, equal, end = CALLS[kind], 0x20, 0x15, 0x06
    allowed, refused = (end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00050000 | code)
    rules = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[platform.machine()]), allowed, (load, 0, 0, 0)]
    rules += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    rules += [allowed, refused]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    header = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)):
        if LIBC.prctl(*call):
            raise OSError(ctypes.get_errno(), "no seccomp")


@contextmanager
def permissions() -> Iterator[None]:
    """In the body, permissions hold for this thread, and those that it starts, though it be root's."""
    header, sets = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITIES, 0)), ctypes.create_string_buffer(24)
    if LIBC.capget(header, sets):
        raise OSError(ctypes.get_errno(), "no capabilities")
    before = sets.raw
    effective, *others = struct.unpack("6I", before)
    try:
        LIBC.capset(header, struct.pack("6I", effective & ~_OVERRIDES, *others))
        yield
    finally:
        LIBC.capset(header, before)


def in_child(work: Callable[[], str]) -> str:
    """What ``work`` returns in a child process, or the error that ends it."""
    ours, theirs = socket.socketpair()  # sending is not writing: no filter stops it
    child = os.fork()
    if child == 0:
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        theirs.sendall(text.encode()[:4000])
        os._exit(0)
    theirs.close()
    with ours:
        text = ours.recv(4000).decode()
    os.waitpid(child, 0)
    return text
