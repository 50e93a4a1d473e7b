"""Lightning: the callback against plain DDP, and fits that go on from a checkpoint."""

from __future__ import annotations

import logging
import sys
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from common import Net, checksum, data, say
from lightning.pytorch.callbacks import ModelCheckpoint

import pydist
from pydist.integrations.lightning import Compress

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(L.LightningModule):
    """SGD, or Distributed Lion."""

    def __init__(self, lion: bool) -> None:
        super().__init__()
        self.net, self.lion = Net(), lion

    def training_step(self, batch: Any, number: int) -> Any:
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.lion:
            return pydist.optim.DistributedLion(self.named_parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


def fit(
    compress: Any, *, lion: bool = False, folder: str | None = None, start: str | None = None
) -> Any:
    """Three epochs; checkpoints go into a folder."""
    callbacks: list[Any] = [] if compress is None else [compress]
    if folder:
        callbacks.append(ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1))
    module = Module(lion)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, callbacks=callbacks,
        enable_checkpointing=folder is not None, enable_progress_bar=False, logger=False,
        enable_model_summary=False, gradient_clip_val=None if lion else 1.0,
        accumulate_grad_batches=1 if lion else 2,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data(), batch_size=16)
    trainer.fit(module, loader, ckpt_path=start)
    return checksum(module), trainer


def main(folder: str) -> None:
    plain, _ = fit(None)
    raw, _ = fit(Compress(pydist.Raw()))
    signs = Compress(pydist.Sign("l1"), exclude=["*norm*"])
    through, trainer = fit(signs, folder=f"{folder}/signs")
    assert signs.state is not None
    ratio, logged = signs.state.stats()["ratio"], "pydist/ratio" in trainer.callback_metrics
    dist.barrier()
    resumed, _ = fit(
        Compress(pydist.Sign("l1"), exclude=["*norm*"]), start=f"{folder}/signs/epoch=1.ckpt"
    )
    lion, _ = fit(Compress(), lion=True, folder=f"{folder}/lion")
    dist.barrier()
    lion_resumed, _ = fit(Compress(), lion=True, start=f"{folder}/lion/epoch=1.ckpt")
    say(
        version=L.__version__, plain=plain, raw=raw, through=through, resumed=resumed, lion=lion,
        lion_resumed=lion_resumed, ratio=ratio, logged=logged,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
