"""QSGD: levels between minus and plus the norm of a block, rounded at random."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.blocks import BlockFormat, check_bits, check_block, check_choice
from pydist.elias import ENTROPIES


@dataclass(frozen=True)
class QSGD:
    """Quantized SGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132): unbiased.

    A value is rounded up or down to one of ``2**bits - 1`` levels between ± the norm, at random and
    so that its expectation stays (to 2**-16 of a level).

    Attributes:
        bits: Bits an element, 2 … 8.
        block: Elements that share a norm, a multiple of 32 from 32 to 65,536.
        norm: ``"max"``: the largest magnitude, as in the paper's experiments; ``"l2"``: the
            Euclidean norm, as in its theorems: sparser, and of larger variance.
        entropy: ``"elias"``: blocks are sent as the paper's Elias codes, of variable length and
            never longer than ``None`` by more than a byte and 4 bytes of table. Values are the
            same to the bit.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    bits: int
    block: int = 512
    norm: str = "max"
    entropy: str | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block(self.block)
        check_choice("norm", self.norm, ("max", "l2"))
        if self.entropy not in ENTROPIES:
            raise ValueError(f"entropy must be None or 'elias', got {self.entropy!r}")

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        return BlockFormat("levels", self.bits, self.block, self.norm, stochastic=True)
