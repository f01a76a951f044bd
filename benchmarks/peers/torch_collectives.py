"""A rank of collectives over gloo (torch.distributed), for benchmarks/collectives.py: obeys orders on its input.

    PYTHON torch_collectives.py RANK SIZE FILE          # FILE: where the ranks find one another

An order is a line ``operation bytes calls``; the answer the mean seconds of a call, nan where gloo does not have it.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist


def main(rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    print("ready", flush=True)
    for line in sys.stdin:
        operation, nbytes, calls = line.split()
        whole, part = torch.zeros(int(nbytes) // 4), torch.zeros(int(nbytes) // 4 // size)
        call = {
            "all_reduce": lambda x=whole: dist.all_reduce(x),
            "reduce_scatter": lambda x=whole, y=part: dist.reduce_scatter_tensor(y, x),
            "all_gather": lambda x=whole, y=part: dist.all_gather_into_tensor(x, y),
            "broadcast": lambda x=whole: dist.broadcast(x, 0),
        }[operation]
        try:
            call()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(int(calls)):
                call()
            print((time.perf_counter() - start) / int(calls), flush=True)
        except RuntimeError:
            print("nan", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
