"""Parameters that are DTensors: what this rank has of them, and who has the rest.

FSDP2 and tensor parallelism hand an optimizer DTensors. The kernels work on a rank's local part,
and the ranks that vote on it must hold the same part: replicas of a shard, not other shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.errors import PydistError
from pydist.training.dtensor import is_sharded, local_of

FAILED = 1 << 30
"""Flag of a step that failed in another group of voters."""


def like(x: Tensor, local: Tensor) -> Tensor:
    """What has this part on this rank, and is cut as another tensor is."""
    if not is_sharded(x):
        return local
    tensor = cast(Any, x)
    return cast(Tensor, type(tensor).from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    ))  # fmt: skip


def _dimensions(x: Any) -> list[int]:
    """Mesh dimensions over which a DTensor is cut."""
    # Not is_shard(): that is false of the strided shards of FSDP2 beside tensor parallelism.
    return [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]


def check_placements(x: Tensor) -> None:
    """Raises TypeError for a DTensor of partial sums."""
    if is_sharded(x) and any(placement.is_partial() for placement in cast(Any, x).placements):
        raise TypeError(f"params must be whole or cut, got a DTensor of {cast(Any, x).placements}")


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """What this rank has of a gradient, where it has that of the parameter; may communicate.

    Tensor parallelism leaves gradients of whole parameters as partial sums on its ranks.
    """
    if not (is_sharded(param) and is_sharded(grad)):
        return grad
    x, g = cast(Any, param), cast(Any, grad)
    if g.placements != x.placements or g.device_mesh != x.device_mesh:
        g = g.redistribute(x.device_mesh, x.placements)
    return local_of(g)


def part_of(x: Tensor) -> list[Any]:
    """Which part of a DTensor this rank has: global shape, placements, place among the parts."""
    if not is_sharded(x):
        return []
    tensor = cast(Any, x)
    coordinate = tensor.device_mesh.get_coordinate()
    cuts = _dimensions(tensor)
    placements = [str(tensor.placements[i]) for i in cuts]
    return [list(tensor.shape), placements, [coordinate[i] for i in cuts]]


def shard_groups(sharded: Iterable[Tensor]) -> dict[dist.ProcessGroup, str]:
    """The groups of ranks that have the other parts of DTensors, in their order.

    Each with the type of the devices that it communicates from; parameters may be elsewhere
    (``CPUOffloadPolicy``).
    """
    groups: dict[dist.ProcessGroup, str] = {}
    for x in sharded:
        mesh = cast(Any, x).device_mesh
        for dimension in _dimensions(x):
            groups.setdefault(mesh.get_group(dimension), mesh.device_type)
    return groups


def agree_over_shards(
    flags: Tensor, failure: PydistError | None, groups: Mapping[dist.ProcessGroup, str]
) -> Tensor:
    """All parts of a model make a step, or none does.

    Args:
        flags: int32[1], this group of voters' flags.
        failure: Why this group of voters failed.
        groups: What :func:`shard_groups` gave.

    Returns:
        The flags of all parts, int32[1].

    Raises:
        PydistError: The step failed, here or where another part is.
    """
    found = flags if failure is None else torch.full_like(flags, FAILED)
    for group, device in groups.items():
        found = found.to(device, copy=True)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    if failure is not None:
        raise failure
    if groups and int(found) >= FAILED:
        raise PydistError("the step failed on the ranks that have another shard of the parameters")
    return found.to(flags.device)
