"""Arrays for the tables of wrong input, made by one door or the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from doors import HOST_DOORS, Door

BETAS = {"beta1": 0.9, "beta2": 0.99}


class Arrays:
    """Makes arrays of one door, and has the functions of that door."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.door = Door(kind, HOST_DOORS[0][1])

    def __getattr__(self, function: str) -> Any:
        return getattr(self.door.module, function)

    def f(self, *shape: int, dtype: str = "float32") -> Any:
        return self.door.native(np.ones(shape, dtype=dtype))

    def u(self, *shape: int, dtype: str = "uint8") -> Any:
        return self.door.native(np.zeros(shape, dtype=dtype))

    def table(self, *rows: tuple[int, int, int, int], dtype: str = "int64") -> Any:
        return self.door.native(np.array(rows, dtype=dtype).reshape(-1, 4))
