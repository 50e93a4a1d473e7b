"""What integer instructions do; each function makes one that runs on lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sass.decode import Instruction, Operand
from sass.lanes import Get, Lanes, Run, UnknownInstruction

U32, U64 = np.uint32, np.uint64
Maker = Callable[[Instruction, Lanes], Run]

OPERATIONS: dict[str, Maker] = {}
COMPARISONS = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
COMBINERS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def operation(*names: str) -> Callable[[Maker], Maker]:
    """Registers the maker of an instruction, and of its twin on uniform registers."""

    def add(maker: Maker) -> Maker:
        OPERATIONS.update(dict.fromkeys(names, maker))
        return maker

    return add


def only(one: Instruction, *known: str) -> set[str]:
    """Its modifiers; an error where one isn't known."""
    if not set(one.modifiers) <= set(known):
        raise UnknownInstruction(one)
    return set(one.modifiers)


def is_predicate(operand: Operand) -> bool:
    return operand.kind in ("P", "UP")


def split(one: Instruction) -> tuple[list[Operand], list[Operand]]:
    """Destinations (a register, and the predicates behind it) and sources."""
    last = 1
    while last < len(one.operands) and is_predicate(one.operands[last]):
        last += 1
    return list(one.operands[:last]), list(one.operands[last:])


# --------------------------------------------------------------------------- sums


def add_wide(lanes: Lanes, sources: list[Operand], carries: list[Operand]) -> Get:
    """The sum of words and carries, in 64 bits."""
    addends = [lanes.wide(source) for source in sources]
    carried = [lanes.predicate(carry) for carry in carries]

    def total() -> np.ndarray:
        found = addends[0]()
        for addend in addends[1:]:
            found = found + addend()
        for carry in carried:
            found = found + carry().astype(U64)
        return found

    return total


def put_sum(lanes: Lanes, targets: list[Operand], total: Get) -> Run:
    """Writes a sum and its carries: the first where it is 2^32 or more, the second from 2^33 on."""
    put = lanes.put(targets[0])
    carries = [lanes.put_predicate(target) for target in targets[1:]]

    def run(mask: np.ndarray | None) -> None:
        found = total()
        for i, carry in enumerate(carries):
            carry(found >> U64(32) > U64(i), mask)
        put(found.astype(U32), mask)

    return run


@operation("IADD3", "UIADD3")
def _iadd3(one: Instruction, lanes: Lanes) -> Run:
    only(one, "X")
    targets, sources = split(one)
    return put_sum(lanes, targets, add_wide(lanes, sources[:3], sources[3:]))


@operation("VIADD")
def _viadd(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    return put_sum(lanes, [one.operands[0]], add_wide(lanes, list(one.operands[1:]), []))


@operation("LEA", "ULEA")
def _lea(one: Instruction, lanes: Lanes) -> Run:
    """(a << s) + b, or with HI the upper half of ({c, a} << s) + b."""
    modifiers = only(one, "HI", "X", "SX32")
    targets, sources = split(one)
    a = lanes.u32(sources.pop(0))
    b = lanes.wide(sources.pop(0))
    signed = "SX32" in modifiers
    c = lanes.u32(sources.pop(0)) if "HI" in modifiers and not signed else None
    shift = U64(sources.pop(0).index)
    carry = lanes.predicate(sources[0]) if "X" in modifiers else None

    def total() -> np.ndarray:
        low = a()
        if c is not None:
            pair = low.astype(U64) | c().astype(U64) << U64(32)
        elif signed:
            pair = low.view(np.int32).astype(np.int64).view(U64)
        else:
            pair = low.astype(U64)
        pair = pair << shift
        part = pair >> U64(32) if "HI" in modifiers else pair & U64(0xFFFFFFFF)
        found = part + b()
        return found if carry is None else found + carry().astype(U64)

    return put_sum(lanes, targets, total)


@operation("IMAD", "UIMAD")
def _imad(one: Instruction, lanes: Lanes) -> Run:
    modifiers = only(one, "MOV", "U32", "SHL", "IADD", "X", "WIDE", "HI")
    targets, sources = split(one)
    if modifiers & {"WIDE", "HI"}:
        return _imad_wide(one, lanes, targets, sources)
    a, b = lanes.u32(sources[0]), lanes.u32(sources[1])
    addend = add_wide(lanes, [sources[2]], sources[3:])
    put = lanes.put(targets[0])
    if len(targets) > 1:
        raise UnknownInstruction(one)
    if sources[0].text.strip("-") == "RZ":  # a move
        return lambda mask: put(addend().astype(U32), mask)
    return lambda mask: put(a() * b() + addend().astype(U32), mask)


def _imad_wide(
    one: Instruction, lanes: Lanes, targets: list[Operand], sources: list[Operand]
) -> Run:
    """a * b + the pair c, all 64 bits or their upper half; the predicate is the carry."""
    unsigned, high = "U32" in one.modifiers, "HI" in one.modifiers
    a, b = lanes.u32(sources[0]), lanes.u32(sources[1])
    c = lanes.u64(sources[2])
    if len(sources) > 3:
        raise UnknownInstruction(one)
    put = lanes.put(targets[0]) if high else lanes.put64(targets[0])
    carry = lanes.put_predicate(targets[1]) if len(targets) > 1 else None

    def run(mask: np.ndarray | None) -> None:
        if unsigned:
            product = a().astype(U64) * b().astype(U64)
        else:
            product = (
                a().view(np.int32).astype(np.int64) * b().view(np.int32).astype(np.int64)
            ).view(U64)
        total = product + c()
        if carry is not None:
            carry(total < product, mask)
        put((total >> U64(32)).astype(U32) if high else total, mask)

    return run


@operation("IABS")
def _iabs(one: Instruction, lanes: Lanes) -> Run:
    put, get = lanes.put(one.operands[0]), lanes.i32(one.operands[1])
    return lambda mask: put(np.abs(get()), mask)


# --------------------------------------------------------------------------- comparisons


def compared(one: Instruction, lanes: Lanes, first: Get, operands: tuple[Operand, ...]) -> Run:
    """Writes a comparison and its opposite, each combined with a predicate."""
    yes, no = (lanes.put_predicate(operand) for operand in one.operands[:2])
    combine = COMBINERS[next(m for m in one.modifiers if m in COMBINERS)]
    other = lanes.predicate(operands[0])
    has_opposite = one.operands[1].text not in ("PT", "UPT")

    def run(mask: np.ndarray | None) -> None:
        found, with_it = first(), other()
        if has_opposite:
            opposite = combine(~found, with_it)
            yes(combine(found, with_it), mask)
            no(opposite, mask)
        else:
            yes(combine(found, with_it), mask)

    return run


@operation("ISETP", "UISETP")
def _isetp(one: Instruction, lanes: Lanes) -> Run:
    modifiers = only(one, *COMPARISONS, *COMBINERS, "U32", "EX")
    read = lanes.u32 if "U32" in modifiers else lanes.i32
    a, b = read(one.operands[2]), read(one.operands[3])
    compare = COMPARISONS[one.modifiers[0]]
    if "EX" not in modifiers:
        return compared(one, lanes, lambda: compare(a(), b()), one.operands[4:])
    # Upper words: where they are equal the lower ones, compared before, decide.
    lower = lanes.predicate(one.operands[5])
    strict = COMPARISONS[one.modifiers[0].replace("LE", "LT").replace("GE", "GT")]

    def extended() -> np.ndarray:
        high, other = a(), b()
        if compare is np.equal:
            return (high == other) & lower()
        if compare is np.not_equal:
            return (high != other) | lower()
        return strict(high, other) | ((high == other) & lower())

    return compared(one, lanes, extended, one.operands[4:5])


@operation("VIMNMX", "VIMNMX3", "VIADDMNMX")
def _vimnmx(one: Instruction, lanes: Lanes) -> Run:
    """The smaller of all where the predicate is true, the larger where not."""
    modifiers = only(one, "U32")
    target, *sources, smallest = one.operands
    unsigned = "U32" in modifiers
    put, which = lanes.put(target), lanes.predicate(smallest)
    if one.name == "VIADDMNMX":
        x, y = lanes.u32(sources[0]), lanes.u32(sources[1])
        gets: list[Get] = [lambda: x() + y(), lanes.u32(sources[2])]
    else:
        gets = [lanes.u32(source) for source in sources]

    def run(mask: np.ndarray | None) -> None:
        values = [get() if unsigned else get().view(np.int32) for get in gets]
        least = np.minimum.reduce(values)
        put(np.where(which(), least, np.maximum.reduce(values)), mask)

    return run


@operation("SEL", "USEL")
def _sel(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    put, which = lanes.put(one.operands[0]), lanes.predicate(one.operands[3])
    a, b = lanes.u32(one.operands[1]), lanes.u32(one.operands[2])
    return lambda mask: put(np.where(which(), a(), b()), mask)


# --------------------------------------------------------------------------- bits


def lookup(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bit by bit, bit 4 a + 2 b + c of the table."""
    found = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return found


# Tables that occur most, in fewer operations.
QUICK: dict[int, Callable[..., np.ndarray]] = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0x30: lambda a, b, c: a & ~b,
    0x33: lambda a, b, c: ~b,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
}


@operation("LOP3", "ULOP3")
def _lop3(one: Instruction, lanes: Lanes) -> Run:
    only(one, "LUT")
    operands = list(one.operands)
    predicate = operands.pop(0) if is_predicate(operands[0]) else None
    target, *sources = operands
    gets = [lanes.u32(source) for source in sources[:3]]
    table = sources[3].index
    with_it = lanes.predicate(sources[4])
    put = lanes.put(target)
    put_any = lanes.put_predicate(predicate) if predicate else None
    quick = QUICK.get(table)

    def run(mask: np.ndarray | None) -> None:
        a, b, c = (get() for get in gets)
        found = quick(a, b, c) if quick else lookup(table, a, b, c)
        if put_any is not None:
            put_any((found != 0) | with_it(), mask)
        put(found, mask)

    return run


@operation("PLOP3", "UPLOP3")
def _plop3(one: Instruction, lanes: Lanes) -> Run:
    only(one, "LUT")
    puts = [lanes.put_predicate(operand) for operand in one.operands[:2]]
    gets = [lanes.predicate(operand) for operand in one.operands[2:5]]
    tables = [operand.index for operand in one.operands[5:7]]

    def run(mask: np.ndarray | None) -> None:
        inputs = [get() for get in gets]
        results = [lookup(table, *inputs) for table in tables]
        for put, result in zip(puts, results, strict=True):
            put(result, mask)

    return run


@operation("SHF", "USHF")
def _shf(one: Instruction, lanes: Lanes) -> Run:
    """Shifts the pair {c, a}; the result is its lower half, with HI its upper half."""
    modifiers = only(one, "L", "R", "W", "HI", "U32", "S32", "U64", "S64")
    target, *sources = one.operands
    put = lanes.put(target)
    a, shift, c = (lanes.u32(source) for source in sources)
    left, high, wrap = "L" in modifiers, "HI" in modifiers, "W" in modifiers
    signed = bool(modifiers & {"S32", "S64"})
    bits = 64 if modifiers & {"U64", "S64"} else 32

    def run(mask: np.ndarray | None) -> None:
        by = shift().astype(U64)
        by = by % U64(bits) if wrap else np.minimum(by, U64(bits))
        pair = a().astype(U64) | c().astype(U64) << U64(32)
        once, rest = np.minimum(by, U64(63)), by - np.minimum(by, U64(63))  # by 64 in two steps
        if left:
            found = pair << once << rest
        elif signed:
            found = (pair.view(np.int64) >> once.view(np.int64) >> rest.view(np.int64)).view(U64)
        else:
            found = pair >> once >> rest
        put((found >> U64(32) if high else found).astype(U32), mask)

    return run


@operation("PRMT", "UPRMT")
def _prmt(one: Instruction, lanes: Lanes) -> Run:
    """Byte i is the one of {b, a} that nibble i of the selector names, or its sign eight times."""
    only(one)
    put = lanes.put(one.operands[0])
    a, selector, b = (lanes.u32(operand) for operand in one.operands[1:4])

    def run(mask: np.ndarray | None) -> None:
        pair = a().astype(U64) | b().astype(U64) << U64(32)
        chosen = selector()
        found = np.zeros_like(chosen)
        for i in range(4):
            nibble = chosen >> U32(4 * i)
            byte = (pair >> ((nibble & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(0xFF)
            sign = (byte >> U32(7)) * U32(0xFF)
            found |= np.where(nibble & U32(8), sign, byte) << U32(8 * i)
        put(found, mask)

    return run


@operation("POPC", "UPOPC")
def _popc(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    put, get = lanes.put(one.operands[0]), lanes.u32(one.operands[1])
    return lambda mask: put(np.bitwise_count(get()).astype(U32), mask)


@operation("FLO", "UFLO")
def _flo(one: Instruction, lanes: Lanes) -> Run:
    """The place of the highest one, or with SH how far it is from the top; of zero all ones."""
    modifiers = only(one, "U32", "SH")
    if "U32" not in modifiers:
        raise UnknownInstruction(one)
    put, get = lanes.put(one.operands[0]), lanes.u32(one.operands[1])

    def run(mask: np.ndarray | None) -> None:
        value = get()
        place = np.frexp(value.astype(np.float64))[1].astype(np.int32) - 1
        place = np.where(value == 0, -1, 31 - place if "SH" in modifiers else place)
        put(place.astype(np.int32), mask)

    return run


@operation("BREV", "UBREV")
def _brev(one: Instruction, lanes: Lanes) -> Run:
    only(one)
    put, get = lanes.put(one.operands[0]), lanes.u32(one.operands[1])

    def run(mask: np.ndarray | None) -> None:
        octets = np.ascontiguousarray(get().byteswap()).view(np.uint8)
        mirrored = np.packbits(np.unpackbits(octets).reshape(-1, 8)[:, ::-1], axis=1)
        put(mirrored.reshape(-1).view(U32), mask)

    return run
