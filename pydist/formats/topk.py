"""Blocks of which only the largest entries travel: how many, and how they are coded.

``docs/wire_format.md`` says what the bits mean, :mod:`pydist.reference.topk` executes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pydist.formats import wire
from pydist.formats.blocks import check_block, check_choice
from pydist.formats.wire import IntArray

Bytes = npt.NDArray[np.uint8]

VALUES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""What a value may travel as, and its number in the compiled module."""

BITMAP = -1
"""In place of a number of low bits: positions travel as one bit per element."""

DENSITY_ONE = 2**32
"""Densities are multiples of 2**-32, so that every backend counts entries with integers."""


@dataclass(frozen=True)
class TopKFormat:
    """Which entries of a block travel, and as what; what kernels are told of a codec.

    Attributes:
        density: Share of a block's elements that travel, above 0 and at most 1.
        block: Elements per block, a multiple of 32 from 32 to 65,536.
        values: ``"float32"``, ``"bfloat16"`` or ``"float16"``: how a value travels.

    Raises:
        TypeError: ``block`` is not an integer.
        ValueError: An attribute is out of range.
    """

    density: float
    block: int
    values: str = "float32"

    def __post_init__(self) -> None:
        if not 1 / DENSITY_ONE <= self.density <= 1:
            raise ValueError(f"density must be from 2**-32 to 1, got {self.density}")
        check_block(self.block)
        check_choice("values", self.values, tuple(VALUES))

    @property
    def value_bytes(self) -> int:
        """Bytes of a value."""
        return 4 if self.values == "float32" else 2

    @property
    def bits(self) -> int:
        """Bits of a value, for a header."""
        return 8 * self.value_bytes

    @property
    def share(self) -> int:
        """The density in units of 2**-32."""
        return round(self.density * DENSITY_ONE)

    def entries(self, n: int) -> int:
        """Entries of a block of ``n`` elements that travel: density · n to nearest, at least 1."""
        return max(1, (n * self.share + DENSITY_ONE // 2) // DENSITY_ONE)

    @property
    def low_bits(self) -> int:
        """Low bits of a position that travel as they are; :data:`BITMAP` where that is shorter."""
        k = self.entries(self.block)
        return BITMAP if 4 * k > self.block else (self.block // k).bit_length() - 1

    def high_bits(self, n: int) -> int:
        """Bits of the unary stream (or of the bitmap) of a block of ``n`` elements."""
        low = self.low_bits
        return n if low == BITMAP else self.entries(n) + ((n - 1) >> low)

    def bytes_of(self, n: int) -> int:
        """Bytes of a block of ``n`` elements, 1 … ``block``."""
        k, low = self.entries(n), max(self.low_bits, 0)
        words = wire.words_for(8 * k * self.value_bytes) + wire.words_for(k * low)
        return wire.WORD_BYTES * (words + wire.words_for(self.high_bits(n)))

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block."""
        return self.bytes_of(self.block)

    def blocks(self, n: int) -> int:
        """Blocks of ``n`` elements of one parameter."""
        return (n + self.block - 1) // self.block

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements of one parameter."""
        whole, rest = n // self.block, n % self.block
        return whole * self.block_bytes + (self.bytes_of(rest) if rest > 0 else 0)


def table_bytes(table: IntArray, form: TopKFormat) -> int:
    """Bytes of the payload of a segment table: whole blocks, but for the last."""
    if not len(table):
        return 0
    before = int(table[-1, 0]) // form.block * form.block_bytes
    return before + form.payload_bytes(int(table[-1, 1]))


@dataclass(frozen=True)
class Place:
    """One block: its elements among the dense values, its bytes in the payload, its parameter."""

    values: slice
    bytes: slice
    ordinal: int
    index: int

    @property
    def size(self) -> int:
        """Elements of the block."""
        return int(self.values.stop - self.values.start)


def places_of(n: int, table: IntArray | None, form: TopKFormat) -> Iterator[Place]:
    """The blocks of a segment table, in order."""
    dense = 0
    table = wire.one_segment(n) if table is None else table
    for offset, length, ordinal, first in table.tolist():
        for begin in range(0, length, form.block):
            size = min(form.block, length - begin)
            at = (offset + begin) // form.block * form.block_bytes
            yield Place(
                slice(dense + begin, dense + begin + size),
                slice(at, at + form.bytes_of(size)), ordinal, (first + begin) // form.block,
            )  # fmt: skip
        dense += length


def read_positions(payload: Bytes, n: int, form: TopKFormat) -> IntArray:
    """Ascending positions of the entries of a block of ``n`` elements.

    Raises:
        ValueError: No encoder writes such a stream: too few or too many positions, not ascending,
            beyond the block, or padding that is not zero.
    """
    used = form.entries(n) * form.value_bytes
    padded = -(-used // wire.WORD_BYTES) * wire.WORD_BYTES
    if payload[used:padded].any():
        raise ValueError("padding of the values is not zero")
    stream = payload[padded:]
    low, k = form.low_bits, form.entries(n)
    split = 0 if low == BITMAP else wire.WORD_BYTES * wire.words_for(k * low)
    bits = np.unpackbits(stream[split:], bitorder="little")
    if bits[form.high_bits(n) :].any():
        raise ValueError("padding of the high bits is not zero")
    ones = np.flatnonzero(bits).astype(np.int64)
    if ones.size != k:
        raise ValueError(f"{ones.size} positions, expected {k}")
    if low == BITMAP:
        return ones
    lows = np.unpackbits(stream[:split], bitorder="little")
    if lows[k * low :].any():
        raise ValueError("padding of the low bits is not zero")
    weights = 1 << np.arange(low, dtype=np.int64)
    parts = lows[: k * low].reshape(k, low).astype(np.int64) @ weights
    positions = ((ones - np.arange(k)) << low) + parts
    if (np.diff(positions) <= 0).any():
        raise ValueError("positions do not ascend")
    if positions[-1] >= n:
        raise ValueError(f"position {positions[-1]} is not below {n}")
    return positions


def malformed(
    payloads: Bytes, form: TopKFormat, n: int, *, segments: IntArray | None = None
) -> str | None:
    """Which row and block of ``payloads`` is malformed first, and what is wrong; else ``None``."""
    for rank, payload in enumerate(payloads):
        for number, place in enumerate(places_of(n, segments, form)):
            try:
                read_positions(payload[place.bytes], place.size, form)
            except ValueError as error:
                return f"row {rank}, block {number}: {error}"
    return None
