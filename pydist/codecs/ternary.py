"""TernGrad: zero, plus or minus a scaler that all ranks share."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.ternary import check_clip


@dataclass(frozen=True)
class Ternary:
    """TernGrad (Wen et al., NeurIPS 2017, arXiv 1705.07878): unbiased but for the clipping.

    Values of a layer (a segment, or a bare tensor) are clipped, and then rounded at random to 0 or
    ± the scaler, the largest magnitude that any rank has left. As ranks share it, their sum is one
    of integers: it is exact, and nothing is lost on its way back. Five elements take a byte, the
    sum over n ranks ceil(log2(2 n + 1)) bits an element.

    The last layer is usually left alone, as are those of few elements.

    Attributes:
        clip: Magnitudes are held to so many standard deviations of the rank's own layer, the
            deviation being the root of the mean square; ``None`` for no clipping.

    Raises:
        TypeError: ``clip`` is not a number.
        ValueError: ``clip`` is not positive, or not one that float32 holds well.
    """

    clip: float | None = 2.5

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if self.clip is not None:  # 2 and 2.0 are the same codec on all ranks
            object.__setattr__(self, "clip", float(self.clip))

    @property
    def block_format(self) -> None:
        """There are no blocks."""
        return None
