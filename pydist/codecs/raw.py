"""Values as they are, or in a shorter float: no codes, no scales."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.blocks import check_choice

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Raw:
    """Values uncompressed: what other codecs are compared with, and what goes where links are fast.

    Every value travels as a float. The owner of a shard adds in float32, in rank order, divides
    once for a mean, and rounds once to the dtype of the wire; so ``Raw()`` loses nothing but what
    float32 sums lose. As with every codec a NaN or an infinity on any rank, or a value or sum that
    the wire's dtype cannot hold, makes the whole result NaN on all ranks.

    Attributes:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` on the wire, rounded to nearest even;
            ``None``: that of the tensor.

    Raises:
        ValueError: ``dtype`` is not one of these.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)

    @property
    def block_format(self) -> None:
        """No blocks."""
        return None
