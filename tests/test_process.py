"""What a process is given, and the memory that it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

#: Prints how many pages of 100 MiB of arrays the system has had to zero, when they are made for the third time.
AGAIN = """
import resource, sys
import numpy as np
from hpcmp import process
if sys.argv[1] == "keep":
    process.keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(n << 20, np.uint8) for n in (3, 33, 64)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-c", AGAIN, how]
    return int(subprocess.run(argv, env=plain | environment, capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_memory_that_is_freed_is_used_again() -> None:
    assert faults("keep") < 20
    assert faults("leave") >= 40  # 100 MiB, be it in pages of 2 MiB
    assert faults("keep", MALLOC_ARENA_MAX="4") >= 40  # the environment's settings stay as they are
