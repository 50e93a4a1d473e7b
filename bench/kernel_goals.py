"""What the kernels are meant to reach, held against the rows that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernel_model import share_of_copy

from pydist.bench.options import FIRST_SIZES, size
from pydist.bench.show import title

Row = dict[str, Any]

SCALING = 1.7
CPU_SIZE = size(FIRST_SIZES["cpu"][0])
CUDA_SIZE = size(FIRST_SIZES["cuda"][0])
CUDA_OF_MODEL = 0.93  # so that what a copy's loops allow, 0.97, makes a goal of 0.9
CUDA_LAUNCH_SECONDS = 5e-6
# A size is bound by its launch where copying as many bytes would take less than this.
LAUNCH_BOUND_SECONDS = 1e-6


@dataclass(frozen=True)
class Goal:
    """One CPU thread, float32 (or bits): a share of a bandwidth of the same run.

    Attributes:
        kernel: Name of the kernel.
        variant: Its variant.
        of: ``"of_read"`` or ``"of_copy"``.
        least: The share to reach.
    """

    kernel: str
    variant: str
    of: str
    least: float


GOALS = (
    Goal("pack_signs", "", "of_read", 0.9),
    Goal("lion_pack_", "float32 momentum", "of_copy", 1.25),
    Goal("lion_apply_", "sign plane", "of_copy", 1.25),
    Goal("majority_vote", "8 payloads, ties hash", "of_read", 1.2),
    Goal("quantize", "BlockInt(4), blocks of 512", "of_read", 0.6),
    Goal("quantize", "BlockInt(8), blocks of 512", "of_read", 0.6),
    Goal("quantize", "QSGD(4), blocks of 512", "of_read", 0.35),
    Goal("dequantize", "BlockInt(4), blocks of 512", "of_read", 0.6),
    Goal("dequantize", "BlockInt(8), blocks of 512", "of_read", 0.6),
)


def verdicts(rows: Sequence[Row], machine: Row) -> list[Row]:
    """Each goal that the rows can decide: its text, what was measured, and whether it is met."""
    return list(_cuda(rows, machine) if "cuda_device" in machine else _cpu(rows))


def _cuda(rows: Sequence[Row], machine: Row) -> Iterator[Row]:
    for row in rows:
        if row["numel"] >= CUDA_SIZE:
            model = share_of_copy(row, machine)
            if model is not None:
                yield _share(row, "of_copy", CUDA_OF_MODEL * model) | {"model": model}
        elif launch_bound(row):
            taken = row["seconds"]["median"]
            yield {
                "goal": f"{title(row)}: under {1e6 * CUDA_LAUNCH_SECONDS:g} µs",
                "measured": f"{1e6 * taken:.2f} µs",
                "ratio": taken,
                "least": CUDA_LAUNCH_SECONDS,
                "met": "yes" if taken < CUDA_LAUNCH_SECONDS else "no",
            }


def launch_bound(row: Row) -> bool:
    """Whether the launch, and not memory, decides how long the kernel takes."""
    copied = row["copy"]
    per_byte: float = statistics.median(copied["samples"]) / copied["bytes"]
    return bool(row["bytes"] * per_byte < LAUNCH_BOUND_SECONDS)


def _cpu(rows: Sequence[Row]) -> Iterator[Row]:
    for goal in GOALS:
        found = {
            row["threads"]: row
            for row in rows
            if (row["kernel"], row["variant"], row["numel"])
            == (goal.kernel, goal.variant, CPU_SIZE)
            and row["dtype"] in ("float32", "bits")
        }
        if 1 in found:
            yield _share(found[1], goal.of, goal.least)
        if 1 in found and 2 in found:
            yield _scaling(found[1], found[2])


def _share(row: Row, of: str, least: float) -> Row:
    ratio = row[of]["median"]
    return {
        "goal": f"{title(row)}: {least:.2g} of {of[3:]}",
        "measured": f"{ratio:.2f} ({row[of]['of_medians']:.2f})",
        "ratio": ratio,
        "least": least,
        "met": "yes" if ratio >= least else "no",
    }


def _speedup(one: Row, two: Row) -> float:
    pairs = zip(one["samples"], two["samples"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _scaling(one: Row, two: Row) -> Row:
    kernel, copy = _speedup(one, two), _speedup(one["copy"], two["copy"])
    if kernel >= SCALING:
        met = "yes"
    else:
        met = "no" if copy >= SCALING else "not asked"
    return {
        "goal": f"  two threads: {SCALING:g} times one, where a copy reaches that",
        "measured": f"{kernel:.2f}, copy {copy:.2f}",
        "ratio": kernel,
        "least": SCALING,
        "met": met,
    }
