"""Storage: the choices of how a checkpoint lies on disk, and how it gets there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

#: Each kind, and which bytes it puts into which file.
KINDS = {
    "auto": "files",
    "files": "a file for each rank",
    "node": "a file for each node, written by its ranks",
    "shared": "one file of all ranks, written by each at its places",
    "mpio": "the same file, written through MPI-IO",
}
VERIFY = ("cache", "disk", "no")


@dataclass(frozen=True)
class Storage:
    """How ``save`` writes. Raises InputError for a word that is none of these.

    kind: of KINDS. verify: what is read back before the checkpoint counts: "cache", what the system has in memory,
    while it goes to the disk; "disk", what the disk has, once it is there (the system is told to forget its copy);
    "no", nothing. alignment: tensors of at least so many bytes start at multiples of it in their file; 0 for the block
    size of the file system. hints: for MPI-IO, such as "striping_unit=4194304 cb_nodes=8" (mpio alone).
    """

    kind: str = "auto"
    verify: str = "cache"
    alignment: int = 0
    hints: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown storage {self.kind!r} of a checkpoint: it is {', '.join(KINDS)}")
        if self.verify not in VERIFY:
            raise InputError(f"a checkpoint's verify is {', '.join(VERIFY)}, not {self.verify!r}")
        if self.alignment < 0:
            raise InputError(f"a checkpoint's alignment must be 0 or more: {self.alignment}")
        if self.kind == "auto":
            object.__setattr__(self, "kind", KINDS["auto"])
        self.info()

    @classmethod
    def of(cls, value: Storage | str) -> Storage:
        """A storage, or the one of that kind with all else by default."""
        return value if isinstance(value, Storage) else cls(value)

    def check(self, mesh: Mesh) -> None:
        """InputError if the ranks of ``mesh`` cannot write this way here."""
        import h5py

        if self.kind == "mpio" and mesh.comm is not None and not h5py.get_config().mpi:
            raise InputError(
                "storage mpio needs an h5py that was built with MPI; shared makes the same file with any, where ranks "
                "see each other's writes, and files works everywhere"
            )

    def info(self) -> dict[str, str]:
        """The hints, one by one."""
        pairs = [word.partition("=") for word in self.hints.split()]
        for key, _, value in pairs:
            if not key or not value:
                raise InputError(f"a checkpoint's hints are words like cb_nodes=8, not {self.hints!r}")
        return {key: value for key, _, value in pairs}

    def block(self, directory: Path) -> int:
        """The alignment in ``directory``, in bytes."""
        return self.alignment or directory.stat().st_blksize
