"""What a planted error is, how one is entered in the table, and what several of them are made with."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import tests.planted
from hpcmp.collectives import Collective
from hpcmp.comm.base import Pending
from hpcmp.parallel.schedules import SCHEDULES, Schedule
from hpcmp.training.config import Config, Layout, parse_layout
from tests.layouts import small, spread

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


@dataclass(frozen=True)
class Planted:
    """An error: how it is planted, the configuration that shows it, and what notices: ``verify`` by its numbers, by
    raising ``raises`` on every rank, or the function ``check`` by an AssertionError (on every rank).

    values: keys of ``tests.layouts.small``. ranks: exactly how many show it; 0 for a check without MPI.
    """

    name: str
    what: str
    module: str
    plant: Plant
    layout: str
    values: tuple[tuple[str, Any], ...]
    raises: type[Exception] | None
    check: Callable[..., None] | None
    ranks: int

    @property
    def config(self) -> Config:
        """What ``verify`` runs."""
        return spread(small(**dict(self.values)), self.layout)

    @property
    def row(self) -> str:
        """Its row of the table in docs/verification.md, but for what was measured."""
        setting = "".join(f", {key} = {value}" for key, value in self.values)
        shown = f"`{self.layout}`{setting}"
        if self.check:
            shown = self.check.__name__.removeprefix("assert_").replace("_", " ")
        return f"| {self.name.replace('_', ' ')} | {self.what} | {shown} |"


PLANTED: dict[str, Planted] = {}


def planted(
    layout: str = "",
    *,
    raises: type[Exception] | None = None,
    check: Callable[..., None] | None = None,
    ranks: int = 0,
    **values: Any,
) -> Callable[[Plant], Plant]:
    """Enter a function that plants an error in the table, under its name and with its docstring.

    Noticed by ``verify`` on ``layout``, or by ``check()``, or with ``ranks`` by ``check(world)`` on so many ranks.
    """

    def enter(plant: Plant) -> Plant:
        name, what = plant.__name__, " ".join((plant.__doc__ or "").split())
        assert name not in PLANTED, f"two planted errors are called {name}"
        needed = ranks if check else parse_layout(layout, Layout()).ranks
        module = plant.__module__.rpartition(".")[2]
        PLANTED[name] = Planted(name, what, module, plant, layout, tuple(values.items()), raises, check, needed)
        return plant

    return enter


def topics() -> dict[str, list[Planted]]:
    """Every planted error, by the topic of the module that it is in."""
    found: dict[str, list[Planted]] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(tests.planted.__path__)):
        if name not in ("machinery", "__main__"):
            module = importlib.import_module(f"tests.planted.{name}")
            title = (module.__doc__ or name).partition("\n")[0].rstrip(".")
            found[title] = [p for p in PLANTED.values() if p.module == name]
    return found


def after(patch: Patch, owner: type, method: str, then: Callable[..., Any]) -> None:
    """``owner.method`` as it is, then ``then`` with the same arguments."""
    right = getattr(owner, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return result

    patch.setattr(owner, method, call)


class Wrong(Collective):
    """A collective of which the forward, or the adjoint, is another function of the local array."""

    layout = ""

    def __init__(self, right: Collective, forward: Any = None, adjoint: Any = None) -> None:
        super().__init__(right.comm, right.axis, right.total)
        self.right, self.does, self.adjoint = right, forward, adjoint

    def start(self, x: Any) -> Pending:
        return Pending(self.does(x)) if self.does else self.right.start(x)

    @property
    def T(self) -> Collective:
        return Wrong(self.right.T, self.adjoint) if self.adjoint else self.right.T


def same(x: Any) -> Any:
    """The identity."""
    return x


def not_shared(*names: str) -> Callable[..., None]:
    """For ``after(patch, layer, "__init__", ...)``: the gradients of these parameters owe no sum over tp."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        for name in names:
            getattr(self, name).shared = ()

    return break_it


def in_place(patch: Patch, kind: type, positions: Callable[[Any], Any]) -> None:
    """``kind.forward`` with other positions, a function of its input."""
    right = kind.forward  # type: ignore[attr-defined]

    def forward(self: Any, x: Any) -> Any:
        parallel = self.parallel
        self.parallel = SimpleNamespace(cursor=parallel.cursor, positions=lambda: positions(x))
        try:
            return right(self, x)
        finally:
            self.parallel = parallel

    patch.setattr(kind, "forward", forward)


def schedule(patch: Patch, name: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """The schedule ``name`` with every rank's list of actions changed."""
    right = SCHEDULES[name]

    def make(virtual: int) -> Schedule:
        made = right(virtual)
        return dataclasses.replace(made, order=lambda *sizes: change(list(made(*sizes))))

    patch.setitem(SCHEDULES, name, make)
