"""Runs the package's kernels on their machine code: from the launchers to the machine.

The launchers are the package's own, compiled as ever; a runtime of ours (runtime.cpp) hands what
they launch to :class:`Executor`: which instance, how many blocks, which parameters.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ptxas

from sass.cubin import PARAMETERS, Cubins, Kernel
from sass.decode import Instruction, decode
from sass.lanes import WARP
from sass.machine import Launch, execute
from sass.memory import Memory, Traffic

MODULE = "_C_sass"
DESCRIPTOR, STACK = 0x208, 0x28  # places in the constant bank
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p)
)


@dataclass
class Done:
    """A launch that has run.

    Attributes:
        kernel: Symbol of the instance.
        launch: What it issued.
        traffic: What it moved.
        asked: Blocks that the launcher asked for.
        registers: Of a thread.
        resident: Warps that a multiprocessor holds.
    """

    kernel: str
    launch: Launch
    traffic: Traffic
    asked: int
    registers: int
    resident: int


def load_module(folder: Path) -> Any:
    """The launchers, out of a build folder."""
    (path,) = folder.glob(f"{MODULE}*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Executor:
    """What launches end in.

    Args:
        folder: A build folder with objects and launchers.
        usages: What ptxas reported of each kernel, by its symbol.

    Attributes:
        module: The launchers.
        buffers: Address and bytes of what kernels may touch.
        grids: Blocks for the coming launches, in place of what the launchers ask for.
        done: Launches since it was emptied.
    """

    def __init__(self, folder: Path, usages: dict[str, ptxas.Usage]) -> None:
        self.module = load_module(folder)
        self.cubins = Cubins(sorted(folder.rglob("csrc/cuda/**/*.cu.o")))
        self.buffers: list[tuple[int, int]] = []
        self.grids: list[int] = []
        self.done: list[Done] = []
        self._usages = usages
        self._code: dict[str, list[Instruction]] = {}
        self._raised: BaseException | None = None
        self._callback = _CALLBACK(self._on_launch)  # lives as long as the module calls it
        ctypes.CDLL(self.module.__file__).sass_on_launch(self._callback)

    def code(self, kernel: Kernel) -> list[Instruction]:
        """A kernel's instructions."""
        if kernel.name not in self._code:
            self._code[kernel.name] = decode(kernel.text)
        return self._code[kernel.name]

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raises in Python what a launch has raised below C++."""
        self._raised = None
        try:
            yield
        except RuntimeError:
            if self._raised is not None:
                raise self._raised from None
            raise

    def _on_launch(self, name: bytes, shape: Any, parameters: Any) -> int:
        try:
            self._launch(name.decode(), shape[0], shape[1], shape[2], parameters)
        except BaseException as error:  # nothing may leave a callback
            self._raised = error
            return 1
        return 0

    def _launch(self, name: str, grid: int, block: int, dynamic: int, parameters: Any) -> None:
        kernel = self.cubins[name]
        asked, grid = grid, self.grids.pop(0) if self.grids else grid
        bank = bytearray(PARAMETERS + max((at + size for at, size in kernel.parameters), default=0))
        for place, number in ((0, block), (4, 1), (8, 1), (12, grid), (16, 1), (20, 1)):
            bank[place : place + 4] = number.to_bytes(4, "little")
        for i, (at, size) in enumerate(kernel.parameters):
            start = PARAMETERS + at
            bank[start : start + size] = ctypes.string_at(parameters[i], size)
        launch = Launch(self.code(kernel), bytes(bank), kernel.shared + dynamic, grid, block)
        usage = self._usages[name]
        usage = replace(usage, shared=usage.shared + dynamic)
        resident = (usage.blocks_per_sm(block) or 1) * block // WARP
        memory = Memory(self.buffers, resident)
        execute(launch, memory)
        self.done.append(Done(name, launch, memory.traffic, asked, usage.registers, resident))


def base_name(symbol: str) -> str:
    """``quantize`` of the mangled name of ``quantize_kernel<float, false>``."""
    at = 0
    while match := re.compile(r"\d+").search(symbol, at):
        # Digits of a hash may stand before a length: any that fits counts.
        for start in range(match.start(), match.end()):
            name = symbol[match.end() : match.end() + int(symbol[start : match.end()])]
            if re.fullmatch(r"[a-z]\w*_kernel", name) and symbol[match.end() + len(name)] in "IE":
                return name.removesuffix("_kernel")
        at = match.end()
    return symbol
