"""What the run of a configuration needs of its ranks: their number, their device, their memory; and what its keys ask
for. Its files are in ``files``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ...arrays import dtype_of, module_for
from ...batch import find_job, launcher, requeue_command
from ...checkpoint.directory import find
from ...errors import InputError
from ...kernels.cuda import cudnn, libraries
from ...training.config import Config
from ...training.engine import architecture
from ...training.fp8 import verdict
from . import cgroup, gpu, limits
from .base import Check, Ranks, Subject, Trouble, attempt, by_host, some, wrong
from .files import tokens
from .software import parallel_hdf5

GIB = 2**30


@dataclass(frozen=True)
class Have:
    """What a rank has of what is needed; texts say what is wrong, "" if nothing. vocabulary: of the model, 0 if nobody
    knows; free: bytes of memory of the host, or of the GPU if that is the device; nccl: its version; cuda: CuPy's, the
    number before the point; no_cublaslt, no_cudnn: why they cannot be loaded; capability: as ``libraries`` has it."""

    host: str
    vocabulary: int = 0
    device_wrong: str = ""
    blas_wrong: str = ""
    free: int = 1 << 60
    nccl: int = 0
    cuda: int = 12
    no_cublaslt: str = ""
    no_cudnn: str = ""
    capability: int = 90


class Needs:
    """The needs of ``config``, which is in the file ``name``, on ``ranks``."""

    def __init__(self, config: Config, ranks: Ranks, name: str) -> None:
        self.ranks, self.name, self.misfit = ranks, name, ""
        self.config = config.resolved()
        try:
            self.config = config.resolved(ranks=max(1, len(ranks.hosts) - config.train.spares))
        except InputError as error:
            self.misfit = str(error)

    @property
    def subject(self) -> Subject:
        """What every rank looks at, and what is judged of it."""
        return Subject(
            "run",
            self.look,
            (
                self.layout_check,
                self.device_check,
                self.products_check,
                self.attention_check,
                self.fp8_check,
                self.blas_check,
                self.memory_check,
                self.keys_check,
            ),
        )

    def look(self, ranks: Ranks) -> Have:
        """This rank's."""
        train, model = self.config.train, self.config.model
        wrong_device, free = _device(train.device)
        have = Have(
            ranks.host,
            model.vocabulary or tokens(self.config.data.path)[1],
            wrong_device,
            _blas(train.blas),
            free,
        )
        if train.device == "cpu":
            return have
        gpus = gpu.look(ranks)
        have = replace(have, nccl=gpus.nccl, cuda=gpus.runs[1] // 1000 or 12)
        if wrong_device:
            return have
        why = libraries.cublaslt().why, libraries.cudnn().why
        return replace(have, no_cublaslt=why[0], no_cudnn=why[1], capability=libraries.capability())

    def layout_check(self, seen: list[Have]) -> Check:
        """Whether the ranks fit the layout, and tensor parallelism stays within a node."""
        layout, count, sizes = self.config.layout, len(self.ranks.hosts), self.ranks.topology.sizes
        if self.misfit and count == 1 and launcher() is None:
            advice = f"start it as the run will be: `mpirun -n {layout.ranks} hpcmp doctor {self.name}`"
            return Check("layout", "warn", f"it is for {layout.ranks} ranks, and this is one process", advice)
        if self.misfit:
            value, _, fits = self.misfit.partition("; ")
            return Check("layout", "problem", value, _fits(fits))
        if len(sizes) > 1 and (most := layout.tp * layout.tp_y) > min(sizes):
            value = f"tp x tp_y = {most} ranks lie on nodes of {min(sizes)}: the sums of each layer go between nodes"
            return Check("layout", "warn", value, f"set layout.tp={min(sizes)}, and layout.pp for the rest")
        return Check("layout", "ok", f"{count} ranks: dp={layout.dp}, pp={layout.pp}, tp={layout.tp}")

    def device_check(self, seen: list[Have]) -> Check:
        """Whether every rank has what the arrays lie on."""
        device = self.config.train.device
        bad = [each for each in seen if each.device_wrong]
        if not bad:
            return Check("train.device", "ok", device)
        value, _, pip = bad[0].device_wrong.partition(": pip ")
        elsewhere = "start on nodes with GPUs (the line GPUs says what is missing here), or set train.device=cpu"
        where = some(each.host for each in bad)
        return Check("train.device", "problem", f"{value} ({where})", f"`pip {pip}`" if pip else elsewhere)

    def products_check(self, seen: list[Have]) -> Check | list[Check]:
        """Whether cuBLASLt makes the matrix products of a GPU."""
        bad = [each for each in seen if each.no_cublaslt]
        if not bad:
            return []
        why, cuda = bad[0].no_cublaslt, bad[0].cuda
        value = f"they go by cuBLAS through CuPy on {some(each.host for each in bad)}, slower: {why}"
        library = f"`module load cuda`, or `pip install 'cupy-cuda{cuda}x[ctk]'`"
        advice = _pip(f"cuda{cuda}") if why.startswith("No module named") else library
        return Check("matrix products", "warn", value, advice)

    def attention_check(self, seen: list[Have]) -> Check | list[Check]:
        """Whether cuDNN makes the attention of a GPU, if the run has any that it can make."""
        train, model = self.config.train, self.config.model
        bad = [each for each in seen if each.no_cudnn]
        if not bad or model.dropout or not cudnn.takes(dtype_of(train.dtype), model.head_size or 0):
            return []
        why, cuda = bad[0].no_cudnn, bad[0].cuda
        value = f"it goes in tiles on {some(each.host for each in bad)}, slower than cuDNN's: {why}"
        advice = "`unset HPCMP_CUDNN`" if "HPCMP_CUDNN" in why else _pip(f"cuda{cuda},cudnn{cuda}")
        return Check("attention", "warn", value, advice)

    def fp8_check(self, seen: list[Have]) -> Check | list[Check]:
        """Whether products of 8 bits make what ``train.fp8`` has multiplied."""
        if self.config.train.fp8 == "none" or any(each.device_wrong for each in seen):
            return []
        found = [verdict(self.config, each.capability, each.no_cublaslt) for each in seen]
        good, value, advice = worst = min(found, key=lambda each: each.good)
        hosts = [each.host for each, told in zip(seen, found, strict=True) if told == worst]
        where = "" if len(hosts) == len(seen) else f" ({some(hosts)})"
        return Check("train.fp8", "ok" if good else "warn", value + where, advice)

    def blas_check(self, seen: list[Have]) -> Check | list[Check]:
        """Whether the library of matrix products is there."""
        bad = next((each.blas_wrong for each in seen if each.blas_wrong), "")
        return Check("train.blas", "problem", bad, "install it, or set train.blas=auto") if bad else []

    def memory_check(self, seen: list[Have]) -> Check | list[Check]:
        """Whether what a run holds between steps fits: weights, gradients, moments; activations come besides."""
        if not seen[0].vocabulary or any(each.device_wrong for each in seen):
            return []
        each, cuda = held(self.config, seen[0].vocabulary), self.config.train.device == "cuda"
        rooms = [(min(h.free for h in there), 1 if cuda else len(there), host) for host, there in by_host(seen).items()]
        free, count, host = min(rooms, key=lambda room: room[0] / room[1])
        needed, whose = each * count, "one rank's" if cuda else f"those of {count} ranks"
        value = f"weights, gradients and moments ({whose}) take {_gib(needed)} of {_gib(free)} free on {host}"
        advice = "more nodes; or layout.zero=3, tp, pp, train.dtype=bfloat16; or more memory (`#SBATCH --mem=0`)"
        if needed > free:
            return Check("memory of the run", "problem", value, advice)
        if needed > 0.8 * free:
            return Check("memory of the run", "warn", f"{value}, and activations come besides", advice)
        return Check("memory of the run", "ok", value)

    def keys_check(self, seen: list[Have]) -> list[Check]:
        """What single keys ask for and is not there."""
        c, lines = self.config, []
        if c.checkpoint.storage == "mpio" and len(seen) > 1 and not parallel_hdf5():
            advice = "set checkpoint.storage=shared, or `HDF5_MPI=ON CC=mpicc pip install --no-binary=h5py h5py`"
            lines.append(Check("checkpoint.storage", "problem", "it is mpio, and h5py was built without MPI", advice))
        if c.communication.backend == "nccl" and not all(each.nccl for each in seen):
            advice = "`pip install nvidia-nccl-cu12` or -cu13, or set communication.backend=mpi"
            lines.append(Check("communication.backend", "problem", "it is nccl, and there is no NCCL", advice))
        if c.train.requeue and requeue_command(find_job()) is None:
            advice = "`export HPCMP_RESUBMIT='COMMAND'` in the job script (docs/batch.md), or train.requeue=false"
            lines.append(Check("train.requeue", "warn", f"{find_job()}: nothing would run it again", advice))
        if c.train.recover and len(seen) > 1:
            from ...comm.survive import missing

            lines += [wrong("train.recover", why)] if (why := missing()) else []
        if c.run.plot and find_spec("matplotlib") is None:
            advice = "`pip install matplotlib`, or set run.plot=false"
            lines.append(Check("run.plot", "problem", "there is no matplotlib", advice))
        if c.checkpoint.initial and isinstance(found := attempt(partial(find, Path(c.checkpoint.initial))), Trouble):
            advice = "name a checkpoint: `hpcmp checkpoint list FOLDER` shows those that are there"
            lines.append(Check("checkpoint.initial", "problem", found.why, advice))
        return lines


def held(config: Config, vocabulary: int) -> int:
    """The bytes that a rank holds between steps, at least: the table of docs/zero.md, all parameters cut evenly."""
    layout, parameters = config.layout, architecture(config.resolved(vocabulary=vocabulary)).parameters
    width, zero, shard = dtype_of(config.train.dtype).itemsize, layout.zero, layout.shard
    wide = max(4, width)
    weights = 0 if zero == 3 else width
    gradients = wide / (shard if zero >= 2 else 1)
    masters = wide / shard if zero == 3 or width < wide else 0
    moments = (1 if config.optimizer.name in ("sgd", "muon") else 2) * wide / shard
    cut = layout.pp * layout.tp * layout.tp_y * layout.ep
    return int(parameters / cut * (weights + gradients + masters + moments))


def _device(device: str) -> tuple[str, int]:
    """What is wrong with a device, and the bytes of memory that are free on it."""
    if device == "cpu":
        group = cgroup.memory()
        return "", min(limits.host_memory()[0], group[1] if group else 1 << 60)
    try:
        return "", int(module_for(device).cuda.Device().mem_info[0])
    except InputError as error:
        return str(error), 0


def _blas(name: str) -> str:
    """What is wrong with a choice of ``train.blas``."""
    from ...kernels import blas

    try:
        blas.select(name)
    except InputError as error:
        return str(error)
    return ""


def _pip(extras: str) -> str:
    return f'`pip install "hpcmp[{extras}]"`'


def _fits(layouts: str) -> str:
    return f"in section [layout], {layouts}" if layouts else "change the number of ranks, or section [layout]"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
