"""Mixture of experts."""

from __future__ import annotations

import copy
from typing import Any

from hpcmp.comm.base import Solo
from hpcmp.layers.moe import Experts, Router
from hpcmp.layers.moe.dispatch import Dispatch
from hpcmp.parallel.bucket import Bucket
from tests.planted.machinery import Patch, after, not_shared, planted

MOE: dict[str, Any] = {"experts": 5, "expert_ffn": 7, "balance_loss": 2.0, "z_loss": 0.5}


def alone(router: Any, *axes: str) -> Any:
    """A router's view of its ranks, with nobody else along these axes."""
    parallel = copy.copy(router.parallel)
    for axis in axes:
        setattr(parallel, axis, Solo())
    return parallel


def experts_summed_over(patch: Patch, group: Any) -> None:
    def break_it(self: Any, parameters: Any, mesh: Any, **_: Any) -> None:
        if parameters[0].replicas == ("edp",):
            self.copies = group(mesh)

    after(patch, Bucket, "__init__", break_it)


@planted("dp=4,ep=2", **MOE)
def expert_gradient_not_summed_over_copies(patch: Patch) -> None:
    """The gradient of an expert is that of the tokens of one of the ranks that hold it."""
    experts_summed_over(patch, lambda mesh: Solo())


@planted("dp=4,ep=2", **MOE | {"experts": 4})
def expert_gradient_summed_over_all_replicas(patch: Patch) -> None:
    """The gradients of experts are summed as other weights' are, over ranks that hold other experts."""
    experts_summed_over(patch, lambda mesh: mesh["dp"])


@planted("dp=2,ep=2", **MOE)
def rows_returned_in_another_order(patch: Patch) -> None:
    """What experts made goes back in the order of the permutation, not of its inverse."""
    after(patch, Dispatch, "__init__", lambda self, *_: setattr(self, "_ungroup", self._regroup))


@planted("dp=2,ep=2", **MOE)
def weights_of_two_choices_swapped(patch: Patch) -> None:
    """What came over the ranks from a token's first choice gets the weight of its second."""

    def break_it(self: Any, *_: Any) -> None:
        if self.ep.size > 1:
            self._place = self._place.reshape(self.choices)[:, ::-1].reshape(-1)

    after(patch, Dispatch, "__init__", break_it)


@planted("dp=2,ep=2", **MOE)
def rows_grouped_by_rank_instead_of_expert(patch: Patch) -> None:
    """A rank's rows go to its experts in the order of the ranks that they came from, not of the experts."""

    def break_it(self: Any, *_: Any) -> None:
        self._regroup = self._ungroup = None

    after(patch, Dispatch, "__init__", break_it)


@planted("cp=2,ep=2", **MOE)
def balance_of_a_rank_instead_of_a_sequence(patch: Patch) -> None:
    """With context parallelism the fractions of the balance loss are those of a rank's own positions."""

    def fraction(self: Any, chosen: Any) -> Any:
        member = (chosen[..., None] == range(self.experts)).any(-2)
        return member.sum(0) / (len(chosen) * self.per_token)

    patch.setattr(Router, "_fraction", fraction)


@planted("cp=2,ep=2", **MOE, capacity=0.6)
def capacity_of_a_ranks_own_positions(patch: Patch) -> None:
    """With context parallelism a token's place among its expert's is counted over the positions of one rank."""
    right = Router._within

    def within(self: Any, chosen: Any) -> Any:
        kept, self.parallel = self.parallel, alone(self, "cp")
        try:
            return right(self, chosen)
        finally:
            self.parallel = kept

    patch.setattr(Router, "_within", within)


@planted("tp=2,sp=1", **MOE)
def router_losses_on_every_rank_of_tp(patch: Patch) -> None:
    """Each rank of tp adds the gradient of the router's losses to what is then summed."""
    after(patch, Router, "__init__", lambda self, *_, **__: setattr(self, "parallel", alone(self, "tp")))


@planted("tp=2,sp=0", **MOE)
def router_gradient_not_summed_over_tp(patch: Patch) -> None:
    """The gradient of the router is that of a rank's part of the experts' columns."""
    after(patch, Router, "__init__", not_shared("weight"))


@planted("tp=2,sp=0", **MOE)
def expert_bias_added_by_every_rank(patch: Patch) -> None:
    """An expert's last bias is added before the sum over tp by all. (It starts at zero: the second step shows it.)"""
    after(patch, Experts, "__init__", lambda self, *_, **__: setattr(self, "first", True))
