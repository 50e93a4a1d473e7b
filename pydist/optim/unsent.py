"""Residuals of a parameter as checkpoints have them: what a rank has not sent, in full shape."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pydist.optim.layout import shaped


class Unsent(NamedTuple):
    """What a rank has not sent of a parameter.

    Attributes:
        worker: Of its own values, in the parameter's shape.
        owner: Of the mean of its share of the parameter; elsewhere zeros.
        span: int64[4] on the host: the share's first element in the parameter's memory order, one
            past its last, whether all ranks hold the same, and :func:`digest_of` that order.
    """

    worker: Tensor
    owner: Tensor
    span: Tensor

    @classmethod
    def nothing(cls, x: Tensor, order: tuple[int, ...], dtype: torch.dtype) -> Unsent:
        """Zeros, in the shape and on the device of a tensor, and in a memory order."""
        worker, owner = (
            torch.empty_strided(x.shape, order, dtype=dtype, device=x.device).zero_()
            for _ in range(2)
        )
        return cls(worker, owner, torch.zeros(4, dtype=torch.int64, device="cpu"))

    def check(self, what: str) -> None:
        """Raises ValueError where the span is none of the parameter."""
        first, last, whole, _ = self.span.tolist()
        if not 0 <= first <= last <= self.owner.numel() or whole not in (0, 1):
            raise ValueError(f"{what} must be a part of {self.owner.numel()} elements, got {first}"
                             f" to {last}")  # fmt: skip

    def of_worker(self, ranks: int, rank: int) -> Tensor:
        """All of it as what this rank did not send of its own values, float32.

        An owner's element counts once in a mean, a worker's one over the number of ranks.

        Args:
            ranks: Ranks that held residuals.
            rank: This one; what all of them hold counts for the first.
        """
        _, _, whole, _ = self.span.tolist()
        total = self.worker.float()
        return total if whole and rank else total + self.owner.float() * ranks


def mean_unsent(everyones: Sequence[Unsent]) -> Unsent:
    """What each of any number of ranks takes over of what others had not sent.

    In the mean over the ranks it weighs as much as it did.
    """
    first = everyones[0]
    total = torch.zeros_like(first.worker, dtype=torch.float32)
    for rank, one in enumerate(everyones):
        total += one.of_worker(len(everyones), rank)
    result = Unsent.nothing(first.worker, first.worker.stride(), first.worker.dtype)
    result.worker.copy_(total / len(everyones))
    return result


def digest_of(strides: Sequence[int]) -> int:
    """A checksum of a memory order."""
    return zlib.crc32(repr(list(strides)).encode())


def flattened(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy of a tensor, flat in a memory order."""
    flat = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    shaped(flat, x.shape, order).copy_(x)
    return flat
