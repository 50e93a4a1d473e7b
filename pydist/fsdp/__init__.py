"""Compressed gradients and weights for fully sharded training."""

from __future__ import annotations

from pydist.fsdp.flat import CompressionState, compression_hook
from pydist.fsdp.install import compress, restore
from pydist.fsdp.state import ShardedState

__all__ = ["CompressionState", "ShardedState", "compress", "compression_hook", "restore"]
