"""Process groups below a user's group: the one place that needs torch's private interface."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def unique_name(parent: dist.ProcessGroup) -> str:
    """A name that all ranks of a group find at once, new each time."""
    name = f"pydist/{parent.group_name}"
    # All ranks are counted in before any of them can come back for another round.
    arrival = dist.distributed_c10d._get_default_store().add(name, 1) - 1
    return f"{name}/{arrival // parent.size()}"


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
    return group


_published: Counter[str] = Counter()


def publish(groups: list[dist.ProcessGroup], text: str) -> list[list[str]]:
    """What all ranks of some groups publish, group by group in rank order.

    It goes through the store, and a rank's own text is in all places before it waits for the
    others': so ranks may name their groups in any order.
    """
    store = dist.distributed_c10d._get_default_store()
    places = []
    for group in groups:
        name = f"pydist/{group.group_name}/published"
        places.append(f"{name}/{_published[name]}")
        _published[name] += 1
        store.set(f"{places[-1]}/{dist.get_rank(group)}", text or " ")
    texts = []
    for group, place in zip(groups, places, strict=True):
        keys = [f"{place}/{rank}" for rank in range(group.size())]
        store.wait(keys, timeout_of(group))
        texts.append([store.get(key).decode().strip() for key in keys])
    return texts


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


def all_gather(output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts gathering every rank's ``tensor``, flat, into ``output``."""
    # torch 2.13 renamed the function and warns at the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output.view(-1), tensor.view(-1), group=group, async_op=True)
