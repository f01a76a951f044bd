"""What the GPU benchmarks and their peers ask of a device: its peak, the kernels that a step launches, its memory.

Standard library alone, as ``common.py``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

#: Dense bfloat16 products with sums in float32, TFLOP/s, of NVIDIA's data sheets (half of what they say with sparsity),
#: by what a device's name has in it; the first that fits counts.
PEAKS = {
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "H800": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L40S": 362.0,
}

_DOMAINS = (1, 2)  # CUPTI's callbacks of the driver, and of the runtime, whose calls may lead to calls of the driver
_LAUNCHES = (b"cuLaunch", b"cudaLaunch", b"cuGraphLaunch", b"cudaGraphLaunch")


def peak(name: str, dtype: str) -> float | None:
    """A device's peak in FLOP/s, if the table has it."""
    found = next((value for key, value in PEAKS.items() if key in name), None)
    return found * 1e12 if found and dtype == "bfloat16" else None


class _Data(ctypes.Structure):
    """The head of CUpti_CallbackData. site: 0 at the entry of a call, 1 at its exit."""

    _fields_ = (("site", ctypes.c_int), ("function", ctypes.c_char_p))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(_Data))


def cupti() -> ctypes.CDLL | None:
    """The library that tells of every call of CUDA: of the process, the system, CUDA_HOME, or Python's packages."""
    homes = [Path(os.environ[name]) / "extras/CUPTI/lib64" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += [Path(place) / "nvidia" / package / "lib" for place in sys.path for package in ("cu13", "cuda_cupti")]
    names = ("libcupti.so.13", "libcupti.so.12", "libcupti.so")
    for name in [*names, *(str(home / name) for home in homes for name in names)]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def launches(run: Callable[[], object], library: ctypes.CDLL | None = None) -> int | None:
    """How many kernels, or graphs of them, ``run`` launches, on all threads; None if CUPTI is not there or refuses."""
    library = library or cupti()
    if library is None:
        return None
    inside, counted = threading.local(), [0]

    def called(_: object, domain: int, number: int, data: ctypes._Pointer[_Data]) -> None:
        name = data.contents.function or b""
        if not name.startswith(_LAUNCHES) or b"HostFunc" in name:
            return
        depth = getattr(inside, "depth", 0)
        if data.contents.site == 0:
            counted[0] += depth == 0
            inside.depth = depth + 1
        else:
            inside.depth = max(0, depth - 1)

    callback, subscriber = _Callback(called), ctypes.c_void_p()
    if library.cuptiSubscribe(ctypes.byref(subscriber), callback, None):
        return None
    try:
        if any(library.cuptiEnableDomain(ctypes.c_uint32(1), subscriber, domain) for domain in _DOMAINS):
            return None
        run()
    finally:
        library.cuptiUnsubscribe(subscriber)
    return counted[0]


def memory() -> int | None:
    """Bytes of the GPU that this process has, its CUDA context included, as nvidia-smi tells; None if it does not."""
    ask = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(",") for line in text.splitlines()]
    mine = [int(row[1]) for row in rows if row[0].strip() == str(os.getpid()) and row[1].strip().isdigit()]
    return 2**20 * sum(mine) if mine else None  # a container's process has another number outside
