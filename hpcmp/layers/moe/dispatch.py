"""Tokens to the ranks of their experts, and back."""

from __future__ import annotations

import numpy as np

from ... import kernels, partition
from ...arrays import Array, array_module, to_host
from ...comm.base import Communicator, Pending


class Dispatch:
    """Where the choices of this rank's tokens lie among the rows of the experts of ``ep``: a permutation over ranks.

    chosen (T, k): experts, or ``experts`` for none. Rank r of ep holds experts ``partition.part(experts, ep.size, r)``.
    A choice is a pair (token, one of its k); it is a row of h numbers on the way.

    order: the choices (numbers below T k) in which rows leave: by expert, then by token. token: each one's token.
    rows: how many rows each of this rank's experts gets: the rows that arrive lie by expert, then by the rank that they
    come from, then by token, so that every sum over them has one order. Building it is collective: every rank's counts
    for every expert, e integers a rank, are gathered and read by the host.
    """

    def __init__(self, ep: Communicator, chosen: Array, experts: int) -> None:
        self.ep, self.choices = ep, chosen.shape
        xp = array_module(chosen)
        counts = kernels.of(chosen).membership(chosen, experts).sum(0)
        table = to_host(ep.all_gather(counts[None]).wait())  # (ranks, experts)
        here = table[:, ep.part(experts)]
        self.sent = [int(table[ep.rank, part].sum()) for part in partition.split(experts, ep.size)]
        self.received: list[int] = here.sum(1).tolist()
        self.rows: list[int] = here.sum(0).tolist()
        keys = chosen.reshape(-1) * chosen.size + xp.arange(chosen.size)  # all different: any sort gives one order
        self.order = xp.argsort(keys)[: sum(self.sent)]
        self.token = self.order // chosen.shape[1]
        self._place = xp.full(chosen.size, -1)  # the inverse of ``order``
        self._place[self.order] = xp.arange(self.order.size)
        expert = np.repeat(np.tile(np.arange(here.shape[1]), len(here)), here.reshape(-1))
        regroup = np.argsort(expert, kind="stable")
        sorted_already = ep.size == 1 or here.shape[1] <= 1
        self._regroup = None if sorted_already else xp.asarray(regroup)
        self._ungroup = None if sorted_already else xp.asarray(np.argsort(regroup, kind="stable"))

    def start(self, x: Array) -> Pending:
        """Rows in ``order`` -> the rows of this rank's experts. Its adjoint, and its inverse, is ``start_back``."""
        pending = self.ep.all_to_all_v(x, self.sent, self.received)
        return Pending(pending, (), lambda arriving: _moved(arriving.wait(), self._regroup))

    def start_back(self, y: Array) -> Pending:
        """The rows of this rank's experts -> (T, k, h), zero for a choice that is dropped."""
        pending = self.ep.all_to_all_v(_moved(y, self._ungroup), self.received, self.sent)
        shape = *self.choices, y.shape[1]
        return Pending(pending, (), lambda arriving: _moved(arriving.wait(), self._place).reshape(shape))


def _moved(rows: Array, index: Array | None) -> Array:
    """The rows in the order of ``index``; as they are without one."""
    return rows if index is None else kernels.of(rows).take_rows(rows, index)
