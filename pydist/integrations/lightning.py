"""Lightning: a callback that compresses what DDP sends, and keeps it in checkpoints.

    trainer = L.Trainer(strategy="ddp", callbacks=[Compress(pydist.QSGD(bits=4))])

Residuals and momenta differ by rank, and Lightning writes one file: so everyone's are gathered in
it. ``lightning`` and ``pytorch_lightning`` are taken, whichever is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import pydist

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer


class Compress(Callback):
    """Compresses the gradients of a model under ``strategy="ddp"``.

    Args:
        codec: As of :func:`pydist.ddp.compress`. ``None``: gradients are left alone, and the
            optimizers of :mod:`pydist.optim` that vote are attached to the model; then give
            ``Trainer(gradient_clip_val=None)``, as votes leave before gradients could be clipped.
        **options: As of :func:`pydist.ddp.compress`.

    Attributes:
        state: The compression's state from ``on_fit_start`` on.
    """

    def __init__(self, codec: Any = None, **options: Any) -> None:
        self.codec, self.options = codec, options
        self.state: pydist.ddp.CompressionState | None = None
        self._loaded: list[dict[str, Any]] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Registers the hook, or attaches the optimizers."""
        model = trainer.strategy.model
        if self.codec is None:
            for optimizer in trainer.optimizers:
                if hasattr(optimizer, "attach") and isinstance(model, DistributedDataParallel):
                    optimizer.attach(model)
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.state = pydist.ddp.compress(model, self.codec, scaler=scaler, **self.options)
        if self._loaded is not None:
            self.state.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the numbers of the state, or of the optimizers."""
        if self.state is not None:
            pl_module.log_dict({f"pydist/{k}": v for k, v in self.state.scalars().items()})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gathers what differs by rank; Lightning calls this on every rank, and rank 0 writes."""
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.consolidate_state_dict()
        if self.state is not None:
            # From the host: else every rank would get all others' tensors on their devices.
            mine = tree_map_only(Tensor, Tensor.cpu, self.state.state_dict())
            everyone: list[Any] = [mine] * trainer.world_size
            if trainer.world_size > 1:
                dist.all_gather_object(everyone, mine)
            checkpoint["pydist"] = everyone

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes back what all ranks had; also in a world of another size."""
        self._loaded = checkpoint.get("pydist")
        if self.state is not None and self._loaded is not None:
            self.state.load_state_dict(self._loaded)
            self._loaded = None
