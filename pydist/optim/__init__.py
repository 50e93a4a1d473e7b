"""Optimizers whose updates travel compressed."""

from __future__ import annotations

from pydist.optim.checkpoint import saved_world_size
from pydist.optim.lion import DistributedLion
from pydist.optim.onebit_adam import OneBitAdam
from pydist.optim.onebit_lamb import OneBitLamb
from pydist.optim.signum import SignSGD, Signum
from pydist.optim.zero_one_adam import ZeroOneAdam

__all__ = [
    "DistributedLion",
    "OneBitAdam",
    "OneBitLamb",
    "SignSGD",
    "Signum",
    "ZeroOneAdam",
    "saved_world_size",
]
