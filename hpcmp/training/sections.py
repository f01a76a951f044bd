"""The sections of a configuration, a frozen dataclass each: keys, types, ranges, defaults, and rules within a section.

``Layout``, the section with the most rules, is in layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..documents import beginnings
from ..errors import InputError
from .schema import COUNT, POSITIVE, SHARE, SIZE, Section, derived, fill, option


@dataclass(frozen=True)
class Model(Section):
    """The transformer. `gpt`: learnt positions, LayerNorm, GELU. `llama`: rotary positions, RMSNorm, SwiGLU."""

    style: Literal["gpt", "llama"] = option("gpt", "architecture")
    layers: int = option(4, "transformer blocks", SIZE)
    hidden: int = option(128, "width of the residual stream", SIZE)
    heads: int = option(4, "attention heads", SIZE)
    kv_heads: int = derived("heads", "heads of keys and values; must divide heads", SIZE)
    head_size: int = derived("hidden / heads", "width of a head; even for `llama`", SIZE)
    ffn: int = derived("4 hidden; `llama`: round(8 hidden / 3)", "inner width of the MLP", SIZE)
    vocabulary: int = derived("of the data file", "number of tokens", SIZE)
    sequence: int = option(256, "longest sequence, and the length of a training sample, in tokens", SIZE)
    dropout: float = option(0.0, "probability that an activation is dropped", SHARE)
    tied: bool = derived("true; `llama`: false", "input embedding and output projection are one matrix")
    norm_epsilon: float = option(1e-5, "added to the variance in norms", POSITIVE)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", POSITIVE)
    init_std: float = option(0.02, "standard deviation of the initial weights", POSITIVE)
    bias: bool = derived("true; `llama`: false", "linear layers add a bias")
    experts: int = option(0, "experts of a mixture-of-experts MLP; 0: an ordinary MLP", COUNT)
    experts_every: int = option(1, "one block of so many, the last of them, has experts", SIZE)
    experts_per_token: int = option(2, "experts that each token goes to", SIZE)
    expert_ffn: int = derived("ffn", "inner width of an expert", SIZE)
    shared_experts: int = option(0, "experts that every token goes to besides", COUNT)
    router: Literal["softmax", "sigmoid"] = option("softmax", "how scores of experts become weights")
    capacity: float | None = option(
        None, "most tokens of a sequence for an expert, in units of an even share; none: no token is dropped", POSITIVE
    )
    balance_loss: float = option(0.01, "weight of the loss that balances experts", COUNT)
    z_loss: float = option(0.001, "weight of the loss that keeps the router's scores small", COUNT)

    def resolved(self) -> Model:
        """With every derived value but ``vocabulary`` filled in, and relations checked."""
        if self.head_size is None and self.hidden % self.heads:
            raise InputError(
                f"model.head_size: model.heads = {self.heads} does not divide model.hidden = {self.hidden}; "
                "change one of them, or give model.head_size"
            )
        llama = self.style == "llama"
        model: Model = fill(
            self,
            kv_heads=self.heads,
            head_size=self.hidden // self.heads,
            ffn=round(8 * self.hidden / 3) if llama else 4 * self.hidden,
            tied=not llama,
            bias=not llama,
        )
        model = fill(model, expert_ffn=model.ffn)
        if model.experts and model.experts_per_token > model.experts:
            raise InputError(
                f"model.experts_per_token = {model.experts_per_token} is more than model.experts = {model.experts}"
            )
        if model.experts and model.experts_every > model.layers:
            raise InputError(
                f"model.experts_every = {model.experts_every}: none of model.layers = {model.layers} blocks has experts"
            )
        if model.heads % model.kv_heads:
            raise InputError(f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}")
        if llama and model.head_size % 2:
            raise InputError(f"model.head_size = {model.head_size}: rotary positions need an even number")
        return model


@dataclass(frozen=True)
class Data(Section):
    """What is learnt from."""

    path: str | None = option(None, "token file, as `hpcmp data prepare` writes it")
    documents: Literal["joined", "apart"] = option(
        "joined", "whether tokens see those of a sample's earlier documents; `apart`: none does (docs/documents.md)"
    )
    end_of_document: int = derived(
        "of the data file; without one, the last of the vocabulary", "token that closes a document", COUNT
    )

    def resolved(self, vocabulary: int | None, end_of_document: int | None) -> Data:
        """With ``end_of_document`` filled in, if it is known, and checked against the vocabulary, if that is."""
        if self.path is None and vocabulary is not None:
            end_of_document = vocabulary - 1
        data: Data = fill(self, end_of_document=end_of_document)
        if vocabulary is not None and (data.end_of_document or 0) >= vocabulary:
            raise InputError(
                f"data.end_of_document = {data.end_of_document} is none of the model.vocabulary = {vocabulary} tokens"
            )
        return data

    def begins(self, tokens: NDArray[Any]) -> NDArray[np.int32] | None:
        """Where the document of each position of some samples begins, as ``beginnings`` has it; None if documents are
        joined. Raises InputError unless it is known what closes them."""
        if self.documents == "joined":
            return None
        if self.end_of_document is None:
            raise InputError('data.documents = "apart" needs data.end_of_document, which data.path tells a run')
        return beginnings(tokens, self.end_of_document)


@dataclass(frozen=True)
class Train(Section):
    """The run. The layout changes none of these numbers' meaning."""

    steps: int = option(1000, "optimizer steps in all", SIZE)
    batch: int = option(8, "samples of a step, over all ranks", SIZE)
    microbatch: int | None = option(None, "samples that a data-parallel rank takes through the model at once", SIZE)
    seed: int = option(0, "of weights, dropout and the order of the data", COUNT)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = option(
        "float32", "numbers of weights and activations; with 16 bits, gradients and master weights are float32"
    )
    fp8: Literal["none", "current", "delayed"] = option(
        "none", "linears multiply in FP8, scaled by what is at hand (`current`) or the last steps (docs/precision.md)"
    )
    loss_scale: float = derived("65536 for float16, else 1", "factor of the loss in the backward", POSITIVE)
    loss_scale_window: int = option(2000, "with float16: good steps after which `loss_scale` doubles", SIZE)
    device: Literal["cpu", "cuda"] = option("cpu", "where arrays live")
    ahead: int = derived(
        "1 on GPUs, else 0",
        "steps that are queued before the result of the one before is known: a GPU then never waits for the host",
        "[0, 1]",
    )
    blas: Literal["auto", "mkl", "openblas", "blis", "numpy"] = option(
        "auto", "library of matrix products on the CPU; `auto`: MKL if it is there and the CPU is Intel's, else NumPy's"
    )
    kernels: Literal["auto", "reference"] = option(
        "auto", "loops on the CPU; `auto`: compiled by Numba where it is installed; `reference`: NumPy's"
    )
    cuda_graphs: bool = option(
        False, "replay the launches of each block, captured once; for a CPU that is slower than its GPU (docs/gpu.md)"
    )
    minutes: float | None = option(None, "save and stop after so long", POSITIVE)
    nan: Literal["stop", "skip"] = option("stop", "what a step does whose loss or gradient is not finite")
    nan_limit: int = option(10, "with `skip`: most of such steps in a row", SIZE)
    replica_check: int | None = option(
        None, "steps between comparisons of replicas, made before each save too; ones that differ end the run", SIZE
    )
    watchdog: float = option(
        600.0, "seconds that a rank may wait in one collective until the job ends with a diagnosis; 0: for ever", COUNT
    )
    check_collectives: bool = option(
        False, "compare every collective between ranks before it starts: slow; finds ranks that call different ones"
    )
    margin: float = option(
        60.0, "seconds to spare before the job's time limit, besides what a step and a save are measured to take", COUNT
    )
    requeue: bool = option(False, "have the job run again when it stops at a time limit or by SIGUSR1 (docs/batch.md)")
    recover: bool = option(
        False, "go on without ranks that die, in the processes that are left, under `mpirun --with-ft ulfm`"
    )
    spares: int = option(0, "with `recover`: ranks that wait, and take the places of those that die", COUNT)


@dataclass(frozen=True)
class Optimizer(Section):
    """The optimizer, with a linear warmup, then a cosine to `final` of the learning rate."""

    name: Literal["adamw", "sgd", "lamb", "muon"] = option("adamw", "`muon` takes AdamW for what is no matrix")
    momentum: float = option(0.95, "decay of the momentum of `sgd` and `muon` per step", SHARE)
    learning_rate: float = option(1e-3, "highest learning rate", POSITIVE)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the first and second moment per step", SHARE)
    epsilon: float = option(1e-8, "added to the root of the second moment", POSITIVE)
    weight_decay: float = option(0.1, "decay of matrices, in units of the learning rate", COUNT)
    clip: float | None = option(1.0, "largest norm of the whole gradient", POSITIVE)
    warmup: int = derived("50; half of decay_steps if that is fewer", "steps of the linear warmup", COUNT)
    final: float = option(0.1, "learning rate after the cosine, as a fraction of the highest", "[0, 1]")
    decay_steps: int = derived("train.steps", "step at which the cosine ends", SIZE)

    def resolved(self, steps: int) -> Optimizer:
        """With derived values filled in for a run of ``steps`` steps, and relations checked."""
        optimizer: Optimizer = fill(self, decay_steps=steps)
        optimizer = fill(optimizer, warmup=min(50, optimizer.decay_steps // 2))
        if optimizer.warmup > optimizer.decay_steps:
            raise InputError(
                f"optimizer.warmup = {optimizer.warmup} is more than the {optimizer.decay_steps} steps of the schedule "
                "(optimizer.decay_steps, else train.steps)"
            )
        return optimizer


@dataclass(frozen=True)
class Communication(Section):
    """How arrays move between ranks."""

    backend: Literal["auto", "mpi", "nccl"] = option("auto", "`auto`: NCCL for arrays on GPUs, else MPI")
    cuda_aware: Literal["auto", "yes", "no"] = option("auto", "whether MPI may be handed GPU pointers; `auto`: ask it")
    hierarchical: Literal["auto", "yes", "no"] = option(
        "auto", "whether MPI's sums over nodes go through each node's ranks first; `auto`: large ones"
    )
    shared_memory: Literal["auto", "yes", "no"] = option(
        "auto", "whether a node's ranks exchange host arrays in shared memory; `auto`: where faster, if each has a core"
    )
    window_mb: float = option(6.0, "MiB of shared memory that a rank has in each group within a node", POSITIVE)


@dataclass(frozen=True)
class Checkpoint(Section):
    """What is saved, when and where."""

    directory: str = derived("checkpoints in run.directory", "where checkpoints lie")
    every: int | None = option(None, "steps between checkpoints; one is always written at the end", SIZE)
    asynchronous: bool = option(
        False, "write those on the way behind the steps that follow; a rank needs memory for a copy of its share"
    )
    keep: int = option(2, "how many of the newest are kept", SIZE)
    keep_every: int | None = option(None, "besides, those of steps that are multiples of this are kept for ever", SIZE)
    keep_best: int = option(
        0, "besides, so many with the lowest held-out loss, which is then taken at each save", COUNT
    )
    resume: bool = option(True, "go on from the newest checkpoint when there is one")
    fresh_optimizer: bool = option(
        False, "go on from a checkpoint of another `optimizer.name` too, with the states of this one at zero"
    )
    local: str | None = option(
        None, "a directory of each node for fast copies, on its disk or in /dev/shm; $VARIABLES and {node} are put in"
    )
    local_every: int | None = option(None, "steps between copies in `local`; none where there is a checkpoint", SIZE)
    initial: str | None = option(None, "checkpoint whose weights a run begins with; the optimizer begins anew")
    storage: Literal["auto", "files", "node", "shared", "mpio"] = option(
        "auto", "a file per rank (`auto`), per node, or one of all ranks: by themselves, or through parallel HDF5"
    )
    verify: Literal["cache", "disk", "no"] = option(
        "cache", "what is read back before a checkpoint counts: what the system has in memory, what the disk has"
    )
    alignment: int = option(0, "bytes: large tensors start at multiples of it; 0: the file system's block size", COUNT)
    hints: str = option("", 'for MPI-IO (`mpio`), such as "striping_unit=4194304 cb_nodes=8"')


@dataclass(frozen=True)
class Run(Section):
    """The run's directory and its log."""

    directory: str = derived(
        "runs/NAME of NAME.toml", "where the resolved configuration, metrics and plots are written"
    )
    log_seconds: float = option(5.0, "seconds between lines of the log", COUNT)
    evaluate_every: int | None = option(None, "steps between evaluations on held-out samples", SIZE)
    evaluate_samples: int = option(16, "held-out samples", SIZE)
    plot: bool = option(False, "draw the loss at the end (needs matplotlib)")
    rank_logs: bool = option(False, "write each rank's own log to `logs/` in the directory")
    tensorboard: bool = option(False, "write the metrics for TensorBoard, too, to `tensorboard/` in the directory")
