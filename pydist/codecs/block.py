"""Integers and 8-bit floats with a scale a block."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.blocks import BlockFormat, check_bits, check_block, check_choice


@dataclass(frozen=True)
class BlockInt:
    """Symmetric integers: ± the largest magnitude of a block in ``2**bits - 1`` equal steps.

    The largest magnitude decodes to itself. With ``rounding="nearest"`` what was decoded encodes to
    the same codes again.

    Attributes:
        bits: Bits an element, 2 … 8.
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.
        rounding: ``"nearest"`` (even in ties) or ``"stochastic"`` (unbiased to 2**-16 of a step).

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    bits: int
    block: int = 128
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block(self.block)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        stochastic = self.rounding == "stochastic"
        return BlockFormat("levels", self.bits, self.block, "max", stochastic=stochastic)


@dataclass(frozen=True)
class BlockFloat:
    """8-bit floats times a power of two (OCP microscaling, with a float32 scale).

    The codes are those of torch's casts to ``float8_e4m3fn`` and ``float8_e5m2``: rounded to
    nearest even, held to the largest value. What was decoded encodes to the same codes again.

    Attributes:
        format: ``"e4m3"``: 3 bits of mantissa; ``"e5m2"``: 2 bits, and a wider range.
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    format: str = "e4m3"
    block: int = 128

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("e4m3", "e5m2"))
        check_block(self.block)

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        return BlockFormat(self.format, 8, self.block, "max")
