"""Documents kept apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hpcmp.documents import First
from hpcmp.layers.context import Ring
from hpcmp.training import engine
from tests.models.test_documents import assert_documents_are_computed_as_if_alone
from tests.planted.machinery import Patch, planted


@planted("cp=2", documents="apart", sequence=13)
def documents_of_other_blocks_are_seen(patch: Patch) -> None:
    """Documents are kept apart within a rank's own block; of the blocks that come round a query sees every key."""
    right = Ring.first

    def first(self: Ring, peer: int, begins: Any) -> Any:
        found = right(self, peer, begins)
        return found if peer == self.comm.rank else found * 0

    patch.setattr(Ring, "first", first)


@planted("cp=2", documents="apart", sequence=13)
def documents_begin_where_a_rank_does(patch: Patch) -> None:
    """The learnt positions of a document that began on another rank are counted from the rank's first row."""
    right = engine.documents

    def documents(*given: Any) -> Any:
        found = right(*given)
        return replace(found, positions=np.minimum(found.positions, np.arange(len(found.positions))[:, None]))

    patch.setattr(engine, "documents", documents)


@planted("micro=2", documents="apart")
def documents_of_the_first_microbatch(patch: Patch) -> None:
    """Every microbatch is cut into the documents of the first one."""
    right = engine.documents
    patch.setattr(engine, "documents", lambda p, begins, xp: right(p, begins.base[: len(begins)], xp))


@planted(check=assert_documents_are_computed_as_if_alone)
def a_token_of_the_document_before_is_seen(patch: Patch) -> None:
    """A query sees its own document and the token that closes the one before it."""
    right = First.of
    patch.setattr(First, "of", classmethod(lambda cls, host, xp: right(np.maximum(host - 1, 0), xp)))
