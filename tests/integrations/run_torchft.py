"""torchft: sums over a reconfigurable process group, compressed, and after a new quorum."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist
from common import RANK, say
from torch.distributed import AllreduceOptions, ReduceOp
from torchft.process_group import ProcessGroupGloo

import pydist
from pydist.integrations.torchft import CompressedProcessGroup


def main(folder: str) -> None:
    del folder
    store = dist.TCPStore("127.0.0.1", int(os.environ["FT_PORT"]), is_master=RANK == 0)
    inside = ProcessGroupGloo(timeout=timedelta(seconds=20))
    group = CompressedProcessGroup(inside, pydist.QSGD(bits=8))
    address = f"127.0.0.1:{os.environ['FT_PORT']}"
    generator = torch.Generator().manual_seed(3)
    everyones = [torch.randn(100, 101, generator=generator) for _ in range(2)]
    exact, bits = sum(everyones), []
    for quorum in ("first", "second"):
        group.configure(f"{address}/{quorum}", f"replica{RANK}", RANK, 2)
        for op in (ReduceOp.SUM, ReduceOp.AVG):
            x, options = everyones[RANK].clone(), AllreduceOptions()
            options.reduceOp = op
            group.allreduce([x], options).wait()
            wanted = exact if op == ReduceOp.SUM else exact / 2
            bits.append([((x - wanted).norm() / wanted.norm()).item(), x.double().sum().item()])
    ints = torch.full((2000,), RANK + 1)
    group.allreduce([ints], AllreduceOptions()).wait()  # goes to the group inside
    say(version=version("torchft"), bits=bits, ints=ints.unique().tolist())
    store.set("done", "") if RANK else store.wait(["done"])  # rank 0 holds the store
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
