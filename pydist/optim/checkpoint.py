"""Checkpoints of optimizers with residuals: a file a rank; other world sizes.

In a world of the same size every rank takes its own state again and training continues to the bit.
In a world of another size an owner's residual goes to the worker's side, weighted as it would have
counted in the next mean, and every new rank takes the sum over the old ranks divided by their
number: what is unsent keeps its weight. Other state that differs by rank is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydist.feedback import OwnerShare
from pydist.optim.layout import shaped

if TYPE_CHECKING:
    from pydist.optim.onebit import OneBitOptimizer

RESIDUAL, OWNER, SPAN = "residual", "owner_residual", "owner_span"


def state_dict(optimizer: OneBitOptimizer, plain: dict[str, Any]) -> dict[str, Any]:
    """Adds residuals, rank and world size to a ``torch.optim`` state."""
    residuals = optimizer.exchange.residuals
    state: dict[int, dict[str, Any]] = {i: dict(entry) for i, entry in plain["state"].items()}
    for ordinal, p in enumerate(optimizer.parameters()):
        if ordinal in residuals.worker:
            entry = state.setdefault(ordinal, {})
            entry[RESIDUAL] = shaped(residuals.worker[ordinal], p).clone()
            if ordinal in residuals.owner:
                share = residuals.owner[ordinal]
                entry[OWNER] = share.values.clone()
                entry[SPAN] = [share.first, share.last, int(share.whole)]
    comm = optimizer.communicator
    world = {"rank": comm.rank, "world_size": comm.world_size, "skipped": optimizer.skipped_steps}
    return {**plain, "state": state, "world": world}


def choose(optimizer: OneBitOptimizer, saved: Any) -> dict[str, Any]:
    """This rank's own state, or its part of all ranks' states of another world.

    Raises:
        ValueError: The state is of another rank or world size.
    """
    comm = optimizer.communicator
    if isinstance(saved, Mapping):
        world = saved["world"]
        if (world["rank"], world["world_size"]) != (comm.rank, comm.world_size):
            raise ValueError(
                f"state_dict: saved by rank {world['rank']} of {world['world_size']}, loaded by "
                f"rank {comm.rank} of {comm.world_size}: give the states of all "
                f"{world['world_size']} ranks"
            )
        return dict(saved)
    states = list(saved)
    for i, one in enumerate(states):
        world = one["world"]
        if (world["rank"], world["world_size"]) != (i, len(states)):
            raise ValueError(
                f"state_dict: entry {i} of {len(states)} was saved by rank {world['rank']} of "
                f"{world['world_size']}"
            )
    if not states:
        raise ValueError("state_dict: an empty sequence")
    return dict(states[comm.rank]) if len(states) == comm.world_size else _shared(states)


def _shared(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[int, dict[str, Any]] = {}
    for ordinal in sorted({i for one in states for i in one["state"]}):
        entries = [one["state"].get(ordinal, {}) for one in states]
        first = next(entry for entry in entries if entry)
        entry = {key: value for key, value in first.items() if key not in (OWNER, SPAN)}
        for key, value in entry.items():
            if isinstance(value, Tensor) and key != RESIDUAL:
                rows = [other[key] for other in entries if key in other]
                if any(not torch.equal(row, value) for row in rows):
                    entry[key] = (sum(row.double() for row in rows) / len(rows)).to(value.dtype)
        if RESIDUAL in first:
            entry[RESIDUAL] = sum(_unsent(e, len(states), r) for r, e in enumerate(entries))
            entry[RESIDUAL] = (entry[RESIDUAL] / len(states)).to(first[RESIDUAL].dtype)
        merged[ordinal] = entry
    return {**states[0], "state": merged}


def _unsent(entry: Mapping[str, Any], ranks: int, rank: int) -> Tensor:
    """What one old rank had not sent, as a worker and as an owner, in worker's weight."""
    total = entry[RESIDUAL].float().clone()
    if OWNER in entry:
        begin, end, whole = entry[SPAN]
        if not whole or rank == 0:  # a whole one is the same on all ranks
            flat = total.as_strided((total.numel(),), (1,))
            flat[begin:end] += entry[OWNER].float() * ranks
    return total


def take(optimizer: OneBitOptimizer, saved: Mapping[str, Any]) -> None:
    """Puts a state into the optimizer, each tensor in the memory order of its parameter."""
    exchange, comm = optimizer.exchange, optimizer.communicator
    exchange.residuals.clear()
    optimizer.count_skipped(int(saved["world"]["skipped"]))
    for ordinal, p in enumerate(optimizer.parameters()):
        entry = dict(saved["state"].get(ordinal, {}))
        residual, owner = entry.pop(RESIDUAL, None), entry.pop(OWNER, None)
        span = entry.pop(SPAN, None)
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim() == 0 and p.dim():
                entry[key] = value.to(p.device, copy=True)
            elif isinstance(value, Tensor):
                if value.shape != p.shape:
                    raise ValueError(
                        f"state_dict: {key} of {optimizer.name_of(ordinal)} has shape "
                        f"{list(value.shape)}, the parameter {list(p.shape)}"
                    )
                entry[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if entry:
            optimizer.state[p] = entry
        if residual is not None:
            dtype = exchange.residuals.dtype
            flat = torch.zeros(p.numel(), dtype=dtype, device=p.device)
            shaped(flat, p).copy_(residual)
            exchange.residuals.worker[ordinal] = flat
            if owner is not None and span is not None:
                values = owner.to(comm.device(p.device), dtype, copy=True)
                share = OwnerShare(int(span[0]), values, bool(span[2]))
                exchange.residuals.owner[ordinal] = share
