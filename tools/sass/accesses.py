"""Loads, stores and atomic operations, in global and in shared memory."""

from __future__ import annotations

import numpy as np

from sass.decode import Instruction, Operand
from sass.integers import U32, U64, only
from sass.lanes import Get, Lanes, Mask, Run, UnknownInstruction
from sass.memory import Memory

SHARED_BASE = 0x400  # of what a kernel declares; the system has the bytes before it
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
HINTS = ("E", "EF", "EL", "LU", "NA", "CONSTANT", "STRONG", "GPU", "SYS", "SM", "WEAK")
ATOMICS = {"OR": np.bitwise_or, "AND": np.bitwise_and, "XOR": np.bitwise_xor, "ADD": np.add,
           "MIN": np.minimum, "MAX": np.maximum}  # fmt: skip


class Shared:
    """The shared memory of some blocks, behind one another."""

    def __init__(self, blocks: int, size: int) -> None:
        self._size = -(-size // 16) * 16
        self._words = np.zeros(blocks * self._size // 4, U32)

    def places(self, address: np.ndarray, blocks: np.ndarray, width: int) -> np.ndarray:
        """Where bytes of a block are among those of all.

        Raises:
            IndexError: An address is misaligned or outside of the block's memory.
        """
        at = address.astype(np.int64)
        wrong = (at < SHARED_BASE) | (at + width > self._size) | (at % width != 0)
        if wrong.any():
            raise IndexError(f"{width} bytes of shared memory at {int(at[wrong][0]):#x}")
        return at + blocks * self._size

    def view(self, width: int) -> np.ndarray:
        """All of it in elements of 1, 2 or 4 bytes."""
        return self._words.view(f"u{width}")


class Accesses:
    """Makes what executes an access.

    Args:
        lanes: The registers.
        memory: Global memory.
        shared: Shared memory.
        blocks: The block of every lane.
        waits: Called with the registers that a load from global memory writes, as bits, and how
            long it takes.
    """

    def __init__(
        self, lanes: Lanes, memory: Memory, shared: Shared, blocks: np.ndarray, waits
    ) -> None:
        self._lanes, self._memory, self._shared = lanes, memory, shared
        self._blocks, self._waits = blocks, waits

    MAKERS = {
        "LDG": "_load", "LD": "_load", "STG": "_store", "ST": "_store", "REDG": "_reduce",
        "RED": "_reduce", "LDS": "_load_shared", "STS": "_store_shared", "ATOMS": "_atomic_shared",
    }  # fmt: skip

    def make(self, one: Instruction) -> Run:
        """What executes an instruction of ``MAKERS``."""
        maker: Run = getattr(self, self.MAKERS[one.name])(one)
        return maker

    # ----------------------------------------------------------------- addresses

    def _address(self, operand: Operand, *, shared: bool = False) -> Get:
        """Base, uniform register and offset; 64 bits in global memory."""
        lanes, offset = self._lanes, operand.index
        base, uniform = operand.base, operand.uniform
        if shared:
            parts = [lanes.u32(o) for o in (base, uniform) if o is not None]
            return lambda: sum((part() for part in parts), U32(offset % 2**32))
        if base is None or base.part != "64":
            raise ValueError(f"{operand.text}: an address that is not of 64 bits")
        pair = lanes.u64(base)
        more = lanes.u64(uniform) if uniform is not None else None
        signed = U64((offset + 2**31) % 2**32 - 2**31 & (2**64 - 1))
        return lambda: pair() + signed + (more() if more is not None else U64(0))

    def _active(self, mask: Mask) -> np.ndarray:
        return self._lanes.numbers if mask is None else np.flatnonzero(mask)

    @staticmethod
    def _width(one: Instruction) -> int:
        only(one, *WIDTHS, *HINTS)
        return next((WIDTHS[m] for m in one.modifiers if m in WIDTHS), 4)

    # ----------------------------------------------------------------- global

    def _load(self, one: Instruction) -> Run:
        target, place = one.operands
        width, get = self._width(one), self._address(place)
        signed = next((m for m in one.modifiers if m in ("S8", "S16")), None)
        targets = [self._lanes.registers[target.index + i] for i in range(max(1, width // 4))]
        written = ((1 << len(targets)) - 1) << target.index

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            words, duration = self._memory.load(get()[lanes], lanes, width)
            if signed:
                words = words.astype(f"u{width}").view(f"i{width}").astype(np.int32).view(U32)
            for i, register in enumerate(targets):
                register[lanes] = words[:, i]
            self._waits(written, duration)

        return run

    def _store(self, one: Instruction) -> Run:
        place, source = one.operands
        width, get = self._width(one), self._address(place)
        sources = [self._lanes.words(source, i) for i in range(max(1, width // 4))]

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            words = np.stack([register[lanes] for register in sources], axis=1)
            self._memory.store(get()[lanes], lanes, width, words)

        return run

    def _reduce(self, one: Instruction) -> Run:
        modifiers = only(one, *ATOMICS, *HINTS, "64", "S64", "U64", "S32", "U32")
        ufunc = next(ATOMICS[m] for m in one.modifiers if m in ATOMICS)
        place, source = one.operands
        wide = bool(modifiers & {"64", "S64", "U64"})
        kind = np.dtype(f"{'i' if modifiers & {'S64', 'S32'} else 'u'}{8 if wide else 4}")
        address = self._address(place)
        get = self._lanes.u64(source) if wide else self._lanes.u32(source)

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            values = get()[lanes].view(kind)
            self._memory.atomic(address()[lanes], kind.itemsize, values, ufunc)

        return run

    # ----------------------------------------------------------------- shared

    def _load_shared(self, one: Instruction) -> Run:
        target, place = one.operands
        width, get = self._width(one), self._address(place, shared=True)
        if set(one.modifiers) & {"S8", "S16"}:
            raise UnknownInstruction(one)
        targets = [self._lanes.registers[target.index + i] for i in range(max(1, width // 4))]
        unit = min(width, 4)

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            at = self._shared.places(get()[lanes], self._blocks[lanes], width) // unit
            for i, register in enumerate(targets):
                register[lanes] = self._shared.view(unit)[at + i]

        return run

    def _store_shared(self, one: Instruction) -> Run:
        place, source = one.operands
        width, get = self._width(one), self._address(place, shared=True)
        sources = [self._lanes.words(source, i) for i in range(max(1, width // 4))]
        unit = min(width, 4)

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            at = self._shared.places(get()[lanes], self._blocks[lanes], width) // unit
            for i, register in enumerate(sources):
                self._shared.view(unit)[at + i] = register[lanes].astype(f"u{unit}")

        return run

    def _atomic_shared(self, one: Instruction) -> Run:
        """Lanes come one after another. Old values may be read of sums; POPC.INC adds 1 a lane."""
        modifiers = only(one, *ATOMICS, "POPC", "INC", "32", "S32", "U32")
        target, place, *source = one.operands
        counting = "POPC" in modifiers
        unread = target.text == "RZ"
        if ("INC" in modifiers and not counting) or not (unread or one.modifiers == ("ADD",)):
            raise UnknownInstruction(one)
        ufunc = np.add if counting else next(ATOMICS[m] for m in one.modifiers if m in ATOMICS)
        address = self._address(place, shared=True)
        get = None if counting else self._lanes.u32(source[0])
        kind = np.int32 if "S32" in modifiers else U32
        old = None if unread else self._lanes.registers[target.index]

        def run(mask: Mask) -> None:
            lanes = self._active(mask)
            at = self._shared.places(address()[lanes], self._blocks[lanes], 4) // 4
            values = np.ones(len(lanes), kind) if get is None else get()[lanes].view(kind)
            view = self._shared.view(4).view(kind)
            if old is not None:
                old[lanes] = view[at] + _sums_before(at, values)
            ufunc.at(view, at, values)

        return run


def _sums_before(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the sum of those before it that go to the same place."""
    order = np.argsort(at, kind="stable")
    before = np.cumsum(values[order], dtype=values.dtype) - values[order]
    _, first, group = np.unique(at[order], return_index=True, return_inverse=True)
    found = np.empty_like(values)
    found[order] = before - before[first][group]
    return found
