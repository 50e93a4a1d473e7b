"""Steps that were skipped as a value was not finite."""

from __future__ import annotations

from torch import Tensor


class Skipped:
    """Counts skipped steps; on CUDA without waiting for the device.

    Args:
        total: Those of a checkpoint.

    Attributes:
        total: All of them.
        row: Those since the last step that was made.
    """

    LIMIT = 100
    """With so many in a row training stands still: no loss scale is found that slowly."""

    def __init__(self, total: int = 0) -> None:
        self.total: int | Tensor = total
        self.row: int | Tensor = 0
        self._seen = total

    def add(self, bad: bool | Tensor) -> None:
        """Counts a step.

        Args:
            bad: Whether it was skipped; on CUDA int64 without dimensions.
        """
        self.total = self.total + bad
        self.row = (self.row + 1) * bad

    def is_due(self, step: int) -> bool:
        """Whether steps were skipped that nobody has looked at yet (on CUDA asked now and then)."""
        if isinstance(self.total, Tensor) and step % self.LIMIT:
            return False
        total = int(self.total)
        new, self._seen = total > self._seen, total
        return new

    @property
    def standing_still(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return int(self.row) >= self.LIMIT
