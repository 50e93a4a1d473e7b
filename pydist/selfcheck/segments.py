"""Random segment tables of formats with blocks."""

from __future__ import annotations

import numpy as np

from pydist.formats import wire
from pydist.formats.blocks import Blocked


def some_block_segments(rng: np.random.Generator, n: int, form: Blocked) -> wire.IntArray:
    """A random table that covers ``n`` elements: short and empty rows, gaps, later pieces."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 4)))
    lengths = np.diff([0, *cuts.tolist(), n]).tolist()
    table = wire.segments(
        lengths,
        ordinals=rng.integers(0, 1000, len(lengths)).tolist(),
        firsts=(rng.integers(0, 2**30, len(lengths)) * form.block).tolist(),
        block=form.block,
    )
    table[:, 0] += np.cumsum(rng.integers(0, 2, len(lengths))) * form.block
    return table
