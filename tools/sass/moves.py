"""Moves between registers, lanes and special registers, and exchanges within a warp."""

from __future__ import annotations

import numpy as np

from sass.decode import Instruction
from sass.integers import U32, is_predicate, only, operation, split
from sass.lanes import WARP, Lanes, Run, UnknownInstruction


@operation("MOV", "UMOV")
def _mov(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    put, get = lanes.put(one.operands[0]), lanes.u32(one.operands[1])
    return lambda mask: put(get(), mask)


@operation("LDC", "ULDC")
def _ldc(one: Instruction, lanes: Lanes) -> Run:
    """From the constant bank, where parameters are."""
    modifiers = only(one, "64", "U8", "U16")
    target, source = one.operands
    if source.kind != "c":
        raise UnknownInstruction(one)
    if modifiers & {"U8", "U16"}:
        size = 1 if "U8" in modifiers else 2
        number = int.from_bytes(lanes.constants[source.index : source.index + size], "little")
        put, value = lanes.put(target), np.full(lanes.n, number, U32)
        return lambda mask: put(value, mask)
    words = [lanes.words(source, i) for i in range(2 if "64" in modifiers else 1)]
    puts = [lanes.put(target, i) for i in range(len(words))]

    def run(mask: np.ndarray | None) -> None:
        for put, value in zip(puts, words, strict=True):
            put(value, mask)

    return run


@operation("S2R", "S2UR", "CS2R")
def _s2r(one: Instruction, lanes: Lanes) -> Run:
    only(one, "32")
    special = lanes.special.get(one.operands[1].text)
    if special is None:
        raise UnknownInstruction(one)
    puts = [lanes.put(one.operands[0])]
    if one.name == "CS2R" and "32" not in one.modifiers:
        puts.append(lanes.put(one.operands[0], 1))
        if one.operands[1].text != "SRZ":
            raise UnknownInstruction(one)

    def run(mask: np.ndarray | None) -> None:
        for put in puts:
            put(special, mask)

    return run


@operation("P2R")
def _p2r(one: Instruction, lanes: Lanes) -> Run:
    """Predicates as bits, where the mask has ones; elsewhere the other register's."""
    only(one)
    target, predicates, other, mask_operand = one.operands
    if predicates.text != "PR" or mask_operand.kind != "int":
        raise UnknownInstruction(one)
    put, get, chosen = lanes.put(target), lanes.u32(other), U32(mask_operand.index)

    def run(mask: np.ndarray | None) -> None:
        bits = np.zeros(lanes.n, U32)
        for i in range(7):
            bits |= lanes.predicates[i].astype(U32) << U32(i)
        put((bits & chosen) | (get() & ~chosen), mask)

    return run


@operation("R2P")
def _r2p(one: Instruction, lanes: Lanes) -> Run:
    """The opposite: predicates that the mask names, from a byte of a register."""
    only(one)
    predicates, source, mask_operand = one.operands
    if predicates.text != "PR" or mask_operand.kind != "int" or source.part[:1] not in ("", "B"):
        raise UnknownInstruction(one)
    get, shift = lanes.words(source), 8 * int(source.part[1:] or 0)

    def run(mask: np.ndarray | None) -> None:
        for i in range(7):
            if mask_operand.index >> i & 1:
                bit = (get >> U32(shift + i) & U32(1)).astype(bool)
                if mask is None:
                    lanes.predicates[i][:] = bit
                else:
                    np.copyto(lanes.predicates[i], bit, where=mask)

    return run


@operation("R2UR")
def _r2ur(one: Instruction, lanes: Lanes) -> Run:
    """The value of the lowest lane that takes part."""
    only(one)
    put, get = lanes.put(one.operands[0]), lanes.u32(one.operands[1])
    first = lanes.numbers // WARP * WARP

    def run(mask: np.ndarray | None) -> None:
        lowest = first
        if mask is not None:
            lowest = first + np.repeat(mask.reshape(-1, WARP).argmax(1), WARP)
        put(get()[lowest], mask)

    return run


# --------------------------------------------------------------------------- exchanges


@operation("SHFL")
def _shfl(one: Instruction, lanes: Lanes) -> Run:
    (kind,) = only(one, "BFLY", "UP", "DOWN", "IDX")
    inside, target, source, by, clamp = one.operands
    put, put_inside = lanes.put(target), lanes.put_predicate(inside)
    get, distance, limits = (lanes.u32(operand) for operand in (source, by, clamp))
    lane = (lanes.numbers % WARP).astype(np.int64)
    warp = lanes.numbers - lane

    def run(mask: np.ndarray | None) -> None:
        step = (distance() & U32(31)).astype(np.int64)
        segment = (limits() >> U32(8) & U32(31)).astype(np.int64)
        end = (limits() & U32(31)).astype(np.int64)
        highest = (lane & segment) | (end & ~segment)
        if kind == "BFLY":
            other = lane ^ step
        elif kind == "IDX":
            other = (lane & segment) | (step & ~segment & 31)
        else:
            other = lane - step if kind == "UP" else lane + step
        good = other >= highest if kind == "UP" else other <= highest
        put_inside(good, mask)
        put(get()[warp + np.where(good, other, lane)], mask)

    return run


@operation("VOTE", "VOTEU")
def _vote(one: Instruction, lanes: Lanes) -> Run:
    """A word with a bit for every lane that takes part and votes so."""
    modifiers = only(one, "ANY", "ALL")
    targets, sources = list(one.operands[:-1]), one.operands[-1]
    votes = lanes.predicate(sources)
    registers = [lanes.put(o) for o in targets if not is_predicate(o)]
    predicates = [lanes.put_predicate(o) for o in targets if is_predicate(o)]

    def run(mask: np.ndarray | None) -> None:
        yes = lanes.ballot(votes(), mask)
        everyone = lanes.ballot(np.ones(lanes.n, bool), mask)
        for put in predicates:
            put(yes != 0 if "ANY" in modifiers else yes == everyone, mask)
        for put in registers:
            put(yes, mask)

    return run


REDUCTIONS = {"OR": np.bitwise_or, "AND": np.bitwise_and, "XOR": np.bitwise_xor, "SUM": np.add,
              "MAX": np.maximum, "MIN": np.minimum}  # fmt: skip


@operation("REDUX")
def _redux(one: Instruction, lanes: Lanes) -> Run:
    """One number for the lanes that take part."""
    modifiers = only(one, *REDUCTIONS, "S32")
    name = next((m for m in one.modifiers if m in REDUCTIONS), "SUM")
    (target,), (source,) = split(one)
    put, get = lanes.put(target), lanes.u32(source)
    ufunc = REDUCTIONS[name]

    def run(mask: np.ndarray | None) -> None:
        value = get().view(np.int32) if "S32" in modifiers else get()
        table = value.reshape(-1, WARP)
        if mask is None:
            found = ufunc.reduce(table, axis=1)
        else:
            limits = np.iinfo(value.dtype)
            neutral = {"AND": -1, "MAX": limits.min, "MIN": limits.max}.get(name, 0)
            neutral = np.array(neutral).astype(value.dtype)
            found = ufunc.reduce(np.where(mask.reshape(-1, WARP), table, neutral), axis=1)
        put(np.repeat(found.astype(value.dtype), WARP), mask)

    return run
