"""What a rank sends: calls and bytes of every operation, by the formula of a standard algorithm.

An MPI or NCCL chooses its algorithm by itself and does not say what it sends. So each operation counts what this rank
sends in the algorithm that moves the fewest bytes over all ranks, where rank r of n holds the part m_r, of M bytes in
all, and sum_r m_r = M:

==============  ==============================================  ====================================
operation       algorithm                                       bytes that rank r sends
==============  ==============================================  ====================================
all_gather      its shard to every other rank                   (n - 1) m_r
reduce_scatter  to every other rank its part                    M - m_r
all_reduce      reduce_scatter of even parts, then all_gather   M + (n - 2) m_r; even: 2 (n - 1) / n M
all_to_all      to every other rank its part                    M - m_r
broadcast       a chain: the root, the next rank, ...           M; the last of the chain nothing
send            one message                                     M
==============  ==============================================  ====================================

With equal parts these are also the bytes of the ring algorithms (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

from functools import partial

from .. import partition
from .replay import noting


class Traffic(dict[str, tuple[int, int]]):
    """{operation: (calls, bytes that this rank sent)}, of the operations that were called."""

    def count(self, operation: str, sent: int) -> None:
        """One more call, which sent so many bytes; of one that is captured, each time that it runs."""
        if (replay := noting()) is not None:
            replay.begins.append(partial(self.count, operation, sent))
            return
        calls, total = self.get(operation, (0, 0))
        self[operation] = calls + 1, total + sent

    @property
    def sent(self) -> int:
        """Bytes of all operations together."""
        return sum(sent for _, sent in self.values())


def all_reduced(elements: int, size: int, rank: int) -> int:
    """How many elements a rank sends in an all-reduce, cut by ``hpcmp.partition``."""
    part = partition.part(elements, size, rank)
    return elements + (size - 2) * (part.stop - part.start) if size > 1 else 0
