"""What a run reads: the token file, the order of samples, and this rank's share of both splits."""

from __future__ import annotations

from ..comm.mesh import Mesh
from ..data.loader import Batches
from ..data.sampler import Sampler
from ..data.tokens import TokenFile
from ..errors import InputError
from .config import Config


class Inputs:
    """The batches of a configuration's data for this rank of ``mesh``.

    sampler: the order of training samples, and how many are consumed. train: the batches in that order. held_out: those
    of the other split, None if it is shorter than a sample. config: the configuration, with what follows from the data.
    Raises InputError.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        path, wanted = config.data.path, config.model.vocabulary
        if path is None:
            raise InputError("data.path is not set: name a token file, as `hpcmp data prepare` writes it")
        self.file = TokenFile(path)
        if wanted is not None and wanted < self.file.vocabulary:
            raise InputError(f"model.vocabulary = {wanted} is less than the {self.file.vocabulary} tokens of {path}")
        end = self.file.end_of_document
        if config.data.end_of_document not in (None, end):
            raise InputError(
                f"data.end_of_document = {config.data.end_of_document}: {path} closes documents with {end}"
            )
        self.config = config.resolved(vocabulary=self.file.vocabulary, end_of_document=end)
        self.tokenizer = self.file.definition
        sequence, batch, seed = config.model.sequence, config.train.batch, config.train.seed
        replicas = mesh["dp", "tp_z"]
        train, valid = self.file.split("train"), self.file.split("valid")
        self.sampler = Sampler.over(train, sequence, seed)
        self.train = Batches(train, self.sampler, batch, replicas.part(batch))
        windows = (len(valid) - 1) // sequence
        self.held_out: Batches | None = None
        if windows > 0:
            batch = min(windows, batch)
            self.held_out = Batches(valid, Sampler.over(valid, sequence, seed), batch, replicas.part(batch))
        elif config.checkpoint.keep_best:
            raise InputError("checkpoint.keep_best: data.path holds out less than a sample of model.sequence tokens")

    def close(self) -> None:
        """Close the file."""
        self.file.close()
