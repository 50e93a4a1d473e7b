"""What to say when kept values turn out to be damaged."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

LOOK_EVERY = 100
"""On CUDA: steps from one look for damage to the next, as each waits for the device."""


class Damage:
    """Counts damaged residuals and momenta that were dropped, by name of parameter.

    Any thread may read meanwhile: what is read is replaced, never changed.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, names: Iterable[str]) -> None:
        """Counts some, and warns of each name once."""
        counted = self._counts.copy()
        fresh = [name for name in names if not counted[name]]
        counted.update(names)
        self._counts = counted
        if fresh:
            warnings.warn(
                f"residuals or momenta of {fresh[:5]} held values that are not finite, or out of "
                "all bounds (a damaged checkpoint, memory that failed?): those elements are zero "
                "now, and training goes on",
                stacklevel=2,
            )

    def counts(self) -> dict[str, int]:
        """Name to number of steps."""
        return dict(self._counts)
