"""Moving files between ranks, from one node's directory to another's, in blocks: no whole file is ever in memory."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.base import Pending
from ..errors import CheckpointError
from ..plain import PlainFile
from .slab import BLOCK

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

_TAG = 271


@dataclass(frozen=True)
class Move:
    """A file of ``bytes`` bytes, from the directory of rank ``source`` to that of rank ``target``."""

    source: int
    target: int
    name: str
    bytes: int


def to_partners(nodes: Sequence[int], owners: Mapping[str, tuple[int, int]]) -> list[Move]:
    """The moves that bring each rank's file to the next node, whose ranks take them in turn; none on a single node.

    nodes: of each rank, numbered from 0. owners: file -> its rank, its bytes.
    """
    ranks = _by_node(nodes)
    moves = []
    for name, (source, size) in owners.items() if len(ranks) > 1 else ():
        here, there = ranks[nodes[source]], ranks[(nodes[source] + 1) % len(ranks)]
        moves.append(Move(source, there[here.index(source) % len(there)], name, size))
    return moves


def to_readers(
    nodes: Sequence[int],
    sizes: Mapping[str, int],
    wanted: Sequence[Collection[str]],
    held: Mapping[int, Collection[str]],
) -> list[Move]:
    """The moves after which every node has the files that its ranks want, as even over the ranks as can be.

    A file that one node alone has, and no other wants, goes to the next node, so that there are two of it again.
    sizes: of the files. wanted: by each rank. held: by each node. Raises CheckpointError for a file that no node has.
    """
    ranks = _by_node(nodes)
    holders: dict[str, list[int]] = {}
    for node, names in sorted(held.items()):
        for name in names:
            holders.setdefault(name, []).append(node)
    needed = {
        node: {name for rank in members for name in wanted[rank]} - set(held.get(node, ()))
        for node, members in sorted(ranks.items())
    }
    for name, (node, *others) in holders.items():
        if len(ranks) > 1 and not others and not any(name in names for names in needed.values()):
            needed[(node + 1) % len(ranks)].add(name)
    sent, received = ([0] * len(nodes) for _ in range(2))
    moves = []
    for node, names in needed.items():
        for name in sorted(names):
            if name not in holders:
                raise CheckpointError(f"{name} is on no node any more")
            senders = [rank for holder in holders[name] for rank in ranks[holder]]
            source, target = min(senders, key=sent.__getitem__), min(ranks[node], key=received.__getitem__)
            sent[source] += sizes[name]
            received[target] += sizes[name]
            moves.append(Move(source, target, name, sizes[name]))
    return moves


def make(moves: Sequence[Move], folder: Path, mesh: Mesh) -> None:
    """Make the moves, which are the same on every rank, from and to ``folder``, this rank's.

    All files get their names, once all of them are there, or none does. Collective; makes no promise that anything is
    on the disk. An error of this rank's disk is raised, as OSError, when all the moves have been gone through, so that
    no other rank waits: who calls has to tell the others.
    """
    errors: list[OSError] = []
    for now in _rounds(moves):
        ends = [_send(move, folder, mesh, errors) for move in now if move.source == mesh.rank]
        ends += [_receive(move, folder, mesh, errors) for move in now if move.target == mesh.rank]
        for _ in itertools.zip_longest(*ends):  # both at once, block by block
            pass
    failed = any(mesh.gather_objects(bool(errors)))
    for path in (folder / move.name for move in moves if move.target == mesh.rank):
        with _kept(path, errors):
            if failed:
                partial(path).unlink(missing_ok=True)
            else:
                os.replace(partial(path), path)
    if errors:
        raise errors[0]


def place(path: Path, text: bytes) -> None:
    """Write a file that appears, or takes the place of another, at once. Raises OSError."""
    with _new(partial(path)) as file:
        file.write(text)
    os.replace(partial(path), path)


def partial(path: Path) -> Path:
    """The name of what is to be ``path`` while it is written."""
    return path.with_name(f".{path.name}.partial")


def _by_node(nodes: Sequence[int]) -> dict[int, list[int]]:
    ranks: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    return ranks


def _rounds(moves: Sequence[Move]) -> list[list[Move]]:
    """The moves, so that in each round no rank sends more than one, or receives more than one."""
    rounds: list[list[Move]] = []
    sent: Counter[int] = Counter()  # rank -> the first round in which it has nothing to send yet
    received: Counter[int] = Counter()
    for move in moves:
        at = max(sent[move.source], received[move.target])
        sent[move.source] = received[move.target] = at + 1
        rounds += [[]] if at == len(rounds) else []
        rounds[at].append(move)
    return rounds


def _send(move: Move, folder: Path, mesh: Mesh, errors: list[OSError]) -> Iterator[None]:
    with _File(folder / move.name, PlainFile, errors) as file:
        for block in _blocks(move.bytes):
            file.read(block)
            sent = _begun("send", block, move.target, mesh)
            yield
            sent.wait()


def _receive(move: Move, folder: Path, mesh: Mesh, errors: list[OSError]) -> Iterator[None]:
    with _File(partial(folder / move.name), _new, errors) as file:
        for block in _blocks(move.bytes):
            received = _begun("recv", block, move.source, mesh)
            yield
            file.write(received.wait())


def _begun(operation: str, block: Any, peer: int, mesh: Mesh) -> Pending:
    """A message of bytes between ranks of the mesh, on its way and recorded.

    Not by a communicator of the mesh: that of all ranks would be made for this alone.
    """
    comm: Any = mesh.comm
    record = mesh.flight.begin(operation, block.dtype, block.size, peer, _TAG)
    pending = Pending(block, [(comm.Isend if operation == "send" else comm.Irecv)(block, peer, _TAG)])
    pending.record = record
    return pending


def _blocks(size: int) -> Iterator[Any]:
    """One buffer, cut as long as each block of so many bytes is."""
    buffer = np.zeros(min(size, BLOCK), np.uint8)  # a file that cannot be read sends nothing else of this process
    for at in range(0, size, BLOCK):
        yield buffer[: min(BLOCK, size - at)]


def _new(path: Path) -> Any:
    """A new file; of what may be there, left by a dead process or planted, nothing is followed or written to."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


class _File:
    """A file whose errors are kept; after the first one it does nothing."""

    def __init__(self, path: Path, opened: Callable[[Path], Any], errors: list[OSError]) -> None:
        self.path, self.errors = path, errors
        self._file: Any = None
        with _kept(path, errors):
            self._file = opened(path)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            with _kept(self.path, self.errors):
                self._file.close()

    def read(self, block: Any) -> None:
        """Fill ``block``."""
        if not self.errors:
            with _kept(self.path, self.errors):
                self._file.readinto(block)

    def write(self, block: Any) -> None:
        """Write ``block``."""
        if not self.errors:
            with _kept(self.path, self.errors):
                self._file.write(block)


@contextmanager
def _kept(path: Path, errors: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of an open file, the system does not say which
        errors.append(error if error.filename else OSError(error.errno, error.strerror or str(error), str(path)))
