"""Post-local SGD: steps whose gradients stay on the rank, or in a subgroup.

Lin et al., "Don't Use Large Mini-Batches, Use Local SGD" (arXiv 1808.07217). Parameters are
averaged elsewhere, by ``torch.distributed.algorithms.model_averaging``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.training.buffers import result_of


def check_subgroup(subgroup: dist.ProcessGroup | None) -> None:
    """Raises unless this rank is in its subgroup.

    Raises:
        TypeError: It is not a process group.
        ValueError: This rank is not in it.
    """
    if subgroup is None:
        return
    if not isinstance(subgroup, dist.ProcessGroup):
        if subgroup == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("subgroup must be one that this rank is in")
        raise TypeError(f"subgroup must be a process group, got {type(subgroup).__name__}")


def size(subgroup: dist.ProcessGroup | None) -> int:
    """How many ranks a local step's gradients are the mean of."""
    return 1 if subgroup is None else dist.get_world_size(subgroup)


def mean_in(
    subgroup: dist.ProcessGroup | None,
    flat: Tensor,
    buffer: Tensor,
    arrived: Callable[[Tensor], None],
) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over a subgroup, uncompressed; without one the bucket as it is.

    Divides first, as DDP itself does.

    Args:
        subgroup: The ranks to average over.
        flat: The bucket's values; overwritten.
        buffer: The bucket's buffer.
        arrived: Called with ``flat`` once it holds the mean.
    """

    def done() -> Tensor:
        arrived(flat)
        return result_of(buffer, flat)

    if (ranks := size(subgroup)) > 1:
        flat.div_(ranks)
        work = dist.all_reduce(flat, group=subgroup, async_op=True)
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda _: done())
        return future
    devices: Any = [flat.device] if flat.is_cuda else []
    future = torch.futures.Future(devices=devices)
    future.set_result(done())
    return future


def bytes_sent(subgroup: dist.ProcessGroup | None, flat: Tensor) -> int:
    """What a rank sends in a ring all-reduce of a bucket in its subgroup."""
    ranks = size(subgroup)
    return 2 * (ranks - 1) * flat.numel() * flat.element_size() // ranks
