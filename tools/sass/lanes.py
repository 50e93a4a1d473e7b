"""The registers of all lanes of a launch, and how operations read and write them.

All warps run side by side: a register is a vector with an element a lane. A mask says which lanes
take part; None stands for all of them. Uniform registers hold their warp's value in every lane.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sass.decode import TRUE, UNIFORM_ZERO, ZERO, Instruction, Operand

WARP = 32
ABSOLUTE, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)

Mask = np.ndarray | None
Get = Callable[[], np.ndarray]
Put = Callable[[np.ndarray, Mask], None]
Run = Callable[[Mask], None]


class UnknownInstruction(NotImplementedError):
    """An instruction, or a form of one, that the machine does not execute."""

    def __init__(self, one: Instruction) -> None:
        super().__init__(f"no semantics for instruction {one.at}: {one.text}")


class Lanes:
    """Registers and predicates of ``n`` lanes, and the constant bank."""

    def __init__(self, n: int, constants: bytes) -> None:
        self.n = n
        self.registers = np.zeros((ZERO + 1, n), np.uint32)
        self.uniform = np.zeros((UNIFORM_ZERO + 1, n), np.uint32)
        self.predicates = np.zeros((TRUE + 1, n), bool)
        self.uniform_predicates = np.zeros((TRUE + 1, n), bool)
        self.predicates[TRUE] = self.uniform_predicates[TRUE] = True
        self.constants = constants
        self.numbers = np.arange(n)
        self.special: dict[str, np.ndarray] = {}  # special registers by name

    # ----------------------------------------------------------------- reading

    def words(self, operand: Operand, more: int = 0) -> np.ndarray:
        """The register itself, or a constant for all lanes; ``more`` registers further on."""
        index = operand.index
        if operand.kind == "R":
            return self.registers[index + more if index != ZERO else ZERO]
        if operand.kind == "UR":
            return self.uniform[index + more if index != UNIFORM_ZERO else UNIFORM_ZERO]
        if operand.kind == "c":
            at = index + 4 * more
            return np.full(self.n, int.from_bytes(self.constants[at : at + 4], "little"), np.uint32)
        if operand.kind == "int":
            return np.full(self.n, 0 if more else index, np.uint32)
        if operand.kind == "float":
            return np.full(self.n, operand.value, np.float32).view(np.uint32)
        raise ValueError(f"{operand.text} is no number")

    def u32(self, operand: Operand) -> Get:
        """As an integer, with its sign or complement."""
        words = self.words(operand)
        if operand.absolute:
            raise ValueError(f"{operand.text}: bars around an integer")
        if operand.negated:
            return lambda: ~words + np.uint32(1)
        return (lambda: ~words) if operand.inverted else (lambda: words)

    def i32(self, operand: Operand) -> Get:
        """As a signed integer."""
        get = self.u32(operand)
        return lambda: get().view(np.int32)

    def wide(self, operand: Operand) -> Get:
        """As one addend of a sum with carries: the complement and 1 where it is negated."""
        words = self.words(operand)
        if operand.negated:
            return lambda: (~words).astype(np.uint64) + np.uint64(1)
        if operand.inverted:
            return lambda: (~words).astype(np.uint64)
        return lambda: words.astype(np.uint64)

    def u64(self, operand: Operand) -> Get:
        """A pair of registers."""
        low, high = self.words(operand), self.words(operand, 1)
        if operand.negated or operand.inverted or operand.absolute:
            raise ValueError(f"{operand.text}: a pair with a sign")
        return lambda: low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def bits(self, operand: Operand) -> Get:
        """The bits of a float32, with sign and bars."""
        words = self.words(operand)
        if operand.absolute and operand.negated:
            return lambda: words | SIGN
        if operand.absolute:
            return lambda: words & ABSOLUTE
        return (lambda: words ^ SIGN) if operand.negated else (lambda: words)

    def f32(self, operand: Operand) -> Get:
        """As a float32."""
        get = self.bits(operand)
        return lambda: get().view(np.float32)

    def predicate(self, operand: Operand) -> Get:
        """A predicate, or its opposite."""
        file = self.predicates if operand.kind == "P" else self.uniform_predicates
        held = file[operand.index]
        return (lambda: ~held) if operand.negated else (lambda: held)

    # ----------------------------------------------------------------- writing

    def put(self, operand: Operand, more: int = 0) -> Put:
        """Writes 32-bit words (or float32) into a register."""
        uniform = operand.kind == "UR"
        file, zero = (self.uniform, UNIFORM_ZERO) if uniform else (self.registers, ZERO)
        if operand.kind not in ("R", "UR"):
            raise ValueError(f"{operand.text} cannot be written")
        if operand.index == zero:
            return lambda value, mask: None
        held = file[operand.index + more]

        def write(value: np.ndarray, mask: Mask) -> None:
            if mask is None:
                held[:] = value.view(np.uint32)
            else:
                where = self.whole_warps(mask) if uniform else mask
                np.copyto(held, value.view(np.uint32), where=where)

        return write

    def put64(self, operand: Operand) -> Put:
        """Writes 64-bit words into a pair."""
        low, high = self.put(operand), self.put(operand, 1)

        def write(value: np.ndarray, mask: Mask) -> None:
            low(value.astype(np.uint32), mask)
            high((value >> np.uint64(32)).astype(np.uint32), mask)

        return write

    def put_predicate(self, operand: Operand) -> Put:
        """Writes booleans."""
        uniform = operand.kind == "UP"
        if operand.index == TRUE:
            return lambda value, mask: None
        held = (self.uniform_predicates if uniform else self.predicates)[operand.index]

        def write(value: np.ndarray, mask: Mask) -> None:
            if mask is None:
                held[:] = value
            else:
                np.copyto(held, value, where=self.whole_warps(mask) if uniform else mask)

        return write

    # ----------------------------------------------------------------- warps

    def whole_warps(self, mask: np.ndarray) -> np.ndarray:
        """All lanes of the warps that have a lane in the mask."""
        return np.repeat(mask.reshape(-1, WARP).any(1), WARP)

    def warps(self, mask: Mask) -> int:
        """How many warps have a lane in the mask."""
        return self.n // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())

    def ballot(self, votes: np.ndarray, mask: Mask) -> np.ndarray:
        """Bit l of a warp's word: whether its lane l takes part and votes so."""
        votes = votes if mask is None else votes & mask
        return np.repeat(np.packbits(votes, bitorder="little").view(np.uint32), WARP)
