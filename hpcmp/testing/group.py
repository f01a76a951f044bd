"""What the checks share: numbers agreed between ranks, random distributed arrays, parameters at a general point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import random
from ..arrays import Array, array_module, to_host
from ..comm.base import Communicator, Solo
from ..comm.mesh import Mesh
from ..module import Module, Parameter

Host = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """Host numbers over the ranks of a communicator, carried in arrays of the library ``xp``."""

    comm: Communicator
    xp: ModuleType

    def gather(self, values: Sequence[float] | Host) -> Host:
        """Every rank's numbers, (ranks, len(values)): the same on every rank, and so is what follows from them."""
        return to_host(self.comm.all_gather(self.xp.asarray([values], np.float64)).wait())

    def sum(self, x: Host) -> Host:
        """Over the ranks, on every rank."""
        return to_host(self.comm.all_reduce(self.xp.asarray(x)).wait())

    def agree(self, problem: str) -> None:
        """Raise on every rank, with the words of the first rank that has a problem, if any has one."""
        words = problem.encode()
        sizes = self.gather([len(words)])[:, 0]
        if not sizes.any():
            return
        first = int(np.flatnonzero(sizes)[0])
        text = np.frombuffer(words if self.comm.rank == first else bytes(int(sizes[first])), np.uint8)
        said = to_host(self.comm.broadcast(self.xp.asarray(text), first).wait()).tobytes().decode()
        raise AssertionError(said if self.comm.size == 1 else f"{said} (rank {first} of {self.comm.size})")


def check(errors: dict[str, float], tolerance: float, message: str) -> None:
    """Every error is a number, at most ``tolerance``. The errors are the same on every rank."""
    wrong = ", ".join(f"{name}: {error:.1e}" for name, error in errors.items() if not error <= tolerance)
    if wrong:
        raise AssertionError(f"{message}: {wrong} (at most {tolerance:g})")


def draw(shape: tuple[int, ...], layout: str, comm: Communicator, seed: int = 0, dtype: DTypeLike = np.float64) -> Host:
    """Standard normal numbers: the same on every rank of ``comm`` for layout I, different for V and P."""
    rank = 0 if layout == "I" else 1 + comm.rank
    return np.asarray(np.random.default_rng((seed, rank)).standard_normal(shape)).astype(dtype)


def prepare(module: Module, seed: int = 0, xp: ModuleType = np) -> list[Parameter]:
    """Float64 parameters at a general point: initial values plus N(0, 0.1^2), by name and global index, zero gradients.

    (At its initial value a bias is zero and a norm's weight one, where many an error does not show.)
    """
    parameters = module.initialise(seed, np.float64, xp)
    for p in parameters:
        if p.data.dtype != np.float64:
            raise TypeError(f"{p.name} is {p.data.dtype}; the check needs float64: pass a module without arrays")
        p.data += 0.1 * random.normal_slab(random.key(seed, "prepare", p.name), p.shape, p.index, xp)
    return parameters


def complete(p: Parameter, comm: Communicator, mesh: Mesh | None = None) -> Host:
    """The gradient of this rank's shard after the sum that it owes: over all shards, at each number of the whole.

    That is over the group of ``mesh`` along the parameter's ``replicas`` and ``shared`` axes; without a mesh there are
    no replicas, and ``comm`` is the group of what is ``shared``.
    """
    grad = to_host(p.grad)
    group = mesh[(*p.replicas, *p.shared)] if mesh else comm if p.shared else Solo()
    if group.size == 1:
        return grad
    whole = np.zeros(p.shape)
    whole[p.index] = grad
    return Group(group, array_module(p.grad)).sum(whole)[p.index]


def leaves(value: Any) -> list[Array]:
    """The arrays of a tuple, an array or None."""
    if value is None:
        return []
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def copy(value: Any) -> Any:
    """A copy of an array, or of every array of a tuple; floating-point numbers become float64."""
    if isinstance(value, tuple):
        return tuple(copy(item) for item in value)
    return value.astype(np.float64 if value.dtype.kind == "f" else value.dtype)


def pack(items: list[Array], like: Any) -> Any:
    """``items`` as the tuple, or the array alone, that ``like`` is."""
    return tuple(items) if isinstance(like, tuple) else items[0]


def shapes(value: Any) -> list[tuple[int, ...]]:
    """The shape of every array."""
    return [np.shape(leaf) for leaf in leaves(value)]


def dot(a: Array, b: Array) -> float:
    """a . b of this rank, accumulated in float64."""
    return float((to_host(a).astype(np.float64) * to_host(b)).sum())


def rms(x: Host) -> float:
    """The root of the mean square."""
    return math.sqrt(dot(x, x) / max(1, x.size))
