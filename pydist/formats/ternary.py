"""Ternary payloads: sizes, segment tables, rows.

A payload holds trits, five to a byte, in units of 160 elements and 32 bytes; sums of trits travel
as bit planes of a unit. ``docs/wire_format.md`` says what the bits mean,
:mod:`pydist.reference.ternary` executes it.
"""

from __future__ import annotations

import numpy as np

from pydist.formats import wire
from pydist.formats.wire import IntArray

UNIT = 160
"""Elements of a unit."""
UNIT_BYTES = 32
"""Bytes of a unit of trits."""
SUM_SEGMENT = 4096
"""Elements of a segment of a layer that is summed on its own."""
SEGMENT_SUM_BYTES = 8
"""Bytes of scratch memory for each such segment."""
LARGEST_BYTE = 242
"""The largest byte of five trits: 3**5 - 1."""


def check_clip(clip: float | None) -> None:
    """Raises unless ``clip`` is ``None`` or a positive number that float32 holds."""
    if clip is None:
        return
    number = isinstance(clip, (int, float))  # torch 2.9 compiles no int | float
    if isinstance(clip, bool) or not number:
        raise TypeError(f"clip must be a number or None, got {clip!r}")
    if not 2.0**-126 <= clip <= 2.0**126:
        raise ValueError(f"clip must be from 2**-126 to 2**126 (or None), got {clip!r}")


def units_for(n: int) -> int:
    """Units of ``n`` elements of one parameter."""
    return -(-n // UNIT)


def payload_bytes(n: int) -> int:
    """Bytes of the trits of ``n`` elements of one parameter."""
    whole, rest = divmod(n, UNIT)
    return whole * UNIT_BYTES + min(wire.words_for(8 * rest) * wire.WORD_BYTES, UNIT_BYTES)


def sum_bits(ranks: int) -> int:
    """Bits of a sum of ``ranks`` trits: ``ceil(log2(2 * ranks + 1))``."""
    return int(ranks).bit_length() + 1


def sum_unit_bytes(ranks: int) -> int:
    """Bytes of a unit's sums."""
    return sum_bits(ranks) * UNIT // 8


# --------------------------------------------------------------------------- tables


def check_segments(table: IntArray) -> IntArray:
    """Raises ValueError unless ``table`` is a segment table whose rows start on units."""
    return wire.check_segments(table, UNIT)


def table_units(table: IntArray) -> int:
    """Units up to the end of the last segment."""
    return int(table[-1, 0]) // UNIT + units_for(int(table[-1, 1])) if len(table) else 0


def table_bytes(table: IntArray) -> int:
    """Bytes of the payload: whole units, but for the last."""
    if not len(table):
        return 0
    return int(table[-1, 0]) // UNIT * UNIT_BYTES + payload_bytes(int(table[-1, 1]))


def has_gaps(table: IntArray) -> bool:
    """Whether units before the end of the last segment belong to no segment."""
    return int((-(-table[:, 1] // UNIT)).sum()) != table_units(table)


def rows_of(table: IntArray) -> IntArray:
    """Rows of a segment table, int64 [k, 4], addresses still zero; ``WORD`` counts units."""
    rows = wire.rows_of(table)
    rows[:, wire.WORD] = table[:, 0] // UNIT
    return rows


def scale_rows(rows: IntArray) -> IntArray:
    """The same rows as the scaler's kernel numbers them: ``WORD`` counts segments from 0 on."""
    rows = wire.number_rows(rows.copy(), SUM_SEGMENT)
    rows[:, wire.WORD] = rows[:, wire.WORDS_BEFORE]
    return rows


def scratch_bytes(rows: IntArray) -> int:
    """Scratch memory that the scalers of rows need."""
    return SEGMENT_SUM_BYTES * int((-(-rows[:, wire.N] // SUM_SEGMENT)).sum())


def place_scalers(rows: IntArray, own: int, shared: int) -> None:
    """Gives every row the addresses of its scalers, float32 arrays of one per row; 0 for none."""
    at = 4 * np.arange(len(rows), dtype=np.int64)
    rows[:, wire.MOMENTUM] = own + at if own else 0
    rows[:, wire.MOMENTUM_OUT] = shared + at if shared else 0
