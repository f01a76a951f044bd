"""Dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmp import random
from hpcmp.layers import attention, dropout
from hpcmp.layers.attention import CausalAttention
from hpcmp.models import transformer
from hpcmp.module import Recompute
from tests.planted.machinery import Patch, in_place, planted
from tests.training import test_engine


@planted("tp=2,sp=1", dropout=0.1)
def dropout_restarts_on_every_shard(patch: Patch) -> None:
    """Every sequence shard draws the mask of the first positions."""
    in_place(patch, dropout.Dropout, lambda x: np.arange(len(x)))


@planted("dp=2", dropout=0.1)
def dropout_by_local_sample(patch: Patch) -> None:
    """The mask follows a sample's place in its microbatch, not in the global batch."""
    patch.setattr(dropout, "samples", lambda cursor, place, batch, xp: xp.arange(batch))


@planted("tp=2,sp=0", dropout=0.1)
def attention_dropout_by_local_head(patch: Patch) -> None:
    """Every rank draws the masks of the first heads."""
    right = dropout.attention_mask

    def attention_mask(*args: Any) -> Any:
        *others, heads, like = args
        return right(*others, slice(0, heads.stop - heads.start), like)

    patch.setattr(attention, "attention_mask", attention_mask)


def elsewhere(right: Any, cursor_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """A method that runs at the place of another step."""

    def call(self: Any, *args: Any) -> Any:
        cursor = cursor_of(self)
        place = cursor.place
        cursor.place = type(place)(place.step + 1, place.samples, place.length, place.training)
        try:
            return right(self, *args)
        finally:
            cursor.place = place

    return call


@planted("recompute=full", dropout=0.1)
def recomputed_with_other_masks(patch: Patch) -> None:
    """The forward that runs again in the backward draws the masks of another step."""
    moved = elsewhere(Recompute.backward, lambda self: self.inner.layers["attention"].layers["core"].cursor)
    patch.setattr(Recompute, "backward", moved)


@planted("pp=2,schedule=1f1b", dropout=0.1)
def dropout_by_local_layer(patch: Patch) -> None:
    """Every stage counts its layers from 0 in the keys of their masks."""
    right = transformer.build
    local = iter(())

    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal local
        local = itertools.count()  # type: ignore[assignment]
        return right(*args, **kwargs)

    block = transformer.block
    patch.setattr(transformer, "build", build)
    patch.setattr(
        transformer, "block", lambda a, parallel, name, **more: block(a, parallel, f"blocks/{next(local)}", **more)
    )


@planted(check=test_engine.assert_every_step_has_masks_of_its_own)
def same_masks_in_every_step(patch: Patch) -> None:
    """The step is not part of the key of a dropout mask."""
    right = random.key
    patch.setattr(random, "key", lambda seed, *names: right(seed, *(n for n in names if isinstance(n, str))))


@planted(check=test_engine.assert_the_gradient_is_that_of_the_mean_loss)
def attention_backward_with_other_masks(patch: Patch) -> None:
    """The backward of attention draws masks of its own."""
    right = CausalAttention.backward

    def backward(self: Any, dy: Any, saved: Any, wgrad: Any) -> Any:
        *kept, place = saved
        other = type(place)(place.step + 1, place.samples, place.length, place.training)
        return right(self, dy, (*kept, other), wgrad)

    patch.setattr(CausalAttention, "backward", backward)
