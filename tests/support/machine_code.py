"""The kernels' sm_90 code, executed: `tools/sass` for tests, and memory for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydist import selfcheck
from pydist.kernels.launch import LaunchTarget
from pydist.selfcheck import Bits

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "ptxas"
sys.path += [str(ROOT / "tools"), str(ROOT / "bench")]

import kernel_model as model  # noqa: E402

BUILT = pytest.mark.skipif(
    not list(FOLDER.glob("_C_sass*")), reason="the machine code is not there: `make sass`"
)


class Memory(selfcheck.HostMemory):
    """Host arrays that kernels on the machine code may touch, until they are forgotten."""

    def __init__(self, executor: Any) -> None:
        super().__init__("none")
        self.name = "sm_90 code"
        self.executor = executor
        self._kept: list[Bits] = []

    def forget(self) -> None:
        """Ends the life of all arrays."""
        self._kept.clear()
        self.executor.buffers.clear()
        self.executor.done.clear()

    def put(self, array: Bits) -> Bits:
        held = array.copy()
        self._kept.append(held)
        self.executor.buffers.append((self.address(held), held.nbytes))
        return held

    def device(self) -> str:
        return "cuda:0"

    def target(self) -> LaunchTarget:
        def upload(rows: Any) -> tuple[int, object]:
            table = self.put(rows)
            return self.address(table), table

        def scratch(size: int) -> tuple[int, object]:
            room = self.put(np.full(size, 0xA5, np.uint8))
            return self.address(room), room

        return LaunchTarget(stream=0, upload=upload, scratch=scratch, module=self.executor.module)


__all__ = ["BUILT", "FOLDER", "Memory", "model"]
