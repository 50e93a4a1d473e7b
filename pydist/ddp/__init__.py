"""Compressed gradients for DistributedDataParallel: a communication hook and its state."""

from __future__ import annotations

from pydist.ddp.hook import compression_hook
from pydist.ddp.install import compress, restore
from pydist.ddp.state import CompressionState
from pydist.training.advice import Advice
from pydist.training.schedule import Schedule
from pydist.training.sharded import saved_world_size

__all__ = [
    "Advice",
    "CompressionState",
    "Schedule",
    "compress",
    "compression_hook",
    "restore",
    "saved_world_size",
]
