"""The files of a run: its data, its directories and who uses them, its copies on the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...checkpoint import lock
from ...checkpoint.directory import scan
from ...checkpoint.manifest import Manifest
from ...checkpoint.tier import local_folder
from ...data.tokens import TokenFile
from ...errors import InputError
from ...training.config import Config
from ...training.diagnosis import diagnose
from ...training.engine import architecture
from ...training.limits import BYTES
from . import storage
from .base import Check, Ranks, Subject, Trouble, attempt, some, wrong

_ANSWER = 12.0  # seconds in which it is known whether a lock's owner lives: a scheduler has 10


@dataclass(frozen=True)
class Seen:
    """What a rank sees of a run's files; texts say what is wrong, "" if nothing. data: the digests of its tokens;
    vocabulary: theirs; local: bytes that are left in checkpoint.local, None without it."""

    host: str
    data: tuple[str, ...] = ()
    data_wrong: str = ""
    vocabulary: int = 0
    local: int | None = None
    local_wrong: str = ""


class Files:
    """The files of the run of ``config`` on ``ranks``."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config.resolved(), ranks

    @property
    def subject(self) -> Subject:
        """What every rank looks at, and what is judged of it."""
        return Subject("files of the run", self.look, (self.data_check, self.local_check))

    def look(self, ranks: Ranks) -> Seen:
        """This rank's."""
        data, vocabulary, data_wrong = tokens(self.config.data.path)
        local, local_wrong = None, ""
        if self.config.checkpoint.local:
            try:
                folder = local_folder(self.config.checkpoint.local, ranks.topology.nodes[ranks.rank])
                found = storage.probe(storage.existing(folder))
                local, local_wrong = found.free, f"{folder} is not writable: {found.why}" if found.why else ""
            except InputError as error:
                local_wrong = str(error)
        return Seen(ranks.host, data, data_wrong, vocabulary, local, local_wrong)

    def data_check(self, seen: list[Seen]) -> Check:
        """Whether every host reads the same tokens, and the model knows all of them."""
        path, wanted = self.config.data.path, self.config.model.vocabulary
        shared = "`hpcmp data prepare` writes one; put it on a file system that all hosts share"
        if bad := [each for each in seen if each.data_wrong]:
            return Check("data.path", "problem", f"{bad[0].data_wrong} ({some(each.host for each in bad)})", shared)
        if other := [each for each in seen if each.data != seen[0].data]:
            value = f"{path} is another file on {some(each.host for each in other)} than on {seen[0].host}"
            return Check("data.path", "problem", value, "put it on a file system that all hosts share, or copy it anew")
        if wanted is not None and wanted < seen[0].vocabulary:
            value = f"model.vocabulary = {wanted} is less than the {seen[0].vocabulary} tokens of {path}"
            return Check("data.path", "problem", value, f"set model.vocabulary={seen[0].vocabulary}, or leave it out")
        return Check("data.path", "ok", f"{path}, the same on every host")

    def local_check(self, seen: list[Seen]) -> Check | list[Check]:
        """Whether checkpoint.local can be written, and has room for four times what a node's ranks own."""
        if bad := [each for each in seen if each.local_wrong]:
            advice = (
                "set checkpoint.local to a folder on the nodes' own disks or in /dev/shm; variables must be set there"
            )
            value = f"{bad[0].local_wrong} ({some(each.host for each in bad)})"
            return Check("checkpoint.local", "problem", value, advice)
        rooms = [(each.local, each.host) for each in seen if each.local is not None]
        needed = 4 * self.size(seen[0].vocabulary) // len(self.ranks.topology.sizes)
        if not rooms:
            return []
        free, host = min(rooms)
        value = f"{needed / 1e9:.3f} GB needed on a node, {free / 1e9:.1f} GB free on {host}"
        if free < needed:
            return Check("checkpoint.local", "problem", value, "free space there, or leave checkpoint.local out")
        return Check("checkpoint.local", "ok", value)

    def size(self, vocabulary: int) -> int:
        """The bytes of a checkpoint; 0 if nobody knows."""
        vocabulary = self.config.model.vocabulary or vocabulary
        return BYTES * architecture(self.config.resolved(vocabulary=vocabulary)).parameters if vocabulary else 0

    def directory_checks(self) -> list[Check]:
        """The directories of the run: writable, shared, roomy, in use; what its last start left. Collective."""
        ranks, checkpoint = self.ranks, self.config.checkpoint
        run, folder = Path(str(self.config.run.directory)), Path(str(checkpoint.directory))
        state = ranks.first(attempt(partial(self._state, run, folder), _ANSWER) if ranks.rank == 0 else None)
        apart, kept, size, lines = (True, 0, 0, []) if state is None or isinstance(state, Trouble) else state
        needed = max(1, checkpoint.keep + 1 - kept) * size if size else storage.LITTLE
        if apart:
            lines = [*lines, *storage.directory_checks(ranks, "run.directory", run, 1 << 20, firm=True)]
        found = storage.directory_checks(ranks, "checkpoint.directory", folder, needed, firm=True)
        in_use = [wrong("run.directory", state.why)] if isinstance(state, Trouble) and state.wrong else []
        return [*found, *in_use, *lines]

    def _state(self, run: Path, folder: Path) -> tuple[bool, int, int, list[Check]]:
        """Whether the two lie in different folders, as far as those are there; how many checkpoints are there, the
        bytes of one, and what is to be said of them and of the last start. Raises InUseError if another run has them.
        """
        for place in (run, folder):
            if place.exists():
                lock.check(place)
        found = scan(folder) if folder.is_dir() else []
        broken = [str(entry) for _, entry in found if not isinstance(entry, Manifest)]
        lines = []
        if broken:
            advice = f"a run passes over it, and goes on from the one before: `hpcmp checkpoint verify {folder}`"
            lines.append(Check("checkpoints", "warn", broken[0], advice))
        if hung := diagnose(run):
            advice = f"`hpcmp report {run}` says where each rank was; leave out a host that does not answer"
            lines.append(Check("last start", "warn", f"it hung: {hung[0]}", advice))
        apart = storage.existing(run) != storage.existing(folder)
        return apart, len(found) - len(broken), self.size(tokens(self.config.data.path)[1]), lines


def tokens(path: str | None) -> tuple[tuple[str, ...], int, str]:
    """The digests of a token file, its vocabulary (0 if nobody knows), and what is wrong with it ("" if nothing)."""
    if path is None:
        return (), 0, "data.path is not set"
    try:
        with TokenFile(path) as file:
            return tuple(file.split(name).digest for name in ("train", "valid")), file.vocabulary, ""
    except InputError as error:
        return (), 0, str(error)
