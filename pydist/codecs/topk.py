"""Top-k: of every block the entries of largest magnitude, and where they are."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.topk import TopKFormat


@dataclass(frozen=True)
class TopK:
    """The largest entries of every block; what is not sent belongs into a residual.

    The selection is exact, and every block sends the same number of entries: density · block, to
    nearest and at least one. Gradient dropping (Aji and Heafield, EMNLP 2017, arXiv 1704.05021) and
    deep gradient compression (Lin et al., ICLR 2018, arXiv 1712.01887) select from a whole layer,
    and so need a message of another length in every step. A position takes about
    2 + log2(1 / density) bits.

    Attributes:
        density: Share of the elements that travel, above 0 and at most 1.
        block: Elements a block, a multiple of 32 from 32 to 65,536.
        values: ``"float32"``, ``"bfloat16"`` or ``"float16"``: how a value travels.

    Raises:
        TypeError: ``block`` is not an integer.
        ValueError: An attribute is out of range.
    """

    density: float = 0.001
    block: int = 65536
    values: str = "float32"

    def __post_init__(self) -> None:
        _ = self.topk_format

    @property
    def topk_format(self) -> TopKFormat:
        """What the kernels are told."""
        return TopKFormat(self.density, self.block, self.values)

    @property
    def block_format(self) -> None:
        """None: there is no scale a block."""
        return None
