"""Accelerate: the handler against plain DDP; save_state and load_state."""

from __future__ import annotations

import sys
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from common import Net, checksum, data, say

import pydist
from pydist.integrations.accelerate import CompressKwargs


class Run:
    """A model, an optimizer and a loader, prepared."""

    def __init__(self, codec: Any = None, *, lion: bool = False) -> None:
        self.handler = CompressKwargs(codec=codec, bucket_cap_mb=1)
        Accelerator._shared_state = {}
        self.accelerator = Accelerator(cpu=True)
        self.handler.install(self.accelerator)
        model = Net()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        if lion:
            optimizer = pydist.optim.DistributedLion(model.named_parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(data(), batch_size=16)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        if lion:
            self.optimizer.optimizer.attach(self.model)

    def epoch(self) -> str:
        for x, y in self.loader:
            self.optimizer.zero_grad()
            self.accelerator.backward(torch.nn.functional.mse_loss(self.model(x), y))
            self.optimizer.step()
        return checksum(self.model)

    def again(self, folder: str) -> tuple[str, str]:
        """The second epoch, twice: gone on with, and from the checkpoint."""
        self.epoch()
        self.accelerator.save_state(folder)
        self.accelerator.wait_for_everyone()
        through = self.epoch()
        self.accelerator.load_state(folder)
        return through, self.epoch()


def main(folder: str) -> None:
    plain, raw = Run().epoch(), Run(pydist.Raw()).epoch()
    signs = Run(pydist.Sign("l1"))
    through, resumed = signs.again(f"{folder}/signs")
    lion, lion_resumed = Run(lion=True).again(f"{folder}/lion")
    say(
        version=accelerate.__version__, plain=plain, raw=raw, through=through, resumed=resumed,
        lion=lion, lion_resumed=lion_resumed, logged=True,
        ratio=signs.handler.states[0].stats()["ratio"],
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
