"""What a Hopper card should give each CUDA kernel: its share of a copy's bandwidth, by counting.

A kernel is held back by the first of these, each a share of what a copy moves in the same time:

    0.97                                     a copy's own loops and tails
    1 / moved                                bytes that pass the memory's bus more than once
    0.75 * pipe / copy                       instructions: 3/4 of the busiest pipe's limit
    in_flight / (copy per SM * 0.7 us * r)   Little's law, r the share of the bytes that is read

and a part that runs on one block alone adds its time. ``pipe`` is in TB/s of the kernel's own least
bytes on 132 SMs at 1.98 GHz, from the instructions of the sm_90 code by pipe; other cards scale it
by SMs and clock. The counts are of loops, so a number is good to about 15 points where a pipe or
latency decides. No card has confirmed one yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SMS, HERTZ = 132, 1.98e9  # of the card that the pipes' limits are of
OF_COPY = 0.97
OF_PIPE = 0.75
LATENCY = 0.7e-6  # seconds from a load to its data
SERIAL_NUMEL = 64 << 20  # the length that serial parts are given for


@dataclass(frozen=True)
class Kernel:
    """What was counted.

    Attributes:
        pipe: TB/s that the busiest pipe allows.
        moved: Bytes moved, in times the least.
        in_flight: Bytes of loads in flight per SM, where they may be too few.
        read: Share of the least bytes that is read.
        serial: Seconds of one block alone at 64 Mi elements.
    """

    pipe: float
    moved: float = 1.0
    in_flight: float | None = None
    read: float = 1.0
    serial: float = 0.0


WIDE, NARROW, BITS = "float32", "16 bits", "bits"  # dtypes that need the same instructions
# By kernel, the beginning of the variant, dtype. Numbers in comments: elements per ns.
KERNELS: dict[tuple[str, str, str], Kernel] = {
    ("pack_signs", "", WIDE): Kernel(11.5),
    ("pack_signs", "", NARROW): Kernel(5.6),
    ("unpack_signs", "", WIDE): Kernel(7.9),
    ("unpack_signs", "", NARROW): Kernel(2.96),
    ("count_votes", "8", BITS): Kernel(5.9),
    ("majority_vote", "8", BITS): Kernel(5.9),
    ("lion_pack_", "float32", WIDE): Kernel(13.9),  # 1.15
    ("lion_pack_", "bfloat16", WIDE): Kernel(8.1),  # 1.0, between the two that were counted
    ("lion_pack_", "float32", NARROW): Kernel(10.1),  # 1.0, likewise
    ("lion_pack_", "bfloat16", NARROW): Kernel(5.4),  # 0.88
    ("lion_apply_", "sign", WIDE): Kernel(16.0),
    ("lion_apply_", "sign", NARROW): Kernel(5.3),
    ("lion_apply_", "counts of 8", WIDE): Kernel(8.6),  # 1.0: as many more as with 16 bits
    ("lion_apply_", "counts of 8", NARROW): Kernel(3.5),
    ("quantize", "BlockInt(4), blocks of 512", WIDE): Kernel(3.27),
    ("quantize", "BlockInt(4), blocks of 512", NARROW): Kernel(1.75),
    ("quantize", "BlockInt(8), blocks of 512", WIDE): Kernel(3.6),
    ("quantize", "BlockInt(8), blocks of 512", NARROW): Kernel(2.1),  # 0.70, as 4 bits
    ("quantize", "BlockInt(3), blocks of 128", WIDE): Kernel(1.32),
    ("quantize", "BlockInt(3), blocks of 128", NARROW): Kernel(0.70),
    ("quantize", "QSGD(4), blocks of 512", WIDE): Kernel(2.6),
    ("quantize", "QSGD(4), blocks of 512", NARROW): Kernel(1.4),
    ("dequantize", "BlockInt(4), blocks of 512", WIDE): Kernel(3.16),
    ("dequantize", "BlockInt(4), blocks of 512", NARROW): Kernel(1.7),
    ("dequantize", "BlockInt(8), blocks of 512", WIDE): Kernel(3.5),
    ("dequantize", "BlockInt(8), blocks of 512", NARROW): Kernel(2.0),
    ("dequantize", "BlockInt(3), blocks of 128", WIDE): Kernel(1.4),
    ("dequantize", "BlockInt(3), blocks of 128", NARROW): Kernel(0.74),
    ("dequantize", "QSGD(4), blocks of 512", WIDE): Kernel(3.16),  # decodes as integers do
    ("dequantize", "QSGD(4), blocks of 512", NARROW): Kernel(1.7),
    # 16 warps per SM, and the second pass waits for the first: half of 4 loads of 16 bytes, of
    # which 128 elements fill half a warp.
    ("quantize_feedback_", "BlockInt(4), blocks of 512", WIDE): Kernel(9.0, 1, 10e3, 0.68),
    ("quantize_feedback_", "BlockInt(4), blocks of 512", NARROW): Kernel(7.5, 1, 8e3, 0.57),
    ("quantize_feedback_", "BlockInt(8), blocks of 128", WIDE): Kernel(4.5, 1, 6.4e3, 0.62),
    ("quantize_feedback_", "BlockInt(8), blocks of 128", NARROW): Kernel(3.7, 1, 5e3, 0.54),
    # About 20 instructions per rank beside the 48 of the first; not counted by pipe.
    ("sum_quantized", "BlockInt(4), blocks of 512, 2", WIDE): Kernel(2.5),
    ("sum_quantized", "BlockInt(4), blocks of 512, 2", NARROW): Kernel(1.45),
    ("sum_quantized", "BlockInt(4), blocks of 512, 8", WIDE): Kernel(1.4),
    ("sum_quantized", "BlockInt(4), blocks of 512, 8", NARROW): Kernel(1.05),
    ("reduce_quantized", "BlockInt(4), blocks of 512, 2", BITS): Kernel(0.43),  # decodes twice
    ("reduce_quantized", "BlockInt(4), blocks of 512, 8", BITS): Kernel(0.45),
    ("ternary_scale", "", WIDE): Kernel(15.0, moved=2.0, serial=180e-6),
    ("ternary_scale", "", NARROW): Kernel(7.5, serial=180e-6),
    ("ternary_pack", "", WIDE): Kernel(4.2),
    ("ternary_pack", "", NARROW): Kernel(2.2),
    ("ternary_unpack", "", WIDE): Kernel(2.5),
    ("ternary_unpack", "", NARROW): Kernel(1.3),
    ("ternary_sum", "8", BITS): Kernel(0.48),
    ("ternary_unpack_sums", "8", WIDE): Kernel(0.90),
    ("ternary_unpack_sums", "8", NARROW): Kernel(0.51),
    # Four readings of a block; in 16 bits those of the blocks at work fit into the L2 cache.
    ("topk_select", "TopK(", WIDE): Kernel(2.2, moved=4.0),
    ("topk_select", "TopK(", NARROW): Kernel(1.1),
    ("topk_scatter", "TopK(", WIDE): Kernel(30.0, moved=1 / 0.86),  # the last of 2.6 waves
    ("topk_scatter", "TopK(", NARROW): Kernel(15.0, moved=1 / 0.86),
    ("topk_feedback_", "TopK(", WIDE): Kernel(6.6, moved=3.0),
    ("topk_feedback_", "TopK(", NARROW): Kernel(5.5, moved=2.8),
    # One load per thread, and the sum waits for it: 8 and 16 KB, less while it waits.
    ("sum_values", "2", WIDE): Kernel(25.0, 1, 6.9e3, 2 / 3),
    ("sum_values", "2", NARROW): Kernel(12.0, 1, 10e3, 2 / 3),
}
# Elias codes and sums of sparse payloads have no share: their bytes are not what they wait for.
NO_SHARE = ("elias_encode", "elias_decode", "topk_reduce")


def counted(row: Row) -> Kernel | None:
    """What was counted for a row's kernel; None where bytes don't bound it."""
    dtype = {"float32": WIDE, "bits": BITS}.get(row["dtype"], NARROW)
    for (kernel, variant, kind), found in KERNELS.items():
        if (kernel, kind) == (row["kernel"], dtype) and row["variant"].startswith(variant):
            return found
    return None


def share_of_copy(row: Row, machine: Row) -> float | None:
    """The share of a copy that a row should reach; None where the model has none.

    Args:
        row: ``bytes``, ``numel`` and ``copy``, the copy that was measured beside it.
        machine: Its SMs and clock, where they are known.
    """
    kernel = counted(row)
    if kernel is None:
        return None
    sms = machine.get("cuda_multiprocessors") or SMS
    hertz = machine.get("cuda_clock_hz") or HERTZ
    copy = row["copy"]["bytes"] / row["copy"]["seconds"]["median"]
    pipe = 1e12 * kernel.pipe * sms * hertz / (SMS * HERTZ)
    share = min(OF_COPY, 1 / kernel.moved, OF_PIPE * pipe / copy)
    if kernel.in_flight is not None:
        share = min(share, kernel.in_flight * sms / (copy * LATENCY * kernel.read))
    ideal = row["bytes"] / copy
    serial = kernel.serial * row["numel"] / SERIAL_NUMEL
    return ideal / (ideal / share + serial)
