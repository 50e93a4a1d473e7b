"""What optimizers keep of a parameter: made when it is asked for, checked before it is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pydist.kernels.torch_tensors import check_storage
from pydist.optim.layout import FLOATS, check_count, check_finite
from pydist.optim.shards import like
from pydist.training.dtensor import is_sharded, local_of

LARGEST = 1e30
"""No kept value may be larger: float32 sums of such values over a layer or the ranks overflow."""


@dataclass(frozen=True)
class Kept:
    """What one entry of a parameter's state is.

    Attributes:
        kind: Type of the elements of a tensor of the parameter's shape; or ``int`` or ``float``.
        by_rank: Ranks keep different values: a checkpoint says whose it is.
        least: The smallest value.
        first: A number's value at first.
        later: ``None`` until it is needed, and kept elsewhere or not at all until then; the key is
            there, as torch's flattened checkpoints save and load the keys that they find.
        rows: Shape of a tensor, where it is not the parameter's.
    """

    kind: torch.dtype | type[int] | type[float]
    by_rank: bool = False
    least: float = -LARGEST
    first: float = 0
    later: bool = False
    rows: tuple[int, ...] | None = None

    def check(self, what: str, value: object, p: Tensor, order: tuple[int, ...]) -> Any:
        """The value as it is kept: a tensor where the parameter is, in its memory order.

        Args:
            what: Names the value in messages.
            value: What someone put there.
            p: The parameter.
            order: Its memory order.

        Raises:
            TypeError: It is of another type.
            ValueError: It has another shape, or is out of range.
        """
        if isinstance(self.kind, torch.dtype):
            if self.rows is not None:
                return _vector(what, value, self.kind, self.rows)
            return fitting(what, value, p, order, self.kind)
        check = check_count if self.kind is int else check_finite
        number = check(what, value)
        if not number >= self.least:
            raise ValueError(f"{what} must be at least {self.least:g}, got {value}")
        return number

    def bad(self, value: Tensor) -> Tensor:
        """Which elements are out of range or no numbers at all, bool."""
        x = local_of(value)
        return ~((x >= self.least) & (x <= LARGEST))

    def zeros(self, p: Tensor, order: tuple[int, ...]) -> Any:
        """The value at first."""
        if not isinstance(self.kind, torch.dtype):
            return self.kind(self.first)
        if self.rows is not None:
            return torch.zeros(self.rows, dtype=self.kind, device="cpu")
        # Not inference tensors: later steps change them.
        with torch.inference_mode(mode=False), torch.no_grad():
            mine = local_of(p)
            local = torch.empty_strided(mine.shape, order, dtype=self.kind, device=mine.device)
            return like(p, local.zero_())


class State(defaultdict[Tensor, dict[str, Any]]):
    """``optimizer.state``: what is missing is made when it is asked for.

    So it is never empty: torch's checkpoint tools make a step with zero gradients where it is
    (``torch.distributed.checkpoint.state_dict``), in the middle of training, on one rank perhaps.

    Args:
        fresh: Makes a parameter's state.
    """

    def __init__(self, fresh: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__(dict)
        self._fresh = fresh

    def __missing__(self, key: Tensor) -> dict[str, Any]:
        self[key] = entry = self._fresh(key)
        return entry

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:  # a copy does not hold the optimizer
        return defaultdict, (dict, dict(self))


def fitting(
    what: str, value: object, p: Tensor, order: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor as it must be beside a parameter; a copy only where it is not so already.

    Kernels get nothing but addresses, so this stands between them and what users, frameworks and
    checkpoints may have put into the state.

    Args:
        what: Names the tensor in messages.
        value: What someone put there.
        p: The parameter; a DTensor wants a DTensor.
        order: The parameter's memory order.
        dtype: The type of the elements.

    Returns:
        A tensor of the parameter's shape and device, in that order.

    Raises:
        TypeError: It is no tensor, or not one of floating point.
        ValueError: It has another shape, is cut otherwise, or has no memory.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value).__name__}")
    mine, x = local_of(p), local_of(value)
    if (
        x.dtype == dtype
        and x.layout is torch.strided
        and x.shape == mine.shape
        and x.stride() == order
        and x.device == mine.device
        and is_sharded(p) == is_sharded(value)
    ):
        check_storage(what, x)
        return value
    if x.dtype not in FLOATS or x.layout is not torch.strided or x.device.type == "meta":
        raise TypeError(f"{what} must hold floating-point numbers, got {x.dtype} on {x.device}")
    if value.shape != p.shape or x.shape != mine.shape:
        raise ValueError(f"{what} has shape {list(value.shape)}, the parameter {list(p.shape)}")
    if is_sharded(p) != is_sharded(value) or (
        is_sharded(p) and cast(Any, p).placements != cast(Any, value).placements
    ):
        raise ValueError(f"{what} is not cut over the ranks as the parameter is")
    check_storage(what, x)
    with torch.inference_mode(mode=False), torch.no_grad():
        local = torch.empty_strided(mine.shape, order, dtype=dtype, device=mine.device)
        return like(p, local.copy_(x))


def _vector(what: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{what} must be a tensor, {dtype} {list(shape)}, got {found}")
    if value.layout is not torch.strided or value.device.type == "meta":
        raise TypeError(f"{what} must have values, got {value.layout} on {value.device}")
    check_storage(what, value)
    return value.detach().to("cpu", copy=True)
