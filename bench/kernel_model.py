"""What a Hopper card should give each CUDA kernel: its share of a copy's bandwidth, by counting.

`make sass` executes the sm_90 code of the kernels and counts (tools/sass); its table is
bench/results/sass.json. A launch takes as long as the longest of these, for each element:

    moved / (0.97 copy)                        what passes the memory's bus; a copy has tails too
    max over pipes (issued / rate) / (0.75 SMs clock)        instructions: 3/4 of a pipe's limit
    waits * 0.7 us / (warps of all SMs)        Little's law: a warp's waits for memory, one by one

longer where few waves of blocks leave the last one part empty; and a launch that does not grow with
its input, a block at the end, its waits alone. A kernel's share is the time of a copy of its least
bytes over the sum of its launches. The formula is good to about 15 points where a pipe or latency
decides. No card has confirmed a number yet.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TABLE = Path(__file__).parent / "results" / "sass.json"
SMS, HERTZ = 132, 1.98e9  # of a card that is not known otherwise
COPIES = {"h100": 3.0e12, "h200": 4.3e12}  # bytes per second of a copy
OF_COPY = 0.97
OF_PIPE = 0.75
LATENCY = 0.7e-6  # seconds from a load to its data
FEW_WAVES = 4  # with more, blocks of one wave end at many times
WARP = 32
# Warp instructions per clock of a multiprocessor. LSU counts what moves 128 bytes.
RATES = {"issue": 4.0, "alu": 2.0, "fma": 4.0, "imad": 2.0, "xu": 0.5, "lsu": 1.0}
# Elias codes and sums of sparse payloads have no share: their bytes are not what they wait for.
NO_SHARE = ("elias_encode", "elias_decode", "topk_reduce")


@functools.cache
def table(path: Path = TABLE) -> dict[tuple[str, str, str], Row]:
    """The committed counts by kernel, variant and dtype."""
    rows = json.loads(path.read_text())["results"]
    return {(row["kernel"], row["variant"], row["dtype"]): row for row in rows}


def counted(row: Row) -> Row | None:
    """What was counted for a row's kernel; None where bytes don't bound it."""
    if row["kernel"] in NO_SHARE:
        return None
    dtype = "bfloat16" if row["dtype"] == "float16" else row["dtype"]  # they need the same
    return table().get((row["kernel"], row["variant"], dtype))


def busiest(pipes: Mapping[str, float]) -> tuple[str, float]:
    """The pipe that an element keeps longest, and for how many clocks of a multiprocessor."""
    name = max(RATES, key=lambda pipe: pipes.get(pipe, 0.0) / RATES[pipe])
    return name, pipes.get(name, 0.0) / WARP / RATES[name]


def launch_seconds(launch: Row, copy: float, sms: int = SMS, hertz: float = HERTZ) -> float:
    """How long a launch takes for an element.

    Args:
        launch: ``pipes`` (instructions times 32 by pipe), ``moved`` (bytes), ``waits`` (of a warp
            for memory) for an element; ``warps`` on a multiprocessor; ``waves`` of blocks that
            fill all of them at 64 Mi elements; ``serial``.
        copy: Bytes per second of a copy.
        sms: Multiprocessors.
        hertz: Their clock.
    """
    if launch["serial"]:
        return float(launch["waits"] * LATENCY)
    bus = launch["moved"] / (OF_COPY * copy)
    issue = busiest(launch["pipes"])[1] / (OF_PIPE * sms * hertz)
    latency = launch["waits"] * LATENCY / (launch["warps"] * sms)
    waves = launch["waves"]
    tail = math.ceil(waves) / waves if 1 < waves < FEW_WAVES else 1.0
    return float(tail * max(bus, issue, latency))


def share(counts: Row, copy: float, sms: int = SMS, hertz: float = HERTZ) -> float:
    """The share of a copy that a row of the table should reach."""
    seconds = sum(launch_seconds(launch, copy, sms, hertz) for launch in counts["launches"])
    return float(counts["least"] / copy / seconds)


def share_of_copy(row: Row, machine: Row) -> float | None:
    """The share of a copy that a measured row should reach; None where the model has none.

    Args:
        row: Kernel, variant, dtype and ``copy``, the copy that was measured beside it.
        machine: Its SMs and clock, where they are known.
    """
    counts = counted(row)
    if counts is None:
        return None
    sms = machine.get("cuda_multiprocessors") or SMS
    hertz = machine.get("cuda_clock_hz") or HERTZ
    copy = row["copy"]["bytes"] / row["copy"]["seconds"]["median"]
    return share(counts, copy, sms, hertz)
