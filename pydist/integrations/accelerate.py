"""Accelerate: a handler that registers the hook, and keeps what differs by rank in checkpoints.

    handler = CompressKwargs(codec=pydist.QSGD(bits=4))
    accelerator = Accelerator()
    handler.install(accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)

``save_state`` and ``load_state`` then keep residuals, in a file per rank, and all ranks' momenta.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import pydist

OURS = ("codec", "options", "states")
TORCHS = ("comm_hook", "comm_wrapper", "comm_state_option")


@dataclass
class CompressKwargs(DistributedDataParallelKwargs):
    """Arguments of DistributedDataParallel, and of :func:`pydist.ddp.compress`.

    Attributes:
        codec: As of :func:`pydist.ddp.compress`; ``None`` leaves gradients alone, for an optimizer
            of :mod:`pydist.optim`.
        options: Its other arguments; ``scaler`` is Accelerate's own where none is given.
        states: The compression's states, a model's after another's, as ``prepare`` wraps them.
    """

    codec: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    states: list[pydist.ddp.CompressionState] = field(default_factory=list)

    def install(self, accelerator: Accelerator) -> None:
        """Before ``prepare``. ``kwargs_handlers`` takes Accelerate's own classes alone."""
        accelerator.ddp_handler = self
        self.options.setdefault("scaler", accelerator.scaler)

        def files(folder: str, number: int) -> list[Path]:
            return sorted(Path(folder).glob(f"pydist_{number}_*.pt"))

        def save(models: Any, weights: Any, folder: str) -> None:
            for optimizer in accelerator._optimizers:  # rank 0 writes them, for everyone
                inner = getattr(optimizer, "optimizer", optimizer)
                if hasattr(inner, "consolidate_state_dict"):
                    inner.consolidate_state_dict()
            for number, state in enumerate(self.states):
                name = f"pydist_{number}_{accelerator.process_index:05d}.pt"
                torch.save(state.state_dict(), Path(folder) / name)

        def load(models: Any, folder: str) -> None:
            for number, state in enumerate(self.states):
                saved = [torch.load(file, weights_only=True) for file in files(folder, number)]
                if not saved:
                    warnings.warn(f"{folder} has no residuals: they begin at zero", stacklevel=2)
                else:
                    state.load_state_dict(saved)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def to_dict(self, ignore_keys: tuple[str, ...] = TORCHS) -> dict[str, Any]:
        """What DistributedDataParallel is given; nothing is copied, as groups cannot be."""
        left_out = (*ignore_keys, *OURS)
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def register_comm_hook(self, model: torch.nn.Module) -> None:
        """Accelerate calls this with the wrapped model."""
        if self.codec is not None:
            self.states.append(pydist.ddp.compress(model, self.codec, **self.options))
