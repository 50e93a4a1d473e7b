"""What a voting optimizer asks of its parameters, and how it tells the other ranks about them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def names_of(param_groups: Iterable[dict[str, Any]]) -> list[str]:
    """A name for every parameter: its own, quoted, where names were given; else its place."""
    given = [name for group in param_groups for name in group.get("param_names", group["params"])]
    return [
        repr(name) if isinstance(name, str) else f"parameter {i}" for i, name in enumerate(given)
    ]


def describe(param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Name, dtype, shape and strides of every parameter: what must be equal on all ranks."""
    params = [p for group in param_groups for p in group["params"]]
    fields: dict[str, Any] = {"parameters": len(params)}
    for i, (name, p) in enumerate(zip(names_of(param_groups), params, strict=True)):
        fields[f"parameter {i}"] = [name, str(p.dtype), list(p.shape), list(p.stride())]
    return fields


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError where a group's learning rate, decay or betas are out of range."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be at least 0, got {lr}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def check_group(group: dict[str, Any]) -> None:
    """Raises unless the kernels can work with a group's options and parameters."""
    check_options(group)
    for p in group["params"]:
        if p.dtype not in FLOATS:
            raise TypeError(f"params must be float32, float16 or bfloat16, got {p.dtype}")
        if not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise TypeError(f"params must be dense in memory, got strides {p.stride()}")


def with_strides_of(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the parameter's memory order (a copy only where it has another)."""
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)
