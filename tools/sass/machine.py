"""A multiprocessor in NumPy: executes a kernel's instructions, and counts what it issues.

Lanes whose program counter is the smallest run first, up to where others wait or a branch parts
them; so warps that have parted meet again where the compiler has put barriers. All warps of some
blocks advance side by side, each in the order in which it would run alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sass import floats, moves  # noqa: F401  (fill OPERATIONS)
from sass.accesses import Accesses, Shared
from sass.decode import ZERO, Instruction, Operand
from sass.integers import OPERATIONS
from sass.lanes import WARP, Lanes, Mask, UnknownInstruction
from sass.memory import Memory
from sass.warps import BLOCKED, Barriers

LANES_AT_ONCE = 8192
Step = Callable[[int, Mask], "int | None"]
"""Where a control instruction goes on; None where lanes have parted."""


@dataclass
class Launch:
    """A launch, and what was counted of it.

    Attributes:
        code: The kernel's instructions.
        constants: Its constant bank.
        shared: Bytes of shared memory of a block, the system's included.
        grid: Blocks.
        block: Threads of each.
        issued: Warps that issued each instruction.
        stalled: How long warps have waited for global memory, in times of a load from memory, all
            warps together.
        clock: The same, of the last to be ready.
    """

    code: list[Instruction]
    constants: bytes
    shared: int
    grid: int
    block: int
    issued: np.ndarray = field(init=False)
    stalled: float = 0.0
    clock: float = 0.0

    def __post_init__(self) -> None:
        self.issued = np.zeros(len(self.code), np.int64)

    @property
    def warps(self) -> int:
        return self.grid * self.block // WARP


def execute(launch: Launch, memory: Memory) -> None:
    """Runs all blocks, as many at a time as ``LANES_AT_ONCE`` allows."""
    at_once = max(1, LANES_AT_ONCE // launch.block)
    touched = [_registers(one) for one in launch.code]
    for first in range(0, launch.grid, at_once):
        machine = Machine(launch, memory, first, min(at_once, launch.grid - first), touched)
        with np.errstate(all="ignore"):
            machine.run()
        launch.clock = max(launch.clock, machine.clock)


def _registers(one: Instruction) -> int:
    """Registers that an instruction reads or writes, a bit each: what makes it wait for loads."""
    found = 0
    words = 4 if "128" in one.modifiers else 2 if "64" in one.modifiers else 1
    for i, operand in enumerate(one.operands):
        pair = "WIDE" in one.modifiers and i in (0, len(one.operands) - 1)
        found |= _bits(operand, 2 if pair else words)
        if operand.base is not None:
            found |= _bits(operand.base, 2 if operand.base.part == "64" else 1)
    return found


def _bits(operand: Operand, words: int) -> int:
    held = operand.kind == "R" and operand.index < ZERO
    return ((1 << words) - 1) << operand.index if held else 0


class Machine:
    """Some blocks of a launch."""

    def __init__(
        self, launch: Launch, memory: Memory, first: int, blocks: int, touched: list[int]
    ) -> None:
        n = blocks * launch.block
        self._launch, self._code, self._touched = launch, launch.code, touched
        self._lanes = lanes = Lanes(n, launch.constants)
        block = lanes.numbers // launch.block
        lanes.special = {
            "SR_TID.X": (lanes.numbers % launch.block).astype(np.uint32),
            "SR_CTAID.X": (first + block).astype(np.uint32),
            "SR_LANEID": (lanes.numbers % WARP).astype(np.uint32),
            "SR_CgaCtaId": np.zeros(n, np.uint32),
            "SRZ": np.zeros(n, np.uint32),
        }
        memory.start(n // WARP)
        shared = Shared(blocks, launch.shared)
        self._accesses = Accesses(lanes, memory, shared, block, self._wait_later)
        self._barriers = Barriers(lanes, launch.block)
        self._steps: list[Callable[..., object] | None] = [None] * len(self._code)
        self._control = [one.name in CONTROL for one in self._code]
        self.clock = 0.0
        self._pending = 0  # registers that loads still write, a bit each
        self._loads: list[tuple[int, float]] = []  # those registers, and when they have come

    # ----------------------------------------------------------------- order

    def run(self) -> None:
        """Until all lanes have exited."""
        pc = self._barriers.pc
        while self._barriers.live.any():
            at = int(pc.min())
            if at >= BLOCKED:
                raise RuntimeError("every lane waits for another: a barrier that not all reach")
            mask = pc == at
            if mask.all():
                self._straight(at, BLOCKED, None)
            else:
                self._straight(at, int(pc[~mask].min()), mask)

    def _straight(self, at: int, stop: int, mask: Mask) -> None:
        """From one instruction on, until lanes part or others wait."""
        warps = self._lanes.warps(mask)
        issued, steps, control, touched = (
            self._launch.issued,
            self._steps,
            self._control,
            self._touched,
        )
        while at < stop:
            issued[at] += warps
            if self._pending & touched[at]:
                self._wait(touched[at], warps)
            step = steps[at] or self._compile(at)
            if not control[at]:
                step(mask)
                at += 1
                continue
            following = step(at, mask)
            if following is None:
                return
            at = following
        self._barriers.go(at, mask)

    def _compile(self, at: int) -> Callable[..., object]:
        one = self._code[at]
        if one.name in CONTROL:
            step: Callable[..., object] = CONTROL[one.name](self, one)
        else:
            maker = OPERATIONS.get(one.name)
            if maker is None and one.name not in Accesses.MAKERS:
                raise UnknownInstruction(one)
            try:
                run = maker(one, self._lanes) if maker else self._accesses.make(one)
            except ValueError as error:
                raise UnknownInstruction(one) from error
            step = self._guarded(one, run)
        self._steps[at] = step
        return step

    def _guard(self, one: Instruction) -> Callable[[Mask], Mask]:
        """The lanes of a mask for which the instruction's predicate holds."""
        if one.guard is None:
            return lambda mask: mask
        held = self._lanes.predicate(one.guard)

        def guarded(mask: Mask) -> Mask:
            found = held() if mask is None else held() & mask
            return None if found.all() else found.copy()

        return guarded

    def _guarded(self, one: Instruction, run: Callable[[Mask], None]) -> Callable[[Mask], None]:
        if one.guard is None:
            return run
        guard = self._guard(one)

        def step(mask: Mask) -> None:
            lanes = guard(mask)
            if lanes is None or lanes.any():
                run(lanes)

        return step

    # ----------------------------------------------------------------- waiting for memory

    def _wait_later(self, registers: int, duration: float) -> None:
        self._pending |= registers
        self._loads.append((registers, self.clock + duration))

    def _wait(self, registers: int, warps: int) -> None:
        """Advances the clock to when the registers have come; loads issued before have too."""
        ready = max(time for held, time in self._loads if held & registers)
        if ready > self.clock:
            self._launch.stalled += (ready - self.clock) * warps
            self.clock = ready
        self._loads = [load for load in self._loads if load[1] > self.clock]
        self._pending = 0
        for held, _ in self._loads:
            self._pending |= held

    # ----------------------------------------------------------------- control

    def _branch(self, one: Instruction) -> Step:
        if one.modifiers == ("DIV",):
            return self._branch_if_parted(one)
        guard = self._guard(one)
        conditions = [self._lanes.predicate(o) for o in one.operands if o.kind in ("P", "UP")]
        target = one.target
        if target is None or one.modifiers:
            raise UnknownInstruction(one)

        def step(at: int, mask: Mask) -> int | None:
            taken = guard(mask)
            for condition in conditions:
                found = condition() if taken is None else condition() & taken
                taken = None if found.all() else found.copy()
            if taken is None or (mask is not None and (taken == mask).all()):
                return target
            if not taken.any():
                return at + 1
            self._barriers.go(at + 1, mask)
            self._barriers.go(target, taken)
            return None

        return step

    def _branch_if_parted(self, one: Instruction) -> Step:
        """Goes to the slow way around a collective where a warp's lanes are not all here."""
        wanted = self._lanes.words(one.operands[0])

        def step(at: int, mask: Mask) -> int | None:
            here = self._lanes.ballot(np.ones(self._lanes.n, bool), mask)
            parted = here != wanted
            if (parted if mask is None else parted & mask).any():
                raise UnknownInstruction(one)
            return at + 1

        return step

    def _call(self, one: Instruction) -> Step:
        """The return address is in registers already."""
        if one.target is None or one.guard is not None:
            raise UnknownInstruction(one)
        target = one.target
        return lambda at, mask: target

    def _return(self, one: Instruction) -> Step:
        if one.target is None or one.guard is not None:
            raise UnknownInstruction(one)
        base, address = one.target, self._lanes.words(one.operands[0])

        def step(at: int, mask: Mask) -> int | None:
            lanes = slice(None) if mask is None else mask
            self._barriers.pc[lanes] = base + (address[lanes] // 16).astype(np.int64)
            return None

        return step

    def _exit(self, one: Instruction) -> Step:
        guard = self._guard(one)

        def step(at: int, mask: Mask) -> int | None:
            gone = guard(mask)
            self._barriers.go(at + 1, mask)
            self._barriers.exit(gone)
            return None

        return step

    def _barrier(self, one: Instruction) -> Step:
        """BSSY, BSYNC, BREAK, WARPSYNC.ALL: lanes of a warp wait for one another."""
        name, barriers = one.name, self._barriers
        if name == "WARPSYNC":
            if one.modifiers != ("ALL",):
                raise UnknownInstruction(one)
            return barriers.meet_warp
        # BREAK may have a second condition: which of the lanes that get here leave.
        conditional = name == "BREAK" and len(one.operands) > 1
        second = self._lanes.predicate(one.operands[0]) if conditional else None
        number = int(one.operands[conditional].text.removeprefix("B"))
        guard = self._guard(one)

        def step(at: int, mask: Mask) -> int | None:
            if name == "BSYNC":
                return barriers.meet(number, at, guard(mask)) if one.guard is None else None
            lanes = guard(mask)
            if second is not None:
                lanes = second().copy() if lanes is None else lanes & second()
            if lanes is None or lanes.any():
                (barriers.join if name == "BSSY" else barriers.leave)(number, lanes)
            return at + 1

        if name == "BSYNC" and one.guard is not None:
            raise UnknownInstruction(one)
        return step

    def _block_barrier(self, one: Instruction) -> Step:
        """BAR.SYNC, or BAR.RED.OR with a vote of the block, which B2R.RESULT fetches."""
        if one.modifiers[0] == "SYNC" and len(one.operands) == 1 and one.guard is None:
            return lambda at, mask: self._barriers.meet_block(at, mask, None)
        if one.modifiers[:2] == ("RED", "OR") and one.guard is None:
            vote = self._lanes.predicate(one.operands[1])
            return lambda at, mask: self._barriers.meet_block(at, mask, vote())
        raise UnknownInstruction(one)

    def _result(self, one: Instruction) -> Step:
        if one.modifiers != ("RESULT",) or one.operands[0].text != "RZ":
            raise UnknownInstruction(one)
        put = self._lanes.put_predicate(one.operands[1])

        def step(at: int, mask: Mask) -> int:
            put(self._barriers.votes, mask)
            return at + 1

        return step

    def _nothing(self, one: Instruction) -> Step:
        return lambda at, mask: at + 1


CONTROL: dict[str, Callable[[Machine, Instruction], Step]] = {
    "BRA": Machine._branch, "CALL": Machine._call, "RET": Machine._return, "EXIT": Machine._exit,
    "BSSY": Machine._barrier, "BSYNC": Machine._barrier, "BREAK": Machine._barrier,
    "WARPSYNC": Machine._barrier, "BAR": Machine._block_barrier, "B2R": Machine._result,
    "NOP": Machine._nothing,
}  # fmt: skip
