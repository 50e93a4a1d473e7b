"""DeepSpeed, ZeRO stage 0: votes as docs/integrations.md has them, and from a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from common import RANK, Net, checksum, data, say

import pydist

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def made() -> Any:
    """DeepSpeed's engine with an optimizer that votes."""
    model = Net()
    lion = pydist.optim.DistributedLion(model.named_parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=lion, config=CONFIG)
    engine.enable_backward_allreduce = False  # the votes are the communication
    return engine


def steps(engine: Any, begin: int, end: int) -> str:
    x, y = data()[:]
    for step in range(begin, end):
        mine = slice((2 * step + RANK) * 16 % 256, (2 * step + RANK) * 16 % 256 + 16)
        engine.backward(torch.nn.functional.mse_loss(engine(x[mine]), y[mine]))
        engine.step()
    return checksum(engine.module)


def plain(end: int) -> str:
    """The same without DeepSpeed."""
    model, (x, y) = Net(), data()[:]
    lion = pydist.optim.DistributedLion(model.named_parameters(), lr=1e-3)
    for step in range(end):
        mine = slice((2 * step + RANK) * 16 % 256, (2 * step + RANK) * 16 % 256 + 16)
        lion.zero_grad()
        torch.nn.functional.mse_loss(model(x[mine]), y[mine]).backward()
        lion.step()
    return checksum(model)


def main(folder: str) -> None:
    deepspeed.init_distributed("gloo")
    engine = made()
    steps(engine, 0, 5)
    engine.optimizer.consolidate_state_dict()  # DeepSpeed writes rank 0's optimizer alone
    engine.save_checkpoint(folder)
    through = steps(engine, 5, 10)
    again = made()
    again.load_checkpoint(folder)
    resumed = steps(again, 5, 10)
    say(
        version=deepspeed.__version__, plain=plain(10), through=through, resumed=resumed,
        ratio=engine.optimizer.stats()["ratio"],
    )  # fmt: skip
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
