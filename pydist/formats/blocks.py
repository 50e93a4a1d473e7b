"""Formats that share a scale among the elements of a block: what a code is, sizes, tables.

A payload holds the codes of all blocks, block after block, and then the blocks' scales (float32).
``docs/wire_format.md`` says what the bits mean, :mod:`pydist.reference.blocks` executes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pydist.formats import wire
from pydist.formats.wire import IntArray

SCHEMES = {"sign": 0, "levels": 1, "e4m3": 2, "e5m2": 3}
NORMS = {"max": 0, "l1": 1, "l2": 2}
NORMS_OF = {
    "sign": ("l1", "l2"), "levels": ("max", "l2"), "e4m3": ("max",), "e5m2": ("max",),
}  # fmt: skip
SCALE_BYTES = 4
MIN_BLOCK, MAX_BLOCK = 32, 65536


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of the known names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_bits(bits: int) -> None:
    """Raises unless ``bits`` is 2 … 8."""
    if not 2 <= wire.as_int("bits", bits) <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}")


def check_block(block: int) -> None:
    """Raises unless ``block`` is a multiple of 32 that kernels take."""
    if not MIN_BLOCK <= wire.as_int("block", block) <= MAX_BLOCK or block % wire.WORD_BITS:
        raise ValueError(
            f"block must be a multiple of {wire.WORD_BITS} from {MIN_BLOCK} to {MAX_BLOCK}, "
            f"got {block}"
        )


@dataclass(frozen=True)
class BlockFormat:
    """How a block of elements becomes codes and a scale; what kernels are told of a codec.

    Attributes:
        scheme: ``"sign"``: ± the scale; ``"levels"``: multiples of scale / L from -L to L, where L
            is ``2**(bits - 1) - 1``; ``"e4m3"``, ``"e5m2"``: an 8-bit float times the scale.
        bits: Bits a code: 1 for signs, 2 … 8 for levels, 8 for floats.
        block: Elements per block, a multiple of 32 from 32 to 65,536.
        norm: What the scale is made of: ``"max"`` the largest magnitude, ``"l1"`` their mean (of
            signs), ``"l2"`` the Euclidean norm (of signs: over the root of the block's length).
        stochastic: Levels are rounded at random, to their expectation; else to nearest even.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range, or does not go with the scheme.
    """

    scheme: str
    bits: int
    block: int
    norm: str
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_choice("scheme", self.scheme, tuple(SCHEMES))
        check_choice("norm", self.norm, NORMS_OF[self.scheme])
        check_block(self.block)
        if self.scheme == "levels":
            check_bits(self.bits)
        elif wire.as_int("bits", self.bits) != (1 if self.scheme == "sign" else 8):
            raise ValueError(f"bits must be {1 if self.scheme == 'sign' else 8}, got {self.bits}")
        if self.stochastic and self.scheme != "levels":
            raise ValueError(f"stochastic goes with levels only, got scheme {self.scheme!r}")

    @property
    def levels(self) -> int:
        """The largest level L; a code is the level plus L."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block's codes."""
        return self.block * self.bits // 8

    def code_bytes(self, n: int) -> int:
        """Bytes of the codes of ``n`` elements of one parameter."""
        return (n * self.bits + 31) // 32 * 4

    def blocks(self, n: int) -> int:
        """Blocks of ``n`` elements of one parameter."""
        return (n + self.block - 1) // self.block

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements of one parameter."""
        return self.code_bytes(n) + SCALE_BYTES * self.blocks(n)


# --------------------------------------------------------------------------- tables


class Blocked(Protocol):
    """A format whose elements stay together in blocks."""

    @property
    def block(self) -> int:
        """Elements per block."""

    def blocks(self, n: int) -> int:
        """Blocks of ``n`` elements of one parameter."""


def check_segments(table: IntArray, form: Blocked) -> IntArray:
    """Raises ValueError unless ``table`` is a segment table whose rows start on blocks."""
    wire.check_segments(table, form.block)
    odd = np.flatnonzero(table[:, 3] % form.block)
    if odd.size:
        row = int(odd[0])
        raise ValueError(
            f"segments: first element {int(table[row, 3])} of row {row} is not a multiple of "
            f"{form.block}: blocks belong to parameters"
        )
    return table


def table_blocks(table: IntArray, form: Blocked) -> int:
    """Blocks up to the end of the last segment."""
    if not len(table):
        return 0
    return int(table[-1, 0]) // form.block + form.blocks(int(table[-1, 1]))


def table_code_bytes(table: IntArray, form: BlockFormat) -> int:
    """Bytes of all codes: whole blocks, but for the last."""
    if not len(table):
        return 0
    return int(table[-1, 0]) * form.bits // 8 + form.code_bytes(int(table[-1, 1]))


def table_bytes(table: IntArray, form: BlockFormat) -> int:
    """Bytes of the payload: codes, then scales."""
    return table_code_bytes(table, form) + SCALE_BYTES * table_blocks(table, form)


def has_gaps(table: IntArray, form: Blocked) -> bool:
    """Whether blocks before the end of the last segment belong to no segment."""
    covered = int((-(-table[:, 1] // form.block)).sum())
    return covered != table_blocks(table, form)


def rows_of(table: IntArray, form: Blocked) -> IntArray:
    """Rows of a segment table, addresses still zero; ``WORD`` and ``WORDS_BEFORE`` count blocks."""
    rows = wire.rows_of(table)
    rows[:, wire.WORD] = table[:, 0] // form.block
    return wire.number_rows(rows, form.block)


def cut_rows(
    rows: IntArray,
    begin: int,
    end: int,
    form: BlockFormat,
    widths: tuple[int, int] | None = None,
) -> IntArray:
    """The parts of rows in blocks ``begin`` … ``end``; see :func:`pydist.formats.wire.cut_rows`."""
    return wire.cut_rows(rows, begin, end, widths, unit=form.block)
