"""What floating-point instructions and conversions do.

Results are rounded correctly, NaN is the one that the hardware makes. MUFU's are the correctly
rounded ones too: what follows it (Newton steps, a test of the remainder) makes any approximation
as good the same number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sass.decode import Instruction, Operand
from sass.integers import COMBINERS, COMPARISONS, U32, U64, compared, only, operation
from sass.lanes import ABSOLUTE, SIGN, Get, Lanes, Run, UnknownInstruction

F32, F64 = np.float32, np.float64
NAN = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
SMALLEST_NORMAL = np.uint32(0x00800000)


def canonical(x: np.ndarray) -> np.ndarray:
    """The bits of float32, every NaN as the hardware makes it."""
    bits = x.view(U32)
    nan = np.isnan(x)
    return np.where(nan, NAN, bits) if nan.any() else bits


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign."""
    bits = x.view(U32)
    return np.where((bits & ABSOLUTE) < SMALLEST_NORMAL, bits & SIGN, bits).view(F32)


def rounded(x: np.ndarray, mode: str) -> np.ndarray:
    """Float64 as float32, in a direction."""
    near = x.astype(F32)
    if mode == "RN":
        return near
    above, below = near > x, near < x
    if mode == "RZ":
        above, below = above & (x > 0), below & (x < 0)
    down = np.where(above & (mode != "RP"), np.nextafter(near, F32(-np.inf)), near)
    return np.where(below & (mode != "RM"), np.nextafter(near, F32(np.inf)), down)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "RN") -> np.ndarray:
    """a * b + c, rounded once.

    The product is exact in float64; the sum is rounded there to odd, so that rounding it again
    gives what rounding the exact sum would.
    """
    product, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    odd = np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
    return rounded(odd.view(F64), mode)


def mode_of(modifiers: set[str]) -> str:
    return next((mode for mode in ("RM", "RP", "RZ") if mode in modifiers), "RN")


def _arithmetic(
    one: Instruction, lanes: Lanes, compute: Callable[..., np.ndarray], modifiers: set[str]
) -> Run:
    put = lanes.put(one.operands[0])
    gets = [lanes.f32(operand) for operand in one.operands[1:]]
    flush = "FTZ" in modifiers

    def run(mask: np.ndarray | None) -> None:
        values = [get() for get in gets]
        if flush:
            values = [flushed(value) for value in values]
        found = compute(*values)
        put(canonical(flushed(found) if flush else found), mask)

    return run


@operation("FADD")
def _fadd(one: Instruction, lanes: Lanes) -> Run:
    return _arithmetic(one, lanes, np.add, only(one, "FTZ"))


@operation("FMUL")
def _fmul(one: Instruction, lanes: Lanes) -> Run:
    return _arithmetic(one, lanes, np.multiply, only(one, "FTZ"))


@operation("FFMA")
def _ffma(one: Instruction, lanes: Lanes) -> Run:
    modifiers = only(one, "FTZ", "RM", "RP", "RZ")
    mode = mode_of(modifiers)
    return _arithmetic(one, lanes, lambda a, b, c: fused(a, b, c, mode), modifiers)


@operation("FMNMX")
def _fmnmx(one: Instruction, lanes: Lanes) -> Run:
    """The smaller or the larger; -0 is below 0, and a NaN gives way to a number, or wins."""
    spreads = "NAN" in only(one, "NAN")
    put, least = lanes.put(one.operands[0]), lanes.predicate(one.operands[3])
    a, b = lanes.f32(one.operands[1]), lanes.f32(one.operands[2])

    def run(mask: np.ndarray | None) -> None:
        x, y = a(), b()
        low, high = np.fmin(x, y).view(U32), np.fmax(x, y).view(U32)
        zeros = (x == 0) & (y == 0)
        low = np.where(zeros, x.view(U32) | y.view(U32), low)
        high = np.where(zeros, x.view(U32) & y.view(U32), high)
        found = np.where(least(), low, high).view(F32)
        if spreads:
            found = np.where(np.isnan(x) | np.isnan(y), F32(np.nan), found)
        put(canonical(found), mask)

    return run


@operation("FSETP")
def _fsetp(one: Instruction, lanes: Lanes) -> Run:
    """A comparison; those that end in U hold of NaN too."""
    name, *rest = one.modifiers
    ordered = name.removesuffix("U") if name not in COMPARISONS else name
    if ordered not in COMPARISONS or not set(rest) <= {*COMBINERS, "FTZ"}:
        raise UnknownInstruction(one)
    a, b = lanes.f32(one.operands[2]), lanes.f32(one.operands[3])
    compare, unordered, flush = COMPARISONS[ordered], ordered != name, "FTZ" in rest

    def first() -> np.ndarray:
        x, y = (flushed(a()), flushed(b())) if flush else (a(), b())
        nan = np.isnan(x) | np.isnan(y)
        return compare(x, y) | nan if unordered else compare(x, y) & ~nan

    return compared(one, lanes, first, one.operands[4:])


@operation("FSEL")
def _fsel(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    put, which = lanes.put(one.operands[0]), lanes.predicate(one.operands[3])
    a, b = lanes.bits(one.operands[1]), lanes.bits(one.operands[2])
    return lambda mask: put(np.where(which(), a(), b()), mask)


@operation("MUFU")
def _mufu(one: Instruction, lanes: Lanes) -> Run:
    """1 / x or 1 / sqrt(x) of normal numbers; others count as zero, as do subnormal results."""
    (function,) = only(one, "RCP", "RSQ")
    put, get = lanes.put(one.operands[0]), lanes.f32(one.operands[1])

    def run(mask: np.ndarray | None) -> None:
        x = flushed(get()).astype(F64)
        found = 1 / x if function == "RCP" else 1 / np.sqrt(x)
        put(canonical(flushed(found.astype(F32))), mask)

    return run


@operation("FCHK")
def _fchk(one: Instruction, lanes: Lanes) -> Run:
    """Whether a / b needs more than a reciprocal and Newton steps.

    So it is where an operand is no normal number (of -0 the steps make +0), and near the ends of
    the exponents, where a step could leave them. What the hardware answers of +0 and near the ends
    is not documented; there either way is correct.
    """
    only(one)
    put = lanes.put_predicate(one.operands[0])
    a, b = lanes.bits(one.operands[1]), lanes.bits(one.operands[2])

    def run(mask: np.ndarray | None) -> None:
        high = (a() & ABSOLUTE).view(np.int32) >> 23
        low = (b() & ABSOLUTE).view(np.int32) >> 23
        ends = (high < 26) | (high > 253) | (low < 2) | (low > 251)
        put(ends | (high - low > 125) | (high - low < -124), mask)

    return run


# --------------------------------------------------------------------------- conversions


def _part(lanes: Lanes, operand: Operand, width: int, signed: bool) -> Get:
    """An integer of 8, 16, 32 or 64 bits in a register, by the name of its place."""
    if width == 64:
        pair = lanes.u64(operand)
        return (lambda: pair().view(np.int64)) if signed else pair
    get = lanes.u32(operand)
    if width == 32:
        return (lambda: get().view(np.int32)) if signed else get
    place = int(operand.part.lstrip("HB") or 0) if "_" not in operand.part else None
    if place is None:
        raise ValueError(f"{operand.text}: another part of a register")
    kind = np.dtype(f"{'i' if signed else 'u'}{width // 8}")
    return lambda: (get() >> U32(width * place)).astype(f"u{width // 8}").view(kind)


@operation("I2F", "I2FP")
def _i2f(one: Instruction, lanes: Lanes) -> Run:
    modifiers = only(
        one, "F32", *(f"{s}{w}" for s in "SU" for w in (8, 16, 32, 64)), "RP", "RM", "RZ"
    )
    kind = next((m for m in one.modifiers if m[0] in "SU"), "S32")
    put = lanes.put(one.operands[0])
    get = _part(lanes, one.operands[1], int(kind[1:]), kind[0] == "S")
    mode = mode_of(modifiers)

    def run(mask: np.ndarray | None) -> None:
        value = get()
        if mode == "RN":
            put(value.astype(F32), mask)
        else:  # rounding 64 bits twice in one direction is rounding once
            wide = value.astype(F64)
            over = wide.astype(object) > value.astype(object) if kind.endswith("64") else False
            under = wide.astype(object) < value.astype(object) if kind.endswith("64") else False
            wide = np.where(np.asarray(over, bool), np.nextafter(wide, 0), wide)
            sticky = np.where(np.asarray(under, bool), np.nextafter(wide, np.inf), wide)
            put(rounded(sticky if mode == "RP" else wide, mode), mask)

    return run


@operation("F2I")
def _f2i(one: Instruction, lanes: Lanes) -> Run:
    modifiers = only(one, "TRUNC", "FLOOR", "CEIL", "NTZ", "FTZ", "U32", "S32", "U64", "S64")
    kind = next((m for m in one.modifiers if m in ("U32", "S32", "U64", "S64")), "S32")
    towards = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    rounding = next((towards[m] for m in one.modifiers if m in towards), np.rint)
    limits = np.iinfo(f"{'i' if kind[0] == 'S' else 'u'}{int(kind[1:]) // 8}")
    put = lanes.put64(one.operands[0]) if kind.endswith("64") else lanes.put(one.operands[0])
    get = lanes.f32(one.operands[1])

    def run(mask: np.ndarray | None) -> None:
        x = flushed(get()) if "FTZ" in modifiers else get()
        whole = rounding(x.astype(F64))
        nan = np.isnan(whole)
        over, under = whole >= float(limits.max), whole <= float(limits.min)
        inside = np.where(nan | over | under, 0, whole).astype(limits.dtype)
        found = np.select(
            [over, nan | under],
            [limits.dtype.type(limits.max), limits.dtype.type(limits.min)],
            inside,
        )  # fmt: skip
        put(found.view(f"u{limits.dtype.itemsize}"), mask)

    return run


def to_half(x: np.ndarray) -> np.ndarray:
    """The bits of float16, a NaN as the hardware makes it."""
    return np.where(np.isnan(x), U32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(U32))


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, to nearest even, likewise."""
    bits = x.view(U32).astype(U64)
    near = (bits + U64(0x7FFF) + (bits >> U64(16) & U64(1))) >> U64(16)
    return np.where(np.isnan(x), U32(0x7FFF), near.astype(U32))


@operation("F2FP")
def _f2fp(one: Instruction, lanes: Lanes) -> Run:
    """Two float32 as 16 bits each: the first into the upper half."""
    modifiers = only(one, "F16", "BF16", "F32", "PACK_AB", "RELU")
    if "RELU" in modifiers or "PACK_AB" not in modifiers:
        raise UnknownInstruction(one)
    narrow = to_half if "F16" in modifiers else to_bfloat
    put = lanes.put(one.operands[0])
    high, low = lanes.f32(one.operands[1]), lanes.f32(one.operands[2])
    return lambda mask: put(narrow(high()) << U32(16) | narrow(low()), mask)


@operation("F2F")
def _f2f(one: Instruction, lanes: Lanes) -> Run:
    """Of its uses the one that narrows a float32 to a half, in the lower 16 bits."""
    if one.modifiers != ("F16", "F32"):
        raise UnknownInstruction(one)
    put, x = lanes.put(one.operands[0]), lanes.f32(one.operands[1])
    return lambda mask: put(to_half(x()), mask)


@operation("HADD2")
def _hadd2(one: Instruction, lanes: Lanes) -> Run:
    """Of its uses the one that widens a half: -0 + x in float32."""
    only(one, "F32")
    zero, x = one.operands[1:3]
    if "F32" not in one.modifiers or zero.text != "-RZ" or x.part not in ("H0_H0", "H1_H1"):
        raise UnknownInstruction(one)
    put, words = lanes.put(one.operands[0]), lanes.words(x)
    shift = U32(16 if x.part == "H1_H1" else 0)
    flip = SIGN if x.negated else U32(0)

    def run(mask: np.ndarray | None) -> None:
        half = (words >> shift).astype(np.uint16).view(np.float16)
        put(canonical((half.astype(F32).view(U32) ^ flip).view(F32)), mask)

    return run


@operation("HFMA2")
def _hfma2(one: Instruction, lanes: Lanes) -> Run:
    """Of its uses the one that makes a constant: -0 * 0 + two halves."""
    only(one, "MMA")
    zeros, halves = one.operands[1:3], one.operands[3:]
    if [o.text for o in zeros] != ["-RZ", "RZ"] or any(o.kind != "float" for o in halves):
        raise UnknownInstruction(one)
    high, low = (int(np.float16(half.value).view(np.uint16)) for half in halves)
    put, value = lanes.put(one.operands[0]), np.full(lanes.n, high << 16 | low, U32)
    return lambda mask: put(value, mask)
