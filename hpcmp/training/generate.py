"""Text from a checkpoint: plain sampling, one token at a time, tensor parallel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import random
from ..arrays import dtype_of, module_for, to_host, wide
from ..checkpoint import Checkpoint, Slab, open_checkpoint
from ..cursor import Cursor, Place
from ..data.tokenizer import Tokenizer, tokenizer_from
from ..errors import CheckpointError
from ..layers.context import documents
from ..layers.parallel import ModelParallel
from ..models.transformer import build
from .engine import architecture, make_mesh
from .state import config_of

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: p proportional to exp(logit / temperature) over the ``top_k`` likeliest tokens (all
    if None) that together have at least the probability ``top_p``. Temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


class Generator:
    """The model of a checkpoint, each rank of ``comm`` holding its tensor-parallel share, whatever layout wrote it.

    ``tokenizer`` is the one that the checkpoint carries. Every rank draws the same tokens: the random numbers are a
    function of the seed and the token's place.
    """

    def __init__(self, path: str, comm: MPI.Intracomm | None = None, *, device: str = "cpu") -> None:
        self.mesh = make_mesh(comm, device, tp=1 if comm is None else comm.size)
        self.checkpoint: Checkpoint = open_checkpoint(path, self.mesh)
        config = config_of(self.checkpoint)
        self.architecture, self.data, self.xp = architecture(config), config.data, module_for(device)
        self.cursor = Cursor()
        self.parallel = ModelParallel(self.mesh["tp"], self.cursor)
        self.model = build(self.architecture, self.parallel)
        parameters = self.model.initialise(0, wide(dtype_of(config.train.dtype)), self.xp)
        self.checkpoint.load([Slab(f"model/{p.name}", p.shape, p.index, p.data) for p in parameters])
        self.tokenizer = _tokenizer(self.checkpoint)

    def tokens(self, prompt: Sequence[int], count: int, sampling: Sampling) -> Iterator[int]:
        """Up to ``count`` tokens after ``prompt``; ends at the end of a document. The model sees the last
        ``sequence`` tokens, of which an end of document keeps others apart as in training; an empty prompt begins a
        document. Collective, token by token."""
        text = list(prompt) or [self.tokenizer.end_of_document]
        for place in range(count):
            token = choose(self.logits(text[-self.architecture.sequence :]), sampling, place)
            text.append(token)
            if token == self.tokenizer.end_of_document:
                return
            yield token

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        """The scores of every token of the vocabulary after ``tokens``; (vocabulary,), the same on every rank."""
        x = np.asarray(tokens, np.int64)[:, None]
        self.cursor.place = Place(length=len(tokens), training=False)
        if (begins := self.data.begins(x)) is not None:
            apart = documents(self.parallel, begins, self.xp)
            self.cursor.place = dataclasses.replace(self.cursor.place, documents=apart)
        share = self.model.forward(self.xp.asarray(x))[0][-1, 0]
        return to_host(self.mesh["tp"].all_gather(share, 0, self.architecture.vocabulary).wait())

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.mesh.__exit__(*exc)


def choose(logits: NDArray[Any], sampling: Sampling, place: int) -> int:
    """The token drawn from ``logits`` at a place; a pure function."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    scores = logits[order].astype(np.float64) / sampling.temperature
    p = np.exp(scores - scores[0])
    p /= p.sum()
    reached = np.cumsum(p)
    last = min(int(np.searchsorted(reached, sampling.top_p)), len(p) - 1)
    word = random.bits(random.key(sampling.seed, "generate"), np.array(place), 0, slice(0, 1))[0]
    target = (float(word) + 0.5) / 2**32 * reached[last]
    return int(order[min(int(np.searchsorted(reached, target)), last)])


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if "tokenizer" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} holds no tokenizer")
    return tokenizer_from(checkpoint.read("tokenizer").tobytes().decode(), f"the tokenizer in {checkpoint.path}")
