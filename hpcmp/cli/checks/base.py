"""What every check of ``hpcmp doctor`` is made of: what a rank sees, what all of them saw, and a line that says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from ...comm.topology import Topology
from ...errors import InputError, reason

T = TypeVar("T")

SECONDS = 10.0  # in which there should be an answer: a dead file server has none, ever
LOOK = 30.0  # in which a rank should have seen a subject: it may import what a busy file server has
_REPORT = "the other lines hold all the same; send this one, with `hpcmp doctor --json`, to those who keep hpcmp"
_WAITING = "see what it waits for: `dmesg | tail`, `df`, and whether every file server answers"


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` says what to do about a warning or a problem."""

    name: str
    status: Literal["ok", "warn", "problem"]
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Ranks:
    """The ranks that are examined together: their communicator (None: this process alone), and their nodes."""

    comm: Any = None
    topology: Topology = Topology()

    @property
    def rank(self) -> int:
        """This one's number."""
        return self.comm.rank if self.comm else 0

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [self.topology.names[node] for node in self.topology.nodes]

    @property
    def host(self) -> str:
        """This rank's."""
        return self.hosts[self.rank]

    @property
    def leaders(self) -> list[int]:
        """The first rank of each host."""
        nodes = self.topology.nodes
        return [nodes.index(node) for node in range(len(self.topology.sizes))]

    @property
    def here(self) -> int:
        """How many ranks are on this rank's host."""
        return self.topology.sizes[self.topology.nodes[self.rank]]

    def all(self, value: T) -> list[T]:
        """What every rank passes, in their order. Collective."""
        return list(self.comm.allgather(value)) if self.comm else [value]

    def first(self, value: T) -> T:
        """What rank 0 passes. Collective."""
        return self.comm.bcast(value) if self.comm else value


class Trouble(NamedTuple):
    """Why a rank could not look at something; ``wrong``: since what the user has set is wrong."""

    why: str
    wrong: bool = False


def attempt(look: Callable[[], T], seconds: float | None = None) -> T | Trouble:
    """What ``look`` returns; Trouble if it raises, or has not returned in ``seconds`` (SECONDS): its thread is left
    where it is."""
    seconds = SECONDS if seconds is None else seconds
    found: list[T | Trouble] = []

    def body() -> None:
        try:
            found.append(look())
        except Exception as error:
            found.append(Trouble(reason(error), isinstance(error, InputError)))

    thread = threading.Thread(target=body, name="hpcmp-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Trouble(f"no answer in {seconds:g} s")


class Subject(NamedTuple):
    """A subject of checks: what each rank looks at, without a message; and the checks of what all ranks saw, each a
    function of a list with an item for each rank, the same on every rank."""

    name: str
    look: Callable[[Ranks], Any]
    checks: tuple[Callable[[list[Any]], Check | list[Check]], ...]


def examine(ranks: Ranks, subject: Subject) -> list[Check]:
    """The lines of a subject. What cannot be looked at, or judged, is a line that names itself. Collective."""
    seen = ranks.all(attempt(partial(subject.look, ranks), LOOK))
    lines = troubles(subject.name, list(zip(ranks.hosts, seen, strict=True)))
    found = [each for each in seen if not isinstance(each, Trouble)]
    for check in subject.checks if found else ():
        lines += guarded(check, found)
    return lines


def troubles(name: str, seen: Iterable[tuple[str, Any]]) -> list[Check]:
    """A line for each kind of trouble in what was seen on hosts."""
    hosts: dict[Trouble, set[str]] = {}
    for host, each in seen:
        if isinstance(each, Trouble):
            hosts.setdefault(each, set()).add(host)
    lines = []
    for trouble, where in hosts.items():
        if trouble.wrong:
            lines.append(wrong(name, trouble.why))
        else:
            advice = _WAITING if trouble.why.startswith("no answer") else _REPORT
            lines.append(Check(name, "warn", f"cannot be looked at on {some(where)}: {trouble.why}", advice))
    return lines


def guarded(check: Callable[..., Check | list[Check]], *args: Any) -> list[Check]:
    """The lines of a check; one that names the check if it raises, a problem where that is the user's to mend."""
    name = check.__name__.removesuffix("_check").replace("_", " ")
    try:
        found = check(*args)
    except InputError as error:
        return [wrong(name, str(error))]
    except Exception as error:
        return [Check(name, "warn", f"this check failed: {reason(error)}", _REPORT)]
    return found if isinstance(found, list) else [found]


def wrong(name: str, message: str) -> Check:
    """What the user has to mend, of an error's message: what is wrong, a colon, and what would be right."""
    value, _, advice = message.partition(": ")
    return Check(name, "problem", value, advice or "correct it as this line says")


def some(hosts: Iterable[str]) -> str:
    """Names of hosts: three at most, and how many more there are."""
    names = sorted(set(hosts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def by_host(ranks: Iterable[T]) -> dict[str, list[T]]:
    """What ranks saw, host by host; each has a ``host``."""
    found: dict[str, list[T]] = {}
    for each in ranks:
        found.setdefault(each.host, []).append(each)  # type: ignore[attr-defined]
    return found
