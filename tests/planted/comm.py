"""Ranks on nodes, sums over nodes and within one, and the groups of a mesh."""

from __future__ import annotations

from typing import Any

from hpcmp.comm import window
from hpcmp.comm.base import Pending
from hpcmp.comm.hierarchical import LAST, _Sum
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.staging import PUT, Staging
from hpcmp.comm.topology import Topology
from tests.comm.test_topology import assert_tensor_parallel_groups_stay_on_a_node
from tests.planted.machinery import Patch, planted

NODES = "0,0,1,1"  # of the ranks, for HPCMP_NODES


@planted(check=assert_tensor_parallel_groups_stay_on_a_node, ranks=4)
def nodes_counted_by_rank(patch: Patch) -> None:
    """Ranks are taken to share a node with the ranks next to them, where the launcher has dealt them out in turn."""
    patch.setattr(Topology, "order", property(lambda self: list(range(len(self.nodes)))))


@planted("dp=4", hierarchical="yes")
def part_of_a_sum_over_nodes_not_gathered(patch: Patch) -> None:
    """After a sum over nodes a rank keeps the part that it was given, and its own addends in place of the others."""
    patch.setenv("HPCMP_NODES", NODES)
    right_start, right_next = _Sum.__init__, _Sum.next

    def start(self: Any, group: Any, x: Any) -> None:
        self.x = x
        right_start(self, group, x)

    def next(self: Any) -> None:
        if self.phase < LAST - 1:
            right_next(self)
            return
        part, self.phase = self.pending.wait(), LAST
        y, first = self.x.copy(), sum(self.rows[: self.group.inside.rank])
        y[first : first + len(part)] = part
        self.pending = Pending(y)

    patch.setattr(_Sum, "__init__", start)
    patch.setattr(_Sum, "next", next)


@planted("dp=4", hierarchical="yes")
def sum_of_a_node_counted_twice(patch: Patch) -> None:
    """Of the nodes that a sum goes over, the first one adds its part before the sum and after it."""
    patch.setenv("HPCMP_NODES", NODES)
    right = _Sum.next

    def next(self: Any) -> None:
        if self.phase == 1 and self.group.across.rank == 0:
            self.pending = Pending(2 * self.pending.wait())
        right(self)

    patch.setattr(_Sum, "next", next)


@planted("dp=2", shared_memory="yes")
def neighbours_buffer_read_before_it_is_written(patch: Patch) -> None:
    """In shared memory a rank sums what lies in its neighbour's buffer, without a look at the neighbour's counter."""
    right = Staging._may
    patch.setattr(Staging, "_may", lambda self, step: step != PUT or right(self, step))


@planted("dp=2", shared_memory="yes", window_mb=0.001)
def last_piece_of_a_message_left_out(patch: Patch) -> None:
    """A message through shared memory has as many pieces as it fills, and one that is not full is not sent."""
    right = window.Transfer

    def transfer(staging: Any, dtype: Any, pieces: int, *steps: Any, **named: Any) -> Any:
        return right(staging, dtype, max(1, pieces - 1), *steps, **named)

    patch.setattr(window, "Transfer", transfer)


@planted("dp=4,ep=2", raises=RuntimeError, experts=4)
def experts_summed_over_the_other_fold(patch: Patch) -> None:
    """Ranks that hold copies of the same experts are found as if ep varied slowest, and not fastest, of edp x ep."""
    right = Mesh.place

    def place(self: Mesh, rank: Any) -> dict[str, Any]:
        found = right(self, rank)
        data = found["edp"] * self.parts["ep"] + found["ep"]
        each = self.shape["dp"] * self.shape["cp"] * self.shape["tp_z"] // self.parts["ep"]
        return found | {"ep": data // each}

    patch.setattr(Mesh, "place", place)
