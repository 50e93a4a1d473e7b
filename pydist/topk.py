"""Blocks of which only the largest entries travel: how many, and how they are coded.

``docs/wire_format.md`` says what the bits mean, :mod:`pydist.reference_topk` executes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydist import wire
from pydist.blocks import check_block, check_choice
from pydist.wire import IntArray

VALUES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""What a value may travel as, and its number in the compiled module."""

BITMAP = -1
"""In place of a number of low bits: positions travel as one bit an element."""

DENSITY_ONE = 2**32
"""Densities are multiples of 2**-32, so that every backend counts entries with integers."""


@dataclass(frozen=True)
class TopKFormat:
    """Which entries of a block travel, and as what; what kernels are told of a codec.

    Attributes:
        density: Share of a block's elements that travel, above 0 and at most 1.
        block: Elements a block, a multiple of 32 from 32 to 65,536.
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
