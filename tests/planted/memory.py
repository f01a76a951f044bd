"""Recomputation and offload"""

from __future__ import annotations

from typing import Any

from hpcmp.module import Module
from hpcmp.offload import Handle, Offload, Saved
from hpcmp.recompute import RecomputeInput
from tests.planted.dropout import elsewhere
from tests.planted.machinery import Patch, planted
from tests.test_offload import assert_offloaded_activations_come_back_right


@planted("recompute=attention", dropout=0.1)
def attention_recomputed_with_other_masks(patch: Patch) -> None:
    """The core attention that runs again in the backward draws the masks of another step."""
    patch.setattr(RecomputeInput, "backward", elsewhere(RecomputeInput.backward, lambda self: cursor(self.f)))


def cursor(module: Module) -> Any:
    """That of the first layer that has one."""
    layers = (vars(layer) for layer in module.layers.values())  # type: ignore[attr-defined]
    return next(v for held in layers for v in (held.get("cursor"), getattr(held.get("parallel"), "cursor", None)) if v)


@planted("pp=2,micro=2,offload=activations")
def offload_has_one_slot_a_block(patch: Patch) -> None:
    """A block's activations wait where those of the microbatch before did, which are still needed."""
    forward, backward = Offload.forward, Offload.backward

    def overwrite(self: Any, x: Any) -> Any:
        y, saved = forward(self, x)
        self.slot = saved.tree, saved.handles
        return y, saved

    def wrong(self: Any, dy: Any, saved: Any, wgrad: Any) -> Any:
        saved.tree, saved.handles = self.slot
        return backward(self, dy, saved, wgrad)

    patch.setattr(Offload, "forward", overwrite)
    patch.setattr(Offload, "backward", wrong)


@planted(check=assert_offloaded_activations_come_back_right)
def offloaded_activations_used_before_they_are_there(patch: Patch) -> None:
    """The backward does not wait for the copies from the host."""
    right = Saved.take

    def take(self: Any) -> Any:
        patch.setattr(Handle, "fetch", lambda handle: Early(fetch(handle)))
        try:
            return right(self)
        finally:
            patch.setattr(Handle, "fetch", fetch)

    fetch = Handle.fetch
    patch.setattr(Saved, "take", take)


class Early:
    """A copy under way that is taken for one that is over."""

    def __init__(self, pending: Any) -> None:
        self.pending = pending

    def wait(self) -> Any:
        return self.pending.result


@planted("recompute=activations,micro=2")
def recomputed_from_the_last_microbatch(patch: Patch) -> None:
    """What a norm or an activation is made again from is kept once a layer, not once a microbatch."""
    forward, onto, backward = RecomputeInput.forward, RecomputeInput.forward_onto, RecomputeInput.backward

    def keep(right: Any) -> Any:
        def run(self: Any, x: Any, *given: Any) -> Any:
            self.kept = getattr(self, "kept", x)  # that of the first microbatch, for ever
            return right(self, x, *given)

        return run

    patch.setattr(RecomputeInput, "forward", keep(forward))
    patch.setattr(RecomputeInput, "forward_onto", keep(onto))
    patch.setattr(RecomputeInput, "backward", lambda self, dy, saved, wgrad: backward(self, dy, self.kept, wgrad))
