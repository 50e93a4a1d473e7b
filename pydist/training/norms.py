"""Norms that are bit-identical on every machine and device."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_of(x: Tensor) -> Tensor:
    """The Euclidean norm of a dense tensor, float64 [], bit-identical on every machine.

    Squares are double precision and added by halves: as long as there is more than one, those of
    the second half are added to those of the first, which is the longer one where they are odd.
    """
    total = x.as_strided((x.numel(),), (1,)).double()
    total = total * total
    while total.numel() > 1:
        half = (total.numel() + 1) // 2
        total[: total.numel() - half] += total[half:]
        total = total[:half]
    return torch.sqrt(total.sum())


def norm(x: Tensor) -> float:
    """:func:`norm_of` as a number; waits for the device."""
    return float(norm_of(x))
