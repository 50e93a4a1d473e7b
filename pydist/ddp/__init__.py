"""Compressed gradients for DistributedDataParallel: a communication hook and its state."""

from __future__ import annotations

from pydist.ddp.checkpoint import saved_world_size
from pydist.ddp.hook import compress, compression_hook
from pydist.ddp.schedule import Schedule
from pydist.ddp.state import CompressionState
from pydist.training.advice import Advice

__all__ = [
    "Advice",
    "CompressionState",
    "Schedule",
    "compress",
    "compression_hook",
    "saved_world_size",
]
