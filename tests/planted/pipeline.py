"""Pipeline parallelism."""

from __future__ import annotations

from typing import Any

from hpcmp import wgrad
from hpcmp.comm.mpi import MpiCommunicator
from hpcmp.models import transformer
from hpcmp.models.transformer import Stage
from hpcmp.module import Module
from hpcmp.parallel.buckets import Buckets
from hpcmp.parallel.messages import Messages
from hpcmp.parallel.pipeline import Pipeline, _Step
from hpcmp.parallel.schedules import SCHEDULES, Action, simulate
from tests.planted.machinery import Patch, after, planted, schedule


def assert_the_simulator_takes_every_schedule() -> None:
    for make in SCHEDULES.values():
        try:
            simulate(make(1), 2, 3)
        except ValueError as error:
            raise AssertionError("no right schedule") from error


@planted(check=assert_the_simulator_takes_every_schedule)
def backward_before_forward(patch: Patch) -> None:
    """The schedule takes a backward before its forward. (Run, the ranks would wait for each other for ever.)"""
    schedule(patch, "gpipe", lambda actions: sorted(actions, key=lambda a: a.kind))


@planted("pp=2,schedule=gpipe,micro=2")
def backward_of_another_microbatch(patch: Patch) -> None:
    """The backward takes the activations of the newest microbatch instead of its own."""

    class Newest(Module):
        def __init__(self, stage: Module) -> None:
            self.stage, self.saved = stage, []  # type: ignore[var-annotated]

        def forward(self, x: Any) -> tuple[Any, None]:
            y, saved = self.stage.forward(x)
            self.saved.append(saved)
            return y, None

        def backward(self, dy: Any, saved: None, wgrad: Any) -> Any:
            return self.stage.backward(dy, self.saved.pop(), wgrad)

    after(patch, Pipeline, "__init__", lambda self, *_: setattr(self, "stages", [Newest(s) for s in self.stages]))


@planted("pp=2,schedule=1f1b,micro=2")
def last_microbatch_dropped(patch: Patch) -> None:
    """The schedule leaves the last microbatch out, where there are several."""
    schedule(patch, "1f1b", lambda actions: [a for a in actions if a.microbatch == 0 or a.microbatch < max(actions)[1]])


@planted("pp=2,schedule=gpipe,micro=3")
def microbatches_crossed_on_the_way(patch: Patch) -> None:
    """A message carries the tag of the other microbatch."""
    right = MpiCommunicator.send
    patch.setattr(MpiCommunicator, "send", lambda self, x, peer, tag=0: right(self, x, peer, tag ^ 2))


@planted("pp=2,schedule=zb-h1,micro=2")
def weight_gradients_skipped(patch: Patch) -> None:
    """The schedule leaves out the weight gradients of the first of several microbatches."""
    schedule(patch, "zb-h1", lambda actions: [a for a in actions if a != Action("W", 0) or len(actions) < 4])


@planted("pp=2,schedule=zb-h1,micro=2")
def weight_gradients_added_twice(patch: Patch) -> None:
    """The queue of weight gradients is not emptied, and run again, but for the last microbatch."""
    right = wgrad.Queue.flush

    def flush(self: wgrad.Queue, run: Any = wgrad.now) -> None:
        items = list(self.items)
        right(self, run)
        if not getattr(run, "final", True):
            self.items = items
            right(self, run)

    patch.setattr(wgrad.Queue, "flush", flush)


@planted("pp=2,schedule=1f1b", tied=True)
def tied_gradient_not_summed_over_the_ends(patch: Patch) -> None:
    """The embedding and the head, on different stages, each keep their own gradient of the table that they share."""
    right = transformer.embedding_table

    def table(*args: Any) -> Any:
        made = right(*args)
        made.shared = ()
        return made

    patch.setattr(transformer, "embedding_table", table)


@planted("pp=2,schedule=1f1b", raises=RuntimeError, layers=3)
def layer_on_two_stages(patch: Patch) -> None:
    """Every stage but the first begins one layer early."""
    right = Stage.blocks

    def blocks(self: Stage, layers: int) -> range:
        found = right(self, layers)
        return range(found.start - (not self.first), found.stop)

    patch.setattr(Stage, "blocks", blocks)


@planted(check=assert_the_simulator_takes_every_schedule)
def weight_gradients_before_their_backward(patch: Patch) -> None:
    """The schedule exchanges a B and its W."""
    other = {Action("B", 0): Action("W", 0), Action("W", 0): Action("B", 0)}
    schedule(patch, "zb-h1", lambda actions: [other.get(action, action) for action in actions])


@planted("pp=2,schedule=zb-v,micro=2", layers=4)
def weight_gradients_of_one_chunk_skipped(patch: Patch) -> None:
    """The schedule leaves out the weight gradients of the first microbatch in the second chunk of each rank."""
    schedule(patch, "zb-v", lambda actions: [action for action in actions if action != Action("W", 0, 1)])


@planted("pp=2,schedule=interleaved,virtual=3,micro=2", layers=6)
def activations_of_another_chunk(patch: Patch) -> None:
    """The backwards of two chunks each take what the other saved of the same microbatch."""
    right = _Step.run

    def run(self: _Step, action: Action, *args: Any) -> Any:
        chunks = (1, 2) if self.of.pp.rank == 0 else (0, 1)  # without the embedding and the head
        one, two = ((action.microbatch, chunk) for chunk in chunks)
        if action.kind == "B" and one in self.saved and two in self.saved:
            self.saved[one], self.saved[two] = self.saved[two], self.saved[one]
        return right(self, action, *args)

    patch.setattr(_Step, "run", run)


@planted("pp=2,schedule=zb-v,micro=2", layers=4)
def activation_of_the_microbatch_before(patch: Patch) -> None:
    """A stage gets the activation that it received last instead of the one for this microbatch."""
    right = Messages.take
    last: dict[int, Any] = {}

    def take(self: Messages, action: Action) -> Any:
        x = right(self, action)
        if action.kind == "F" and x is not None:
            x, last[action.chunk] = last.get(action.chunk, x), x
        return x

    patch.setattr(Messages, "take", take)


@planted("dp=2,schedule=zb-v,micro=2", raises=RuntimeError, tied=True)
def tied_table_complete_after_one_end(patch: Patch) -> None:
    """The bucket of a table that the first and the last stage of one rank share waits for the gradient of one alone."""

    def count(self: Buckets, *_: Any, **__: Any) -> None:
        for p in self.parameters if self.mesh.size > 1 else ():
            p.uses = 1
        self.zero()

    after(patch, Buckets, "__init__", count)


@planted("pp=2,schedule=zb-v", raises=RuntimeError, tied=True)
def table_twice_on_one_rank(patch: Patch) -> None:
    """The embedding and the head, on one rank at the ends of a V, each have a table of their own."""
    right = transformer.build
    patch.setattr(transformer, "build", lambda *args, table=None, **kwargs: right(*args, **kwargs))
