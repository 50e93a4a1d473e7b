"""In which order of memory the elements of a parameter lie in DDP's buckets, and in what is kept.

DDP lays a bucket out by the strides that parameters have when it makes the bucket: as it is built,
and once more before the second backward. It does not follow them later, and does not tell its hook.
So after ``model.to(memory_format=torch.channels_last)`` the order may be that of the new strides or
of the old ones; what a bucket holds is compared with the gradients that it was filled from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pydist.encoding.shares import Part
from pydist.training.buffers import real

_LOOKS = 3
"""DDP lays out anew before the second backward; so many in which one order fits are enough."""


class Order(Protocol):
    """Where the elements of a parameter lie in flat memory."""

    @property
    def size(self) -> tuple[int, ...]:
        """The parameter's shape."""
        ...

    def shaped(self, flat: Tensor) -> Tensor:
        """What is flat in this order, in the parameter's shape; may be a view."""
        ...

    def flat(self, values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor of values in the parameter's shape."""
        ...


@dataclass(frozen=True)
class Strided:
    """The order of a dense tensor's memory.

    Attributes:
        size: The parameter's shape.
        stride: Its strides.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(param: Tensor) -> Strided:
        """The order that DDP gives a parameter: its own, or that of its indices with gaps."""
        dense = torch.ops.aten.is_non_overlapping_and_dense(param)
        size = tuple(param.shape)
        return Strided.in_steps(size, param.stride() if dense else contiguous(size))

    @staticmethod
    def in_steps(size: tuple[int, ...], stride: Sequence[int]) -> Strided:
        """An order by its strides; those of dimensions with one index, or none, say nothing."""
        return Strided(size, tuple(1 if n < 2 else s for n, s in zip(size, stride, strict=True)))

    @property
    def is_dense(self) -> bool:
        """Whether each place in memory belongs to one element."""
        step = 1
        for stride, n in sorted(zip(self.stride, self.size, strict=True)):
            if n > 1 and stride != step:
                return False
            step *= n if n > 1 else 1
        return True

    def shaped(self, flat: Tensor) -> Tensor:
        """A view."""
        return flat.as_strided(self.size, self.stride)

    def flat(self, values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor."""
        flat = torch.zeros(math.prod(self.size), dtype=dtype, device=device)
        self.shaped(flat).copy_(values)
        return flat


def contiguous(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose last index runs first."""
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _channels_last(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of images (4 dimensions) and volumes (5) whose channels run first."""
    turned = contiguous([size[0], *size[2:], size[1]])
    return (turned[0], turned[-1], *turned[1:-1])


def _possible(own: Strided) -> Iterator[Strided]:
    yield own
    yield Strided.in_steps(own.size, contiguous(own.size))
    if len(own.size) in (4, 5):
        yield Strided.in_steps(own.size, _channels_last(own.size))


def has_several(param: Tensor) -> bool:
    """Whether a parameter's memory may have another order than that of its indices."""
    return len(set(_possible(Strided.of(real(param))))) > 1


class Orders:
    """The orders of the parameters in a model's buckets, by ordinal.

    A parameter that can have one only (a dense matrix, say) is looked at once. Others are compared
    with their gradients until one order has fitted a few times and no other did.
    """

    def __init__(self) -> None:
        self._found: dict[int, Strided] = {}
        self._open: dict[int, int] = {}  # how often one order alone has fitted

    def __getitem__(self, ordinal: int) -> Strided:
        return self._found[ordinal]

    def look(self, parts: Sequence[Part], params: Sequence[Tensor], flat: Tensor) -> None:
        """Finds the orders in a bucket, before its buffer is changed."""
        for part, param in zip(parts, params, strict=True):
            if part.ordinal not in self._found:
                self._found[part.ordinal] = Strided.of(real(param))
                if has_several(param):
                    self._open[part.ordinal] = 0
            if part.ordinal in self._open:
                self._compare(part, param, flat)

    def unsettled(self, ordinals: Sequence[int]) -> bool:
        """Whether some of these may have another order than was found."""
        return bool(self._open) and not self._open.keys().isdisjoint(ordinals)

    def _compare(self, part: Part, param: Tensor, flat: Tensor) -> None:
        grad = param.grad
        if grad is None or grad.is_sparse or part.numel == 0:
            return
        known, here = self._found[part.ordinal], flat[part.offset : part.offset + part.numel]
        grad = real(grad).to(here.dtype)  # a wrapper of the hook may have changed the bucket's
        candidates = dict.fromkeys([known, *_possible(Strided.of(real(param)))])
        fitting = [order for order in candidates if torch.equal(order.shaped(here), grad)]
        if len(fitting) != 1:  # zeros and the like fit all, NaN none
            return
        self._found[part.ordinal] = fitting[0]
        self._open[part.ordinal] += 1
        if self._open[part.ordinal] == _LOOKS:
            del self._open[part.ordinal]
