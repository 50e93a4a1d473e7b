"""FSDP1's private interface: all that pydist takes from it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from pydist.training.names import module_names

__all__ = ["FullyShardedDataParallel"]


class FlatParameter(NamedTuple):
    """One parameter in a unit's flat one.

    Attributes:
        name: Its name inside the unit.
        shape: Its shape.
        offset: Its first element in the flat parameter.
    """

    name: str
    shape: torch.Size
    offset: int


class Unit(NamedTuple):
    """A FullyShardedDataParallel with parameters of its own.

    Attributes:
        name: Its name in the model, wrappers left out.
        module: It.
    """

    name: str
    module: FullyShardedDataParallel


def units_of(module: nn.Module) -> Iterator[Unit]:
    """Every unit of a tree."""
    for child, name in module_names(module).items():
        if isinstance(child, FullyShardedDataParallel) and child._handle is not None:
            yield Unit(name, child)


def roots_of(module: nn.Module) -> Iterator[FullyShardedDataParallel]:
    """Those of a tree that are in no other."""
    inside: set[nn.Module] = set()
    for child in module.modules():
        if isinstance(child, FullyShardedDataParallel):
            if child not in inside:
                yield child
            inside.update(child.modules())


def is_hybrid(unit: FullyShardedDataParallel) -> bool:
    """Whether it is sharded over some ranks and replicated over others."""
    hybrid = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    return unit.sharding_strategy in hybrid


def is_replicated(unit: FullyShardedDataParallel) -> bool:
    """Whether it is not sharded at all."""
    return unit.sharding_strategy == ShardingStrategy.NO_SHARD


def group_of(unit: FullyShardedDataParallel) -> dist.ProcessGroup:
    """The ranks that reduce its gradients."""
    group: Any = unit.process_group
    return group


def parameters_of(unit: FullyShardedDataParallel) -> Iterator[FlatParameter]:
    """What a unit's flat parameter holds, in order, alignment left out."""
    flat: Any = unit._handle.flat_param  # type: ignore[union-attr]
    held, at = iter(zip(flat._fqns, flat._shapes, strict=True)), 0
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            name, shape = next(held)
            yield FlatParameter(name, torch.Size(shape), at)
        at += numel


def requires_grad(unit: FullyShardedDataParallel) -> bool:
    """Whether a unit's parameters are trained."""
    return bool(unit._handle.flat_param.requires_grad)  # type: ignore[union-attr]


def device_of(unit: FullyShardedDataParallel) -> torch.device:
    """Where a unit computes."""
    device: Any = unit.compute_device
    return device


def dtype_of(unit: FullyShardedDataParallel) -> torch.dtype:
    """The dtype of a unit's parameters."""
    dtype: torch.dtype = unit._handle.flat_param.dtype  # type: ignore[union-attr]
    return dtype


def set_hook_state(unit: FullyShardedDataParallel, state: object) -> None:
    """Gives a unit a hook state of its own; ``register_comm_hook`` gives all the same."""
    unit._comm_hook_state = state


def hook_of(unit: FullyShardedDataParallel) -> Any:
    """A unit's communication hook."""
    return unit._comm_hook


def remove_hook(module: nn.Module, hook: object) -> bool:
    """Takes a communication hook away from all of a tree; whether it was there."""
    found = [
        child
        for child in module.modules()
        if isinstance(child, FullyShardedDataParallel) and child._comm_hook is hook
    ]
    for child in found:
        child._comm_hook = child._comm_hook_state = None
    return bool(found)
