"""A token file appears whole or not at all: interrupted, killed, out of disk, or written twice at once."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmp.data import TokenFile, prepare
from hpcmp.errors import InputError


def test_two_at_once(corpus: Path, tmp_path: Path) -> None:
    with open(tmp_path / "c.h5.partial", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another process is writing .*c\.h5"):
            prepare([corpus], tmp_path / "c.h5")
    assert (
        prepare([corpus], tmp_path / "c.h5").status == "written"
    )  # a partial file without a holder is in nobody's way


def test_interrupted(corpus: Path, tmp_path: Path) -> None:
    def interrupt(files: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "c.h5", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


KILLED = """
import os, signal, sys
from hpcmp.data import TokenFile, prepare, writer

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

stage, corpus, output = sys.argv[1:]
progress = kill if stage == "tokenise" else None
if stage == "write":  # after the first array is in the file
    copy, writer._copy = writer._copy, lambda *a: (copy(*a), kill())
if stage == "verify":
    TokenFile.verify = kill
if stage == "rename":
    os.replace = kill
prepare([corpus], output, overwrite=True, progress=progress)
"""


@pytest.mark.parametrize("stage", ["tokenise", "write", "verify", "rename"])
@pytest.mark.parametrize("previous", [False, True])
def test_killed(stage: str, previous: bool, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    if previous:
        prepare([corpus / "a"], path)
    before = path.read_bytes() if previous else None
    done = subprocess.run([sys.executable, "-c", KILLED, stage, corpus, path], timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    prepare([corpus], path, overwrite=True)
    with TokenFile(path) as file:
        file.verify()
        assert file.counts["files"] == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "corpus"]


FULL = """
import resource, sys
from hpcmp.data import prepare
from hpcmp.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    prepare([sys.argv[2]], sys.argv[3], overwrite=True)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("where", ["spool", "file", "end"])
def test_disk_full(where: str, corpus: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit: reached in the spool, in the HDF5 file, and at its very last byte."""
    (corpus / "large.txt").write_text("x" * 200_000)
    path = tmp_path / "c.h5"
    made = prepare([corpus], path)
    spool, size = 2 * max(split["tokens"] for split in made.splits.values()), path.stat().st_size
    assert spool < size - 2
    limit = {"spool": spool // 2, "file": spool + 1, "end": size - 1}[where]
    prepare([corpus / "b"], path, overwrite=True)
    before = path.read_bytes()
    arguments = [sys.executable, "-c", FULL, str(limit), str(corpus), str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"cannot write {path}: ") and done.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "corpus"]
