"""What travels: sizes of payloads, tables of rows and segments, the header of a message.

Everything here is NumPy and the standard library; :mod:`pydist.reference` says what the bits mean,
``docs/wire_format.md`` says it in prose with golden bytes.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

WORD_BITS = 32
WORD_BYTES = 4
WIRE_VERSION = 2
MAX_RANKS = 65535

FLAG_NON_FINITE = 1
"""A NaN or an infinity was seen in this rank's contribution."""
FLAG_PROBLEM = 2
"""The rank cannot take part (its reason follows in an exchange of descriptions)."""
FLAG_MALFORMED = 4
"""A payload was malformed; raised by CUDA kernels (on the CPU that is an exception)."""

MAGIC = b"PDst"
_HEADER = struct.Struct("<4sBBBBII")
HEADER_BYTES = _HEADER.size
FLAGS_AT, CHECKSUM_AT = 7, 8
"""Where a header has its flags (a byte), and digest or checksum (4 bytes)."""

CODECS = {
    "sign": 1, "scaled_sign": 2, "qsgd": 3, "block_int": 4, "block_float": 5,
    "ternary": 6, "qsgd_elias": 7, "topk": 8, "raw": 9, "bucket": 10, "custom": 11,
    "confirmation": 254, "agreement": 255,
}  # fmt: skip

MAX_ENTRY = 2**48
"""Bound of offsets and lengths in a segment table: their sums then fit 64 bits."""

IntArray = npt.NDArray[np.int64]


def as_int(name: str, value: SupportsIndex) -> int:
    """The value as an int; raises TypeError, naming it, where it is none (1.0 is none)."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def words_for(n: int) -> int:
    """Number of 32-bit words that hold one bit for each of ``n`` elements."""
    return -(-n // WORD_BITS)


def payload_bytes(n: int) -> int:
    """Bytes of a 1-bit payload of ``n`` elements: padded with zero bits to a multiple of 4."""
    return -(-n // WORD_BITS) * WORD_BYTES


def planes_for(ranks: int) -> int:
    """Bit planes that hold a count of 0 … ``ranks``: ``ceil(log2(ranks + 1))``."""
    return int(ranks).bit_length()


@dataclass(frozen=True)
class Header:
    """The 16 bytes at the start of every message of a collective.

    Attributes:
        codec: Number of the codec (``CODECS``).
        bits: Bits per element (1 for sign planes, planes for counts).
        flags: ``FLAG_*``, OR-ed.
        digest: 32-bit checksum of what all ranks must agree on (lengths, options, learning rates);
            in messages that are checked, their checksum (:mod:`pydist.transport.message`).
        step: Step of the call, modulo 2**32.
    """

    codec: int
    bits: int
    flags: int
    digest: int
    step: int

    def pack(self) -> bytes:
        """The header as 16 bytes: magic, wire version, codec, bits, flags, digest, step."""
        return _HEADER.pack(
            MAGIC, WIRE_VERSION, self.codec, self.bits, self.flags, self.digest, self.step % 2**32
        )


def unpack_header(message: bytes) -> tuple[Header, str | None]:
    """Reads a header.

    Args:
        message: At least the first 16 bytes of a message.

    Returns:
        The header, and what is malformed about it (``None`` where nothing is).
    """
    if len(message) < HEADER_BYTES:
        return Header(0, 0, 0, 0, 0), f"message of {len(message)} bytes, below {HEADER_BYTES}"
    magic, version, codec, bits, flags, digest, step = _HEADER.unpack_from(message)
    header = Header(codec, bits, flags, digest, step)
    if magic != MAGIC:
        return header, f"magic {magic!r}, expected {MAGIC!r}"
    if version != WIRE_VERSION:
        return header, f"wire version {version}, expected {WIRE_VERSION}"
    return header, None


# --------------------------------------------------------------------------- segments
# A segment table says which elements of which parameters a flat buffer holds. int64 [k, 4]:
# (offset, length, ordinal, first): `length` elements of parameter `ordinal` from its element
# `first` on; their bits start at element `offset` of the payload, always a multiple of 32, so that
# parameters never share a word. The buffer itself is dense: row after row without padding.


def segments(
    lengths: Sequence[int],
    ordinals: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    *,
    block: int = WORD_BITS,
) -> IntArray:
    """Builds the segment table of parameters that lie one behind the other.

    Args:
        lengths: Elements of each parameter.
        ordinals: Each parameter's place in ``named_parameters()``; default 0, 1, 2, ….
        firsts: Index of the first element inside each parameter; default 0.
        block: Elements that must stay together: a codec's ``block``; default one payload word.

    Returns:
        int64 ``[len(lengths), 4]``: offset, length, ordinal, first.

    Raises:
        TypeError: An entry is not an integer.
        ValueError: The arguments have different lengths, or an entry is negative or huge, or not
            on the boundary of a block.
    """
    if as_int("block", block) < 1:
        raise ValueError(f"block must be positive, got {block}")
    k = len(lengths)
    table = np.zeros((k, 4), dtype=np.int64)
    columns = {
        1: ("lengths", lengths),
        2: ("ordinals", range(k) if ordinals is None else ordinals),
        3: ("firsts", [0] * k if firsts is None else firsts),
    }
    for column, (name, values) in columns.items():
        if len(values) != k:
            raise ValueError(f"{name} has {len(values)} entries, lengths has {k}")
        table[:, column] = [as_int(name, value) for value in values]
    padded = -(-table[:, 1] // block) * block
    table[1:, 0] = np.cumsum(padded)[:-1]
    check_segments(table, block)
    return table


def one_segment(n: int) -> IntArray:
    """The segment table of a bare tensor of ``n`` elements."""
    return np.array([[0, n, 0, 0]], dtype=np.int64)


def check_segments(table: IntArray, block: int = WORD_BITS) -> IntArray:
    """Raises ValueError, naming row and value, unless ``table`` is a segment table.

    Args:
        table: What to check.
        block: Rows start on multiples of this many elements of the payload.
    """
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(
            f"segments: expected int64 [k, 4] (offset, length, ordinal, first), "
            f"got {table.dtype} {list(table.shape)}"
        )
    if table.size and int(table.min()) < 0:
        raise ValueError(f"segments: negative entry {int(table.min())}")
    if table.size and int(table.max()) >= MAX_ENTRY:
        raise ValueError(f"segments: entry {int(table.max())} is not below {MAX_ENTRY}")
    if np.any(table[:, 0] % block):
        row = int(np.flatnonzero(table[:, 0] % block)[0])
        raise ValueError(
            f"segments: offset {int(table[row, 0])} of row {row} is not a multiple of {block}"
        )
    ends = table[:, 0] + -(-table[:, 1] // block) * block
    overlap = np.flatnonzero(table[1:, 0] < ends[:-1])
    if overlap.size:
        row = int(overlap[0]) + 1
        raise ValueError(
            f"segments: row {row} starts at {int(table[row, 0])}, inside row {row - 1} "
            f"(which ends at {int(ends[row - 1])})"
        )
    return table


def segments_words(table: IntArray) -> int:
    """Payload words up to the end of the last segment."""
    return int(table[-1, 0]) // WORD_BITS + words_for(int(table[-1, 1])) if len(table) else 0


def has_gaps(table: IntArray) -> bool:
    """Whether payload words before the end of the last segment belong to no segment."""
    if len(table) == 1:
        return bool(table[0, 0])
    return int(((table[:, 1] + WORD_BITS - 1) // WORD_BITS).sum()) != segments_words(table)


# --------------------------------------------------------------------------- rows
# What the kernels read: csrc/wire/layout.h, struct Row, as int64 [k, 9].
X, MOMENTUM, MOMENTUM_OUT, N, WORD, ORDINAL, FIRST, WORDS_BEFORE, MESSAGE = range(9)
COLUMNS = 9


def rows_of(table: IntArray) -> IntArray:
    """Rows for a segment table, addresses still zero."""
    rows = np.zeros((len(table), COLUMNS), dtype=np.int64)
    rows[:, WORD] = table[:, 0] // WORD_BITS
    rows[:, N] = table[:, 1]
    rows[:, ORDINAL] = table[:, 2]
    rows[:, FIRST] = table[:, 3]
    return number_rows(rows)


def one_row(x: int, n: int, *, word: int = 0, ordinal: int = 0, first: int = 0) -> IntArray:
    """A table of a single row without momenta."""
    return np.array([[x, 0, 0, n, word, ordinal, first, 0, 0]], dtype=np.int64)


def number_rows(rows: IntArray, unit: int = WORD_BITS) -> IntArray:
    """Fills in how many units of work lie before each row: device code and Elias codes go by it."""
    words = -(-rows[:, N] // unit)
    rows[:, WORDS_BEFORE] = np.cumsum(words) - words
    return rows


def dense_addresses(rows: IntArray, column: int, base: int, itemsize: int) -> None:
    """Addresses of rows that lie densely one behind the other from ``base`` on."""
    rows[:, column] = base + itemsize * (np.cumsum(rows[:, N]) - rows[:, N])


def cut_rows(
    rows: IntArray,
    begin: int,
    end: int,
    widths: tuple[int, int] | None = None,
    *,
    unit: int = WORD_BITS,
) -> IntArray:
    """The parts of rows whose bits lie in payload words ``begin`` … ``end``.

    Args:
        rows: int64 [k, 9], sorted by word.
        begin: First payload word wanted.
        end: One past the last payload word wanted.
        widths: Bytes per element of ``X`` and of the momenta, to advance their addresses.
        unit: Elements a word; a codec's ``block`` where ``WORD`` counts blocks.

    Returns:
        A new table; words stay those of the whole payload.
    """
    words = -(-rows[:, N] // unit)
    if len(rows) == 1 and begin <= rows[0, WORD] and rows[0, WORD] + words[0] <= end:
        return rows.copy()  # nothing to cut
    last = rows[:, WORD] + words
    part = rows[(last > begin) & (rows[:, WORD] < end)].copy()
    skip = np.maximum(begin - part[:, WORD], 0)
    drop = skip * unit
    if widths is not None:
        part[:, X] += drop * widths[0]
        part[:, MOMENTUM] += drop * widths[1]
        part[:, MOMENTUM_OUT] += drop * widths[1]
    part[:, FIRST] += drop
    part[:, WORD] += skip
    part[:, N] = np.minimum(part[:, N] - drop, (end - part[:, WORD]) * unit)
    return number_rows(part, unit)
