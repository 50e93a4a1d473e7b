"""Process groups below a user's group: the one place that needs torch's private interface."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from pydist.transport.failures import LinkError


def store() -> Store:
    """The store that all ranks of the world share."""
    return dist.distributed_c10d._get_default_store()


def backend_for(group: dist.ProcessGroup, device: str) -> str | None:
    """The backend that a group has for tensors on a kind of device, such as ``"nccl"``."""
    try:
        return str(group._get_backend(torch.device(device)).name())
    except RuntimeError:  # it has none
        return None


def backends_of(group: dist.ProcessGroup) -> str:
    """The backends of a group, as a new one takes them."""
    return dist.distributed_c10d._world.pg_backend_config[group]


def new_group(
    ranks: list[int], rank: int, *, backend: str, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """A further group of the same ranks; only they take part in making it.

    ``torch.distributed.new_group`` must be called by all ranks of the world; with local
    synchronisation it hashes how many groups this process knows into the name, so that after one
    subgroup the ranks of an overlapping group no longer meet. So the name is given, a level below.

    Args:
        ranks: The ranks, as the world counts them.
        rank: This rank's place among them.
        backend: As ``torch.distributed`` names it.
        name: The same on all ranks, and new.
        timeout: The parent's: the default of 30 minutes would hide a stalled rank.
    """
    c10d = dist.distributed_c10d
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        rank,
        ranks,
        backend,
        c10d._get_default_store(),
        name,  # type: ignore[arg-type]  # a str under a name of torch's own
        timeout=timeout,
        group_desc=name,
    )
    c10d._world.pg_group_ranks[group] = {member: i for i, member in enumerate(ranks)}
    _forget_split(group)
    return group


def _forget_split(group: dist.ProcessGroup) -> None:
    """Lets NCCL make a communicator of the group's own at its first use.

    With ``init_process_group(device_id=…)`` torch would split it off the default communicator,
    which takes all ranks of the world: those that are no members would have to take part.
    """
    try:
        options: Any = group._get_backend(torch.device("cuda")).options
    except (RuntimeError, AttributeError):  # it has no backend for CUDA, or one without options
        return
    if getattr(options, "split_from", None) is not None:
        options.split_from = None


def destroy(group: dist.ProcessGroup) -> None:
    """Closes a group's connections, unless the whole world was closed before."""
    if dist.is_initialized() and group in dist.distributed_c10d._world.pg_map:
        dist.destroy_process_group(group)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The timeout that the user gave a group."""
    for kind in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(kind)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return dist.distributed_c10d.default_pg_timeout


def abort(group: dist.ProcessGroup) -> None:
    """Ends what is under way in a group, where its backend can."""
    for kind in ("cuda", "cpu"):
        try:
            group._get_backend(torch.device(kind)).abort()
        except (RuntimeError, AttributeError):
            continue


# --------------------------------------------------------------------------- exchanges

_HOST = torch.device("cpu")


def _host_backend(group: dist.ProcessGroup) -> Any:
    # The group's own methods go through torch's dispatcher, which takes longer.
    return group._get_backend(_HOST)


def wait(work: dist.Work) -> None:
    """Waits for an exchange.

    Raises:
        LinkError: It ended without a result.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise LinkError(str(error)) from None


def send(tensor: Tensor, target: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    """Starts sending a message in host memory to a rank, as the group counts them.

    Raises:
        LinkError: The connections have ended.
    """
    try:
        return _host_backend(group).send([tensor], target, tag)
    except RuntimeError as error:
        raise LinkError(str(error)) from None


def receive(tensor: Tensor, source: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    """Starts to wait for a message from a rank, which must not be longer than the memory for it.

    Raises:
        LinkError: The connections have ended.
    """
    try:
        return _host_backend(group).recv([tensor], source, tag)
    except RuntimeError as error:
        raise LinkError(str(error)) from None


def all_to_all(
    output: Tensor,
    tensor: Tensor,
    group: dist.ProcessGroup,
    received: list[int] | None = None,
    sent: list[int] | None = None,
) -> dist.Work:
    """Starts sending row i of ``tensor`` to rank i, or pieces of these lengths where given.

    Raises:
        LinkError: The connections have ended.
    """
    try:
        return dist.all_to_all_single(output, tensor, received, sent, group=group, async_op=True)
    except RuntimeError as error:
        raise LinkError(str(error)) from None


def all_gather(output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts gathering every rank's ``tensor``, flat, into ``output``.

    Raises:
        LinkError: The connections have ended.
    """
    # torch 2.13 renamed the function and warns at the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    try:
        return gather(output.view(-1), tensor.view(-1), group=group, async_op=True)
    except RuntimeError as error:
        raise LinkError(str(error)) from None
