"""From what launches issued and moved to numbers for an element: pipes, waits, bytes in flight."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import ptxas

from sass.decode import Instruction
from sass.host import Done, base_name
from sass.lanes import WARP
from sass.memory import SMS

Row = dict[str, Any]

LINE_BYTES = 128  # what the load/store unit moves at a time
FMA = {"FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2"}
XU = {"MUFU", "F2I", "I2F", "POPC", "FLO", "BREV", "FCHK", "F2F", "REDUX"}
LSU = {
    "LDG",
    "STG",
    "LD",
    "ST",
    "LDS",
    "STS",
    "ATOMS",
    "ATOMG",
    "REDG",
    "RED",
    "SHFL",
    "LDL",
    "STL",
}
CONTROL = {"BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "NOP", "B2R"}
WIDTHS = {"64": 8, "128": 16}
ALL = 64 << 20  # elements of the launch that is described
MOST_BLOCKS = int(
    re.search(r"PYDIST_CUDA_MAX_BLOCKS (\d+)", (ptxas.SOURCES / "common.cuh").read_text())[1]  # type: ignore[index]
)


def pipe_of(one: Instruction) -> str:
    """Where an instruction runs: alu, fma, imad, xu, lsu, uniform or control."""
    name = one.name
    if name in CONTROL:
        return "control"
    if name in FMA:
        return "fma"
    if name == "IMAD":
        return "imad"
    if name in XU:
        return "xu"
    if name in LSU:
        return "lsu"
    if name.startswith("U") or name in ("LDC", "S2R", "S2UR", "CS2R", "R2UR", "VOTEU"):
        return "uniform"
    return "alu"


def weight(one: Instruction) -> int:
    """How often an instruction takes its pipe: LDG.128 of a warp moves four times 128 bytes."""
    width = next((WIDTHS[m] for m in one.modifiers if m in WIDTHS), 4)
    return max(1, width * WARP // LINE_BYTES) if pipe_of(one) == "lsu" else 1


def numbers(done: Done) -> Counter[str]:
    """Everything that grows with the input, of one launch."""
    found: Counter[str] = Counter()
    for one, warps in zip(done.launch.code, done.launch.issued.tolist(), strict=True):
        if warps:
            found["pipe issue"] += warps
            found[f"pipe {pipe_of(one)}"] += warps * weight(one)
    found["moved"] = done.traffic.read + done.traffic.written
    found["read"], found["loaded"] = done.traffic.read, done.traffic.loaded
    found["waits"], found["chain"] = done.launch.stalled, done.launch.clock  # type: ignore[assignment]
    for width, count in done.traffic.loads.items():
        found[f"load {width}"] = count
    for width, count in done.traffic.stores.items():
        found[f"store {width}"] = count
    return found


def per_element(once: Done, twice: Done, length: int) -> Row:
    """A launch over ``ALL`` elements, divided by them.

    Args:
        once: The launch over ``length`` elements.
        twice: Over twice as many, with as many blocks: each warp has twice the work. So a warp's
            beginning and end, which it has once, and its work are told apart.
        length: Elements.
    """
    first, second = numbers(once), numbers(twice)
    serial = twice.asked == once.asked
    warps = once.launch.warps
    blocks = min(MOST_BLOCKS, once.asked * ALL / length)
    # Of the warps that are launched over ALL elements there are so many for each element.
    of_warps = blocks * once.launch.block / WARP / ALL

    def value(name: str) -> float:
        work = (second[name] - first[name]) / length
        ends = 0.0 if serial else (first[name] - work * length) / warps
        return float(work + ends * of_warps)

    pipes = {
        name.removeprefix("pipe "): round(WARP * value(name), 3)
        for name in sorted(second) if name.startswith("pipe ")
    }  # fmt: skip
    return {
        "kernel": base_name(once.kernel),
        "registers": once.registers,
        "warps": once.resident,
        "pipes": pipes,
        "moved": round(value("moved"), 4),
        "read": round(value("read"), 4),
        "loaded": round(value("loaded"), 4),
        "waits": float(f"{value('chain' if serial else 'waits'):.4g}"),
        "waves": round(blocks * once.launch.block / WARP / once.resident / SMS, 2),
        "serial": serial,
        "loads": _widths(second, "load"),
        "stores": _widths(second, "store"),
    }


def _widths(found: Counter[str], kind: str) -> dict[str, float]:
    """The share of requests of each width in bits, of those that are one in 20."""
    counts = {int(k.split()[1]): n for k, n in found.items() if k.startswith(kind + " ")}
    whole = sum(counts.values())
    return {
        str(8 * width): round(n / whole, 2)
        for width, n in sorted(counts.items())
        if 20 * n >= whole
    }


def in_flight(launch: Row) -> float:
    """Bytes that a thread has asked for, and not got, while its warp waits."""
    return launch["read"] / launch["waits"] / WARP if launch["waits"] else 0.0


def registers(folder: Path) -> dict[str, ptxas.Usage]:
    """What ptxas reported of every instance for sm_90."""
    reports = (path.read_text() for path in folder.rglob(f"*{ptxas.REPORT}"))
    return {u.name: u for report in reports for u in ptxas.parse(report) if u.arch == 90}
