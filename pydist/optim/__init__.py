"""Optimizers whose updates travel compressed."""

from __future__ import annotations

from pydist.optim.lion import DistributedLion
from pydist.optim.onebit_adam import OneBitAdam
from pydist.optim.signum import SignSGD, Signum

__all__ = ["DistributedLion", "OneBitAdam", "SignSGD", "Signum"]
