"""Optimizers whose updates travel compressed."""

from __future__ import annotations

from pydist.optim.lion import DistributedLion

__all__ = ["DistributedLion"]
