"""The interpreter of sm_90 code: decoding, single instructions against plain Python, warps."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import machine_code  # noqa: F401  (finds tools/sass)
import numpy as np
import pytest
from sass.decode import ZERO, decode, instruction
from sass.lanes import Lanes, UnknownInstruction
from sass.machine import Launch, Machine, execute
from sass.memory import Memory

WARP = 32
CONSTANTS = struct.pack("<IIIIII", 64, 1, 1, 2, 1, 1).ljust(0x210, b"\0")


def program(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    found, at = [], 0
    for line in lines:
        if line.endswith(":"):
            found.append(line)
        else:
            found.append(f"        /*{at:04x}*/    {line} ;")
            at += 16
    return "\n".join(found)


def machine(*lines: str, buffers: Any = (), block: int = WARP) -> tuple[Launch, Machine]:
    """A block that has not run yet."""
    launch = Launch(decode(program(*lines, "EXIT")), CONSTANTS, 0x800, 1, block)
    memory = Memory([(x.ctypes.data, x.nbytes) for x in buffers], 32)
    return launch, Machine(launch, memory, 0, 1, [0] * len(launch.code))


def run(line: str, **registers: Any) -> Lanes:
    """Registers after one instruction."""
    _, made = machine(line)
    lanes = made._lanes
    for name, value in registers.items():
        if name[0] == "P":
            lanes.predicates[int(name[1:])][:] = value
        else:
            lanes.registers[int(name[1:])][:] = np.asarray(value).view(np.uint32)
    with np.errstate(all="ignore"):
        made.run()
    return lanes


def words(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint32), WARP)


# --------------------------------------------------------------------------- decoding


def test_decoding() -> None:
    one = instruction(3, "@!P2 LDG.E.128 R20, desc[UR6][R10.64+0x1f0]")
    assert (one.name, one.modifiers, one.guard.index, one.guard.negated) == (
        "LDG",
        ("E", "128"),
        2,
        True,
    )  # type: ignore[union-attr]
    place = one.operands[1]
    assert (place.base.index, place.base.part, place.index) == (10, "64", 0x1F0)  # type: ignore[union-attr]
    one = instruction(0, "IADD3.X R7, P1, -R2.reuse, ~UR5, RZ, P0, !PT")
    assert [o.kind for o in one.operands] == ["R", "P", "R", "UR", "R", "P", "P"]
    assert one.operands[2].negated and one.operands[3].inverted and one.operands[4].index == ZERO
    one = instruction(0, "FSETP.GEU.AND P0, PT, |R3|, +INF , PT")
    assert one.operands[2].absolute and one.operands[3].value == float("inf")
    assert instruction(0, "FMUL R1, R2, -c[0x0][0x214]").operands[2].index == 0x214
    assert instruction(0, "VIADD R1, R1, -0x4").operands[2].index == 2**32 - 4
    code = decode(program("BRA `(.L_x_1)", "NOP", ".L_x_1:", "EXIT"))
    assert code[0].target == 2


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match=r"QMMA .*\{R4\}"):
        instruction(0, "QMMA R1, {R4}")
    with pytest.raises(ValueError, match="no label"):
        decode(program("BRA `(.L_x_1)"))
    for line in ("WGMMA R1, R2, R3", "IADD3.SAT R1, R2, R3, R4", "ATOMS.MAX R1, [R2], R3"):
        with pytest.raises(UnknownInstruction, match=line.split()[0]):
            run(line)


# --------------------------------------------------------------------------- instructions


def test_sums_and_carries() -> None:
    a, b = words(0, 1, 2**32 - 1, 2**31, 12345), words(2**32 - 1, 7, 2**32 - 1, 0, 2**31, 3)
    wide = a.astype(object) + b.astype(object)
    lanes = run("IADD3 R3, P1, R1, R2, RZ", R1=a, R2=b)
    assert (lanes.registers[3] == wide % 2**32).all() and (
        lanes.predicates[1] == (wide >= 2**32)
    ).all()
    lanes = run("IADD3 R3, P1, R1, -R2, RZ", R1=a, R2=b)
    assert (lanes.registers[3] == a - b).all() and (lanes.predicates[1] == (a >= b)).all()
    lanes = run("IADD3.X R3, R1, ~R2, RZ, P0, !PT", R1=a, R2=b, P0=True)
    assert (lanes.registers[3] == a - b).all()
    lanes = run("LEA.HI R3, R1, R2, RZ, 0x5", R1=a, R2=b)
    assert (lanes.registers[3] == (a >> 27) + b).all()
    lanes = run("IMAD.WIDE.U32 R4, R1, R2, RZ", R1=a, R2=b)
    product = a.astype(object) * b.astype(object)
    assert (lanes.registers[4] == product % 2**32).all() and (
        lanes.registers[5] == product >> 32
    ).all()
    lanes = run("IMAD.HI R3, R1, R2, RZ", R1=a, R2=b)
    signed = a.view(np.int32).astype(object) * b.view(np.int32).astype(object)
    assert (lanes.registers[3] == (signed >> 32) % 2**32).all()
    lanes = run("IMAD.HI.U32 R3, R1, R2, R4", R1=a, R2=b, R4=words(0), R5=a)
    assert (lanes.registers[3] == ((product + (a.astype(object) << 32)) >> 32) % 2**32).all()


def test_comparisons_of_64_bits() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-3, 3, WARP) * 2**32 + rng.integers(-2, 2, WARP) for _ in range(2))
    halves = {
        f"R{i + j}": (v >> 32 * j).astype(np.uint32) for i, v in ((0, x), (2, y)) for j in (0, 1)
    }
    _, made = machine(
        "ISETP.GE.U32.AND P0, PT, R0, R2, PT", "ISETP.GE.AND.EX P1, P2, R1, R3, PT, P0"
    )
    for name, value in halves.items():
        made._lanes.registers[int(name[1:])][:] = value
    made.run()
    assert (made._lanes.predicates[1] == (x >= y)).all()
    assert (made._lanes.predicates[2] == (x < y)).all()


def test_every_table_of_lop3() -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(0, 2**32, (3, WARP), dtype=np.uint32)
    for table in range(256):
        lanes = run(f"LOP3.LUT P0, R4, R1, R2, R3, {table:#x}, !PT", R1=a, R2=b, R3=c)
        expected = [
            sum(
                (table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i
                for i in range(32)
            )
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
        assert lanes.registers[4].tolist() == expected
        assert (lanes.predicates[0] == (lanes.registers[4] != 0)).all()


def test_shifts_and_bytes() -> None:
    a, by = words(0x80000001, 0x7FFFFFFF, 5), words(0, 1, 31, 32, 33, 63)
    pairs = list(zip(a.tolist(), by.tolist(), strict=True))
    lanes = run("SHF.R.U32.HI R3, RZ, R2, R1", R1=a, R2=by)
    assert lanes.registers[3].tolist() == [x >> min(s, 32) for x, s in pairs]
    lanes = run("SHF.L.U32 R3, R1, R2, RZ", R1=a, R2=by)
    assert lanes.registers[3].tolist() == [(x << min(s, 32)) % 2**32 for x, s in pairs]
    lanes = run("SHF.R.S64 R3, R1, R2, R1", R1=a, R2=by)
    signed = [((x << 32 | x) ^ 1 << 63) - (1 << 63) for x, _ in pairs]
    assert lanes.registers[3].tolist() == [
        v >> s & 0xFFFFFFFF for v, (_, s) in zip(signed, pairs, strict=True)
    ]
    lanes = run("PRMT R3, R1, 0x9c40, R2", R1=words(0x44332211), R2=words(0x887766D5))
    assert lanes.registers[3][0] == 0x00FFD511  # bytes 0 and 4, the signs of 4 and of 1
    lanes = run("BREV R3, R1", R1=a)
    assert lanes.registers[3].tolist() == [int(f"{x:032b}"[::-1], 2) for x, _ in pairs]
    lanes = run("FLO.U32 R3, R1", R1=words(0, 1, 2**31, 255))
    assert lanes.registers[3].view(np.int32)[:4].tolist() == [-1, 0, 31, 7]


@pytest.mark.parametrize("mode", ["", ".RM", ".RP", ".RZ"])
def test_fused_multiply_add_rounds_once(mode: str) -> None:
    rng = np.random.default_rng(2)
    for scale in (0, 20, 60):
        a, b, c = (
            (rng.standard_normal(WARP) * 2.0 ** rng.integers(-scale - 1, scale + 1, WARP)).astype(
                np.float32
            )
            for _ in range(3)
        )
        c[::3] = -(a * b)[::3]  # what remains is the error of the product
        got = run(f"FFMA{mode} R4, R1, R2, R3", R1=a, R2=b, R3=c).registers[4].view(np.float32)
        for x, y, z, result in zip(a, b, c, got, strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            off = Fraction(float(result)) - exact
            below, above = (
                Fraction(float(np.nextafter(result, np.float32(s)))) for s in (-np.inf, np.inf)
            )
            if mode == "":
                assert abs(off) <= min(abs(below - exact), abs(above - exact))
            elif mode == ".RZ":
                assert abs(exact) - abs(exact + off) >= 0 and below < exact < above or off == 0
            else:
                assert (
                    (off <= 0 and exact < above) if mode == ".RM" else (off >= 0 and exact > below)
                )


def test_floats_and_nan() -> None:
    x = np.resize(np.array([np.nan, -0.0, 1e-40, 3.5, -np.inf], np.float32), WARP)
    lanes = run("FADD R2, R1, -R1", R1=x)
    assert lanes.registers[2][:5].tolist() == [0x7FFFFFFF, 0, 0, 0, 0x7FFFFFFF]
    assert (run("FADD.FTZ R2, R1, -RZ", R1=x).registers[2][:3] == [0x7FFFFFFF, 0x80000000, 0]).all()
    assert run("FSETP.GEU.AND P0, P1, R1, RZ, PT", R1=x).predicates[:2, :5].tolist() == [
        [True, True, True, True, False], [False, False, False, False, True]]  # fmt: skip
    assert run("FSETP.NE.AND P0, PT, R1, RZ, PT", R1=x).predicates[0, :2].tolist() == [False, False]
    assert run("FMNMX R2, |R1|, 1, !PT", R1=x).registers[2][0] == 0x3F800000
    most = run("FMNMX.NAN R2, |R1|, 1, !PT", R1=x).registers[2][:5]
    assert most.tolist() == [0x7FFFFFFF, 0x3F800000, 0x3F800000, 0x40600000, 0x7F800000]
    halves = run("F2FP.BF16.F32.PACK_AB R2, R1, R1", R1=words(0x3F808000, 0x3F818000, 0x7F800001))
    assert halves.registers[2][:3].tolist() == [0x3F803F80, 0x3F823F82, 0x7FFF7FFF]
    halves = run("F2F.F16.F32 R2, R1", R1=words(0x3F801000, 0x3F803000, 0xC7000000, 0x7F800001))
    assert halves.registers[2][:4].tolist() == [0x3C00, 0x3C02, 0xF800, 0x7FFF]
    assert run("F2I.TRUNC.NTZ R2, R1", R1=x).registers[2].view(np.int32)[3] == 3


def test_why_a_division_of_minus_zero_goes_the_long_way() -> None:
    """The steps that ptxas puts behind FCHK divide; of -0 they make +0."""
    _, made = machine("MUFU.RCP R3, R2", "FFMA R4, R3, -R2, 1", "FFMA R3, R3, R4, R3",
                      "FFMA R5, R3, R1, RZ", "FFMA R4, R5, -R2, R1", "FFMA R3, R3, R4, R5",
                      "FCHK P0, R1, R2")  # fmt: skip
    x = np.resize(np.array([-0.0, 1.0, -7.5, 1e20], np.float32), WARP)
    made._lanes.registers[1][:], made._lanes.registers[2][:] = x.view(np.uint32), words(0x40400000)
    made.run()
    quotient = made._lanes.registers[3].view(np.float32)
    assert (quotient[1:4] == x[1:4] / np.float32(3)).all()
    assert not np.signbit(quotient[0]) and np.signbit(x[0] / np.float32(3))
    assert made._lanes.predicates[0][:4].tolist() == [True, False, False, False]


# --------------------------------------------------------------------------- warps and memory


def test_lanes_part_and_meet_again() -> None:
    """Odd lanes add 1, then all of a warp exchange; a side is issued once a warp."""
    launch, made = machine(
        "S2R R0, SR_TID.X",
        "LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT",
        "BSSY B0, `(.L_x_1)",
        "@!P0 BRA `(.L_x_0)",
        "VIADD R0, R0, 0x1",
        ".L_x_0:",
        "BSYNC B0",
        ".L_x_1:",
        "SHFL.BFLY PT, R1, R0, 0x1, 0x1f",
        "VOTE.ANY R2, PT, P0",
        block=2 * WARP,
    )
    made.run()
    lane = np.arange(2 * WARP)
    odd = lane % 2
    assert (made._lanes.registers[0] == lane + odd).all()
    assert (made._lanes.registers[1] == (lane + odd)[lane ^ 1]).all()
    assert (made._lanes.registers[2] == 0xAAAAAAAA).all()
    assert launch.issued.tolist() == [2] * 9


def test_a_block_meets_at_its_barrier() -> None:
    _, made = machine(
        "S2R R0, SR_TID.X",
        "IMAD.SHL.U32 R1, R0, 0x4, RZ",
        "STS [R1+0x400], R0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LOP3.LUT R1, R1, 0xfc, RZ, 0x3c, !PT",
        "LDS R2, [R1+0x400]",
        "ATOMS.POPC.INC.32 RZ, [UR4+0x600]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R3, [UR4+0x600]",
        block=2 * WARP,
    )
    made.run()
    assert (made._lanes.registers[2] == 63 - np.arange(64)).all()
    assert (made._lanes.registers[3] == 64).all()


def test_old_values_of_sums_in_shared_memory() -> None:
    """Odd and even lanes add to two words; each finds what the lanes before it have added."""
    _, made = machine(
        "S2R R0, SR_TID.X",
        "LOP3.LUT R1, R0, 0x1, RZ, 0xc0, !PT",
        "IMAD.SHL.U32 R1, R1, 0x4, RZ",
        "ISETP.GT.AND P0, PT, R0, 0x3, PT",
        "@P0 ATOMS.ADD R2, [R1+0x600], R0",
        "LDS R3, [R1+0x600]",
        block=2 * WARP,
    )
    made.run()
    lane = np.arange(2 * WARP)
    before = [sum(n for n in range(4, i) if n % 2 == i % 2) if i > 3 else 0 for i in lane]
    assert made._lanes.registers[2].tolist() == before
    assert made._lanes.registers[3][:2].tolist() == [sum(range(4, 64, 2)), sum(range(5, 64, 2))]


def test_breaks_may_have_a_condition() -> None:
    """Lanes above 3 leave the barrier and exit; the others meet there and go on."""
    _, made = machine(
        "S2R R0, SR_TID.X",
        "ISETP.GT.AND P0, PT, R0, 0x3, PT",
        "BSSY B0, `(.L_x_0)",
        "BREAK P0, B0",
        "@P0 BRA `(.L_x_0)",
        "BSYNC B0",
        "VIADD R0, R0, 0x64",
        ".L_x_0:",
    )
    made.run()
    lane = np.arange(WARP)
    assert (made._lanes.registers[0] == np.where(lane > 3, lane, lane + 100)).all()


def test_who_waits_for_ever() -> None:
    """Lanes that met elsewhere are waited for; those that wait elsewhere are a deadlock."""
    parted = ("S2R R0, SR_TID.X", "ISETP.GT.AND P0, PT, R0, 0x3, PT", "BSSY B0, `(.L_x_0)",
              "BSSY B1, `(.L_x_0)", "@P0 BRA `(.L_x_1)", "BSYNC B0", ".L_x_0:", "EXIT",
              ".L_x_1:")  # fmt: skip
    _, made = machine(*parted, "BSYNC B0")
    made.run()
    _, made = machine(*parted, "BSYNC B1")
    with pytest.raises(RuntimeError, match="waits for another"):
        made.run()


def launched(lines: tuple[str, ...], buffer: np.ndarray, blocks: int = 1) -> tuple[Launch, Memory]:
    """Runs lines with the buffer's address in c[0x0][0x210]."""
    bank = CONSTANTS + struct.pack("<Q", buffer.ctypes.data)
    launch = Launch(decode(program(*lines, "EXIT")), bank, 0x800, blocks, WARP)
    memory = Memory([(buffer.ctypes.data, buffer.nbytes)], 32)
    execute(launch, memory)
    return launch, memory


ADDRESS = ("S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE.U32 R4, R0, {}, R2")


def aligned(size: int) -> np.ndarray:
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def test_bytes_and_waits_are_counted() -> None:
    lines = (*(line.format("0x10") for line in ADDRESS),
             "LDG.E.128 R8, desc[UR6][R4.64]", "LDG.E.128 R12, desc[UR6][R4.64+0x200]",
             "FADD R16, R8, R12", "LDG.E.128 R8, desc[UR6][R4.64+0x400]", "FADD R16, R8, R12",
             "LDG.E.128 R8, desc[UR6][R4.64]", "FADD R16, R8, R12",
             "STG.E.128 desc[UR6][R4.64+0x600], R8")  # fmt: skip
    launch, memory = launched(lines, aligned(2048))
    assert (memory.traffic.read, memory.traffic.written) == (3 * 512, 512)
    assert memory.traffic.loads == {16: 4} and memory.traffic.stores == {16: 1}
    assert launch.stalled == pytest.approx(2.05)  # two loads together, one alone, one from L1


def test_scattered_bytes_cost_sectors() -> None:
    lines = (*(line.format("0x20") for line in ADDRESS), "LDG.E.U8 R8, desc[UR6][R4.64]",
             "STG.E.U8 desc[UR6][R4.64+0x1], R8")  # fmt: skip
    _, memory = launched(lines, aligned(1024))
    assert (memory.traffic.read, memory.traffic.written) == (1024, 1024)


@pytest.mark.parametrize("offset, size", [("0x2", 256), ("0x4", 128), ("-0x4", 128)])
def test_bad_accesses_are_found(offset: str, size: int) -> None:
    lines = (*(line.format("0x4") for line in ADDRESS), f"LDG.E R8, desc[UR6][R4.64+{offset}]")
    with pytest.raises(IndexError, match="misaligned, or in no buffer"):
        launched(lines, aligned(size))
