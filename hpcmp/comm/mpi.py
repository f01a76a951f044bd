"""Communicator over MPI: buffers, never pickles, for arrays.

Host arrays are handed to MPI as they are. Device arrays are handed over directly when the MPI is CUDA-aware, after the
stream that writes them has finished; otherwise they go through pinned host memory, since an MPI that is not CUDA-aware
crashes on a device pointer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from ..arrays import Array, array_module, is_half, wide
from .base import Op, Pending
from .layouts import Layouts, _then
from .survive import hold

_OPS = {"sum": MPI.SUM, "max": MPI.MAX}
_TAG = 32767  # of all_to_all's messages: the largest that every MPI has, left to it by the callers of send and recv


def bits(x: Array) -> Array:
    """``x`` as MPI moves it: float16 and bfloat16, for which MPI has no type, as the integers of their bits."""
    return x.view(np.uint16) if is_half(x.dtype) else x


def settled(x: Array) -> Array:
    """``x``, once the queued work is done: MPI knows of no stream, and x's memory may come from a pool still in use."""
    xp = array_module(x)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    return x


class Direct:
    """MPI reads and writes the arrays themselves."""

    def outgoing(self, x: Array) -> Array:
        """What MPI reads in place of ``x``: ``x`` itself if it is contiguous."""
        xp = array_module(x)
        x = x if isinstance(x, xp.ndarray) and x.flags.c_contiguous else xp.ascontiguousarray(x).reshape(np.shape(x))
        return settled(x)

    def incoming(self, shape: Any, dtype: Any, like: Array) -> Array:
        """What MPI writes in place of a new array of the kind of ``like``."""
        return settled(array_module(like).empty(shape, dtype))

    def arrived(self, buffer: Array, like: Array) -> Array:
        """The array, once MPI has written ``buffer``."""
        return buffer


class Staged(Direct):
    """MPI reads and writes host copies, pinned when the arrays lie on a GPU."""

    def outgoing(self, x: Array) -> Array:
        buffer = self.incoming(x.shape, x.dtype, x)
        if array_module(x) is np:
            buffer[...] = x
        else:
            x.get(out=buffer)  # ordered after the work queued on x's stream; blocks until the copy is there
        return buffer

    def incoming(self, shape: Any, dtype: Any, like: Array) -> Array:
        if array_module(like) is np:
            return np.empty(shape, dtype)
        import cupyx  # ships with CuPy

        return cupyx.empty_pinned(shape, dtype)

    def arrived(self, buffer: Array, like: Array) -> Array:
        return array_module(like).asarray(buffer)


class MpiCommunicator(Layouts):
    """The collectives over an MPI communicator, which it owns from now on: ``close`` frees it.

    ``largest`` is the most elements that one MPI call is given: counts are C ints in many MPIs, so that longer messages
    are sent in pieces.
    """

    largest = 2**31 - 1

    def __init__(self, comm: MPI.Intracomm, *, staged: bool = False) -> None:
        self.comm = hold(comm)
        self.rank, self.size = comm.rank, comm.size
        self.transport: Direct = Staged() if staged else Direct()

    def _all_reduce(self, x: Array, op: Op, out: Array | None) -> Pending:
        if is_half(x.dtype):  # reduced in float32, and rounded once
            whole = self._all_reduce(x.astype(wide(x.dtype)), op, None)
            return _then(whole, lambda y: _into(out, y.astype(x.dtype)))
        move = self.transport
        send = move.outgoing(x)
        in_place = out is x and send is x
        recv = send if in_place else move.incoming(x.shape, x.dtype, x)
        flat_send, flat_recv = send.reshape(-1), recv.reshape(-1)
        requests = [
            self.comm.Iallreduce(MPI.IN_PLACE if in_place else flat_send[a:b], flat_recv[a:b], _OPS[op])
            for a, b in self._pieces(send.size)
        ]

        def finish(buffer: Array) -> Array:
            return _into(out, move.arrived(buffer, x))

        return Pending(recv, requests, finish, send)

    def _broadcast(self, x: Array, root: int) -> Pending:
        move = self.transport
        buffer = move.outgoing(x) if self.rank == root else move.incoming(x.shape, x.dtype, x)
        flat = bits(buffer.reshape(-1))
        requests = [self.comm.Ibcast(flat[a:b], root) for a, b in self._pieces(flat.size)]
        return Pending(buffer, requests, lambda y: move.arrived(y, x))

    def _send(self, x: Array, peer: int, tag: int) -> Pending:
        buffer = self.transport.outgoing(x)
        flat = bits(buffer.reshape(-1))
        requests = [self.comm.Isend(flat[a:b], peer, tag) for a, b in self._pieces(flat.size)]
        return Pending(x, requests, None, buffer)

    def _recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int, like: Array) -> Pending:
        move = self.transport
        buffer = move.incoming(shape, dtype, like)
        flat = bits(buffer.reshape(-1))
        requests = [self.comm.Irecv(flat[a:b], peer, tag) for a, b in self._pieces(flat.size)]
        return Pending(buffer, requests, lambda y: move.arrived(y, like))

    def duplicate(self) -> MPI.Intracomm:
        return hold(self.comm.Dup())

    def close(self) -> None:
        self.comm.Free()

    def _summed(self, x: Array) -> int:
        return int(wide(x.dtype).itemsize) if is_half(x.dtype) else int(x.itemsize)

    def _all_gather(self, x: Array, counts: list[int]) -> Pending:
        move = self.transport
        send, recv = move.outgoing(x), move.incoming(sum(counts), x.dtype, x)
        if sum(counts) <= self.largest:
            requests = [self.comm.Iallgatherv(bits(send), (bits(recv), counts))]
        else:  # one broadcast a piece of each rank's shard
            recv[self._offset(counts, self.rank) :][: send.size] = send
            settled(recv)
            requests = [
                self.comm.Ibcast(bits(recv[start + a : start + b]), r)
                for r, start in enumerate(self._offset(counts, r) for r in range(self.size))
                for a, b in self._pieces(counts[r])
            ]
        return Pending(recv, requests, lambda y: move.arrived(y, x), send)

    def _reduce_scatter(self, x: Array, counts: list[int]) -> Pending:
        if is_half(x.dtype):
            return _then(self._reduce_scatter(x.astype(wide(x.dtype)), counts), lambda y: y.astype(x.dtype))
        move = self.transport
        send, recv = move.outgoing(x), move.incoming(counts[self.rank], x.dtype, x)
        if sum(counts) <= self.largest:
            requests = [self.comm.Ireduce_scatter(send, recv, counts)]
        else:  # one reduction a piece of each rank's part
            requests = [
                self.comm.Ireduce(send[start + a : start + b], recv[a:b] if r == self.rank else None, root=r)
                for r, start in enumerate(self._offset(counts, r) for r in range(self.size))
                for a, b in self._pieces(counts[r])
            ]
        return Pending(recv, requests, lambda y: move.arrived(y, x), send)

    def _all_to_all(self, x: Array, sent: list[int], received: list[int]) -> Pending:
        move = self.transport
        send, recv = move.outgoing(x), move.incoming(sum(received), x.dtype, x)
        requests = []  # point to point: the two of a pair agree on its pieces, as all ranks could not on one call
        for r in range(self.size):
            start = self._offset(received, r)
            pieces = self._pieces(received[r])
            requests += [self.comm.Irecv(bits(recv[start + a : start + b]), r, _TAG) for a, b in pieces]
        for r in range(self.size):
            start = self._offset(sent, r)
            pieces = self._pieces(sent[r])
            requests += [self.comm.Isend(bits(send[start + a : start + b]), r, _TAG) for a, b in pieces]
        return Pending(recv, requests, lambda y: move.arrived(y, x), send)

    def _pieces(self, n: int) -> list[tuple[int, int]]:
        """[a, b) ranges of at most ``largest`` elements; one, empty, for nothing at all, so that ranks stay matched."""
        return [(a, min(a + self.largest, n)) for a in range(0, max(n, 1), self.largest)]

    @staticmethod
    def _offset(counts: list[int], rank: int) -> int:
        return sum(counts[:rank])


def _into(out: Array | None, y: Array) -> Array:
    if out is None or out is y:
        return y
    out[...] = y
    return out
