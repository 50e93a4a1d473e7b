"""Both doors, `pydist.ops` and `pydist.arrays`, as runners of the self-check; and emulated CUDA.

A door can hold its arrays in awkward places: behind an odd offset, or strided. Around each array
lie guard bytes; a kernel that writes there, or into one of its inputs, fails the test.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from guarded import guarded_bytes

from pydist import _C, arrays, ops
from pydist.kernels.register import KERNELS
from pydist.selfcheck import Bits, Runner, assert_same_bits

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

HOST_DOORS = [(kind, isa) for kind in ("torch", "numpy") for isa in _C.supported_isas()]
EMULATED_DOORS = [("emulated", f"seed{seed}") for seed in emulated.SEEDS]
DOORS = HOST_DOORS + EMULATED_DOORS
DOOR_PARAMS = [pytest.param(key, id="-".join(key)) for key in HOST_DOORS] + [
    pytest.param(key, id="-".join(key), marks=emulated.MARKS) for key in EMULATED_DOORS
]
# For tests that compare several doors with one costly reference.
DOOR_GROUPS = [
    pytest.param(HOST_DOORS, id="host"),
    pytest.param(EMULATED_DOORS, id="emulated", marks=emulated.MARKS),
]
GUARD = 0x5A
PRESET_FLAG = 1 << 20  # some other bit, which kernels must leave alone


class Placed:
    """An array somewhere inside a larger block of guard bytes; or right before a guard page."""

    def __init__(self, what: str, bits: Bits, layout: str, *, guard_page: bool = False) -> None:
        self.what, self.original = what, bits
        offset = {"dense": 64, "offset": bits.itemsize, "unaligned": 1, "strided": 0}[layout]
        step = 2 if layout == "strided" else 1
        size = offset + step * bits.nbytes
        self.memory = guarded_bytes(size, at_end=True) if guard_page else np.empty(size + 64, "u1")
        self.memory[...] = GUARD
        self.bits = self._inside(self.memory, offset, step)
        self.bits[...] = bits
        before = self.memory.copy()
        self._before, self._inside_before = before, self._inside(before, offset, step)

    def _inside(self, memory: Any, offset: int, step: int) -> Bits:
        bits = self.original
        room = memory[offset : offset + step * bits.nbytes].view(bits.dtype)
        return room.reshape(*bits.shape, step)[..., 0]

    def unchanged(self) -> None:
        assert_same_bits(self.memory, self._before, f"{self.what} is an input: memory")

    def result(self) -> Bits:
        """A copy of what was written, once it is clear that nothing else was."""
        self._inside_before[...] = self.bits
        assert_same_bits(self.memory, self._before, f"memory around {self.what}")
        return self.bits.copy()


@dataclasses.dataclass
class Door(Runner):
    """One door, instruction set (emulated: order of threads), layout of arrays, CPU threads."""

    kind: str
    isa: str
    layout: str = "dense"
    threads: int = 1
    separate: bool = False  # lion_pack_ with momentum_out

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kind} {self.isa} {self.layout} threads={self.threads}"

    @property
    def module(self) -> ModuleType:
        return ops if self.kind == "torch" else arrays

    @property
    def storages(self) -> tuple[str, ...]:
        """NumPy knows bfloat16 only where ml_dtypes is installed."""
        known = self.kind == "torch" or ml_dtypes is not None
        return ("float32", "float16", "bfloat16") if known else ("float32", "float16")

    @property
    def layouts(self) -> tuple[str, ...]:
        """Only NumPy has arrays whose address is not a multiple of the element's size."""
        return ("offset", "strided") + (("unaligned",) if self.kind == "numpy" else ())

    def using(self, **changes: Any) -> Door:
        return dataclasses.replace(self, **changes)

    def native(self, bits: Bits | None) -> Any:
        """The same memory as an array of this door."""
        if bits is None:
            return None
        if self.kind == "torch":
            tensor = torch.from_numpy(bits)
            return tensor.view(torch.bfloat16) if bits.dtype == np.uint16 else tensor
        return bits.view(ml_dtypes.bfloat16) if bits.dtype == np.uint16 else bits

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the door; tensors that come back are NumPy arrays."""
        if self.kind == "emulated":
            with emulated.running(int(self.isa.removeprefix("seed"))):
                return self._bits(getattr(arrays, function)(*args, **kwargs))
        isa, threads = _C.current_isa(), torch.get_num_threads()
        _C.select_isa(self.isa)
        if self.kind == "torch":
            torch.set_num_threads(self.threads)
        else:
            kwargs["threads"] = self.threads
        try:
            result = getattr(self.module, function)(*args, **kwargs)
        finally:
            _C.select_isa(isa)
            torch.set_num_threads(threads)
        return self._bits(result)

    @staticmethod
    def _bits(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            result = result.view(torch.uint16) if result.dtype == torch.bfloat16 else result
            return result.numpy()
        if result is not None and result.dtype.name == "bfloat16":
            return result.view(np.uint16)
        return result

    # ----------------------------------------------------------------- selfcheck.Runner

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls a function on arrays between guard bytes; see ``selfcheck.Runner.run``."""
        kernel = KERNELS[name]
        separate = self.separate and name == "lion_pack_"
        writes = set(kernel.writes) - ({"momentum"} if separate else set())
        placed = {
            key: self._place(key, x)
            for key, x in [*zip(kernel.parameters, args, strict=False), *options.items()]
            if isinstance(x, np.ndarray) and key != "segments"
        }
        if separate:
            placed["momentum_out"] = self._place("momentum_out", np.zeros_like(args[1]))
        given = dict(zip(kernel.parameters, args, strict=False)) | options
        given |= {key: native for key, (_, native) in placed.items()}
        if "dtype" in given:
            given["dtype"] = self._dtype(given["dtype"])
        if given.get("segments") is not None:
            given["segments"] = self.native(given["segments"])
        if "flags" in writes:
            flags, given["flags"] = self._flags()
        try:
            result = self.call(name, **given)
        finally:
            for key in placed.keys() - writes:
                placed[key][0].unchanged()
        found = [result] if kernel.result is not None else []
        changed = placed.keys() & writes
        found += [placed[key][0].result() for key in kernel.parameters if key in changed]
        if "flags" in writes:
            found.append(self._raised(flags))
        return found[0] if len(found) == 1 else tuple(found)

    def _place(self, what: str, bits: Bits) -> tuple[Placed, Any]:
        guard_page = self.kind == "emulated" and not self.isa.endswith("1")
        placed = Placed(what, np.ascontiguousarray(bits), self.layout, guard_page=guard_page)
        return placed, self.native(placed.bits)

    def _flags(self) -> tuple[Any, Any]:
        flags = np.array([PRESET_FLAG], dtype=np.int32)
        return flags, self.native(flags)

    @staticmethod
    def _raised(flags: Any) -> int:
        assert flags[0] & PRESET_FLAG, "a flag that was there before is gone"
        return int(flags[0]) & ~PRESET_FLAG

    def _dtype(self, storage: str) -> Any:
        if self.kind == "torch":
            return getattr(torch, storage)
        return ml_dtypes.bfloat16 if storage == "bfloat16" else storage
