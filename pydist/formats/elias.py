"""Elias-coded payloads: sizes, and what can be wrong with them.

A payload of levels (:mod:`pydist.formats.blocks`) becomes one of variable length: where each
block's stream ends (uint32), the scales (float32), the streams. ``docs/wire_format.md`` says what
the bits mean, :mod:`pydist.reference.elias` executes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pydist.formats import wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.formats.wire import IntArray

ENTROPIES = (None, "elias")
MODE_BITS = 2
END_BYTES = 4
NO_FAULT = 2**63 - 1
"""What a decoder leaves in its result where every block is well-formed."""

REASONS = (
    "",
    "the stream ends inside a code",
    "its mode is 3, which nothing writes",
    "it counts more nonzero levels than it has elements",
    "a level is above the largest",
    "a gap leads past its last element",
    "bits follow its last code",
    "its place in the table is not behind the previous one, or too long, or outside the payload",
    "its stream is empty and its scale a number, or its scale is NaN and its stream is not empty",
)
"""Why a block is malformed; csrc/wire/elias.h numbers them alike."""


class MalformedError(ValueError):
    """A block whose bytes no encoder wrote.

    Attributes:
        block: Its number.
        reason: What is wrong, an index of :data:`REASONS`.
    """

    def __init__(self, block: int, reason: int) -> None:
        super().__init__(f"block {block} is malformed: {REASONS[reason]}")
        self.block, self.reason = block, reason


def check_fault(result: int) -> None:
    """Raises MalformedError where a decoder found a fault."""
    if result != NO_FAULT:
        raise MalformedError(result // 16, result % 16)


def first_fault(results: Iterable[int]) -> tuple[int, str] | None:
    """Which of several payloads is malformed, the first of them, and why."""
    for i, result in enumerate(results):
        try:
            check_fault(result)
        except MalformedError as error:
            return i, str(error)
    return None


def stream_bytes(n: int, form: BlockFormat) -> int:
    """The most bytes that the stream of a block of ``n`` elements takes."""
    return (MODE_BITS + n * form.bits + 7) // 8


def count_blocks(table: IntArray, form: BlockFormat) -> int:
    """Blocks of all segments; gaps between segments have none here."""
    return int((-(-table[:, 1] // form.block)).sum())


def head_bytes(table: IntArray, form: BlockFormat) -> int:
    """Bytes before the streams."""
    return (END_BYTES + SCALE_BYTES) * count_blocks(table, form)


def longest_bytes(table: IntArray, form: BlockFormat) -> int:
    """The most bytes that a payload takes.

    Raises:
        ValueError: The ends of streams would not fit 32 bits.
    """
    whole, rest = np.divmod(table[:, 1], form.block)
    tails = np.where(rest > 0, (MODE_BITS + rest * form.bits + 7) // 8, 0)
    streams = int(whole.sum()) * stream_bytes(form.block, form) + int(tails.sum())
    if streams >= 2**32:
        raise ValueError(
            f"n must be smaller: {int(table[:, 1].sum())} elements may take {streams} bytes, "
            f"which 32 bits cannot count"
        )
    return payload_bytes(table, form, streams)


def payload_bytes(table: IntArray, form: BlockFormat, streams: int) -> int:
    """Bytes of a payload whose streams take so many."""
    padded = -(-streams // wire.WORD_BYTES) * wire.WORD_BYTES
    return head_bytes(table, form) + padded
