"""Parameters that must be replicas of one another: compared over the ranks, taken from rank 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pydist.errors import MismatchError
from pydist.optim.layout import FLOATS
from pydist.training.dtensor import local_of
from pydist.training.replicas import checksum
from pydist.transport.communicator import Communicator


def comparable(p: Tensor) -> bool:
    """Whether a parameter is plain enough to be compared, as packed frozen weights may not be."""
    x = local_of(p)
    return type(x) in (Tensor, torch.nn.Parameter) and x.dtype in FLOATS


def take_first_ranks(
    comm: Communicator, params: Sequence[Tensor], names: Sequence[str]
) -> list[str]:
    """All ranks take over rank 0's values where theirs differ; to be run in the order of calls.

    Parameters of the same name and shape are replicas, unless their values say otherwise: where
    some are equal on all ranks and others are not, these are parts of something (experts, stages of
    a pipeline) or were damaged.

    Args:
        comm: The communicator.
        params: The parameters, equal in shape and dtype on all ranks.
        names: Their names.

    Returns:
        Names of those that differed.

    Raises:
        MismatchError: They are no replicas; on every rank.
    """
    if comm.world_size == 1:
        return []
    mine = np.array([checksum(p) for p in params], dtype=np.uint32)
    rows = np.stack([np.frombuffer(row, np.uint32) for row in comm.gather_bytes(mine.tobytes())])
    equal = (rows == mine).all(0)
    differ = np.flatnonzero(~equal).tolist()
    alike = [i for i in np.flatnonzero(equal).tolist() if not _says_nothing(params[i])]
    found = [names[i] for i in differ]
    if differ and alike:
        raise MismatchError(
            f"values of {', '.join(found[:5])} differ between ranks, though others, "
            f"{names[alike[0]]} for one, are equal on all of them. Experts and stages of a "
            "pipeline must not be mixed: give group= of the ranks that hold the same parameters. "
            "Make replicas equal before, by a seed or by DistributedDataParallel"
        )
    for i in differ:
        _broadcast(comm, params[i])
    return found


def refuse_partitions() -> None:
    """Raises ValueError inside a ``ZeroRedundancyOptimizer``.

    It hands its optimizer other parameters on every rank, which may be of equal shapes.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            raise ValueError(
                "params: a ZeroRedundancyOptimizer gives every rank other parameters, and "
                "optimizers that vote or average need the same on all of them: use this one alone"
            )
        frame = frame.f_back


def _says_nothing(p: Tensor) -> bool:
    """Whether equal values are no sign of a replica: frozen, or all the same as of fresh biases."""
    x = local_of(p).detach()
    return not p.requires_grad or not x.numel() or bool((x == x[(0,) * x.dim()]).all())


def _broadcast(comm: Communicator, p: Tensor) -> None:
    mine = local_of(p).detach()
    data = mine.to(comm.device(mine.device)).contiguous()
    dist.broadcast(data.view(-1).view(torch.uint8), comm.ranks[0], group=comm.first)
    if data.data_ptr() != mine.data_ptr():
        mine.copy_(data)
