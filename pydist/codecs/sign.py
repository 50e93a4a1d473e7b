"""One bit a parameter: the sign."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.blocks import BlockFormat, check_block, check_choice


@dataclass(frozen=True)
class Sign:
    """Signs, bare or with a scale a block.

    Attributes:
        scale: ``None``: a vote of ±1. ``"l1"``: ± the mean magnitude of the block, the scale with
            the least error (EF-SGD). ``"l2"``: ± the root of its mean square (1-bit Adam).
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.

    Raises:
        ValueError: An attribute is out of range.
    """

    scale: str | None
    block: int = 512

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_choice("scale", self.scale, ("l1", "l2"))
        check_block(self.block)

    @property
    def block_format(self) -> BlockFormat | None:
        """What the kernels are told; ``None`` for bare votes, which have kernels of their own."""
        return None if self.scale is None else BlockFormat("sign", 1, self.block, self.scale)
