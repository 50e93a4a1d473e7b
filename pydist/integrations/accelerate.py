"""Accelerate: a handler that registers the hook, and keeps what differs by rank in checkpoints.

    handler = CompressKwargs(codec=pydist.QSGD(bits=4))
    accelerator = Accelerator()
    handler.install(accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)

``save_state`` and ``load_state`` then keep residuals, in a file per rank, and all ranks' momenta.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import pydist

OURS = ("codec", "options", "state")
TORCHS = ("comm_hook", "comm_wrapper", "comm_state_option")


@dataclass
class CompressKwargs(DistributedDataParallelKwargs):
    """Arguments of DistributedDataParallel, and of :func:`pydist.ddp.compress`.

    Attributes:
        codec: As of :func:`pydist.ddp.compress`; ``None`` leaves gradients alone, for an optimizer
            of :mod:`pydist.optim`.
        options: Its other arguments.
        state: The compression's state, once ``accelerator.prepare`` has wrapped the model.
    """

    codec: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    state: Any = None

    def install(self, accelerator: Accelerator) -> None:
        """Before ``prepare``. ``kwargs_handlers`` takes Accelerate's own classes alone."""
        accelerator.ddp_handler = self

        def file(folder: str) -> Path:
            return Path(folder) / f"pydist_{accelerator.process_index:05d}.pt"

        def save(models: Any, weights: Any, folder: str) -> None:
            for optimizer in accelerator._optimizers:  # rank 0 writes them, for everyone
                inner = getattr(optimizer, "optimizer", optimizer)
                if hasattr(inner, "consolidate_state_dict"):
                    inner.consolidate_state_dict()
            if self.state is not None:
                torch.save(self.state.state_dict(), file(folder))

        def load(models: Any, folder: str) -> None:
            if self.state is not None:
                self.state.load_state_dict(torch.load(file(folder), weights_only=True))

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def to_dict(self, ignore_keys: tuple[str, ...] = TORCHS) -> dict[str, Any]:
        """What DistributedDataParallel is given."""
        return super().to_dict((*ignore_keys, *OURS))

    def register_comm_hook(self, model: torch.nn.Module) -> None:
        """Accelerate calls this with the wrapped model."""
        if self.codec is not None:
            self.state = pydist.ddp.compress(model, self.codec, **self.options)
