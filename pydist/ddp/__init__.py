"""Compressed gradients for DistributedDataParallel: a communication hook and its state."""

from __future__ import annotations

from pydist.ddp.hook import compression_hook
from pydist.ddp.install import compress, restore
from pydist.ddp.schedule import Schedule
from pydist.ddp.sharded import saved_world_size
from pydist.ddp.state import CompressionState
from pydist.training.advice import Advice

__all__ = [
    "Advice",
    "CompressionState",
    "Schedule",
    "compress",
    "compression_hook",
    "restore",
    "saved_world_size",
]
