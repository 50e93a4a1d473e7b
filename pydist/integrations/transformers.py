"""Transformers: a mixin for ``Trainer`` that compresses, saves and resumes.

    class CompressedTrainer(CompressMixin, Trainer):
        codec, options = pydist.QSGD(bits=4), {"exclude": ["*norm*"]}

    CompressedTrainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=True)

Each rank has a file of its own in the Trainer's checkpoints.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import pydist


def _inner(optimizer: Any) -> Any:
    """An optimizer without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class CompressCallback(TrainerCallback):
    """Compresses the gradients of a Trainer's DDP model; a file per rank in its checkpoints.

    Args:
        trainer: Callbacks are only given the model that is not wrapped.
        codec: As of :func:`pydist.ddp.compress`. ``None``: the optimizer votes, if it is one of
            :mod:`pydist.optim` that can, and is attached; it needs ``max_grad_norm=0``.
        **options: As of :func:`pydist.ddp.compress`.

    Attributes:
        state: The compression's state; ``None`` without a codec, or in a single process.
        resume: The checkpoint that training goes on from.
    """

    def __init__(self, trainer: Trainer, codec: Any = None, **options: Any) -> None:
        self.trainer, self.codec, self.options = trainer, codec, options
        self.state: pydist.ddp.CompressionState | None = None
        self.resume: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Registers the hook and loads what this rank had; or attaches the optimizer."""
        model, optimizer = self.trainer.model_wrapped, _inner(self.trainer.optimizer)
        if not isinstance(model, DistributedDataParallel):
            return
        if self.codec is None:
            if hasattr(optimizer, "attach"):
                optimizer.attach(model)
            return
        scaler = self.trainer.accelerator.scaler
        self.state = pydist.ddp.compress(model, self.codec, scaler=scaler, **self.options)
        if self.resume is not None:  # written by as many ranks as there were then
            files = sorted(Path(self.resume).glob("pydist_*.pt"))
            if files:
                self.state.load_state_dict([torch.load(f, weights_only=True) for f in files])
            else:
                warnings.warn(f"{self.resume} has no residuals: they begin at zero", stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Saves what this rank has beside the Trainer's files."""
        if self.state is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.state.state_dict(), folder / f"pydist_{args.process_index:05d}.pt")


class CompressMixin:
    """Before ``Trainer`` among the bases: compresses, saves and resumes.

    Attributes:
        codec: As of :func:`pydist.ddp.compress`; ``None`` attaches an optimizer that votes.
        options: Its other arguments.
        compression: The callback.
    """

    codec: Any = None
    options: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compression = CompressCallback(self, self.codec, **self.options)  # type: ignore[arg-type]
        self.add_callback(self.compression)  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """``Trainer.train``, which is the only one to know where it resumes."""
        folder = resume_from_checkpoint or None
        if folder is True:
            output = self.args.output_dir  # type: ignore[attr-defined]
            folder = get_last_checkpoint(output) if Path(output).is_dir() else None
        self.compression.resume = folder
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how many times fewer bytes were sent; callbacks would come too late for that."""
        telling = self.compression.state or _inner(self.optimizer)  # type: ignore[attr-defined]
        if hasattr(telling, "stats"):
            logs["pydist_ratio"] = round(telling.stats()["ratio"], 2)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Called on every rank; rank 0 writes the optimizer, with everyone's momenta.
        optimizer = _inner(self.optimizer)  # type: ignore[attr-defined]
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
