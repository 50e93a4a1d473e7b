"""Norms that are bit-identical on every machine and device."""

from __future__ import annotations

from collections.abc import Sequence

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


def norms_of(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """:func:`norm_of` of pieces of a tensor that lie one behind the other, float64 [pieces].

    A launch halves all pieces, instead of one each.

    Args:
        flat: One-dimensional, contiguous.
        lengths: Elements of each piece, ``len(flat)`` in all.
    """
    pieces = list(flat.double().square_().split(list(lengths)))
    while any(piece.numel() > 1 for piece in pieces):
        halves = [-(-piece.numel() // 2) for piece in pieces]
        long = [(x, half) for x, half in zip(pieces, halves, strict=True) if x.numel() > 1]
        torch._foreach_add_(
            [x[: x.numel() - half] for x, half in long], [x[half:] for x, half in long]
        )
        pieces = [x[:half] for x, half in zip(pieces, halves, strict=True)]
    empty = flat.new_zeros(1, dtype=torch.float64)
    return torch.cat([piece if piece.numel() else empty for piece in pieces]).sqrt_()
