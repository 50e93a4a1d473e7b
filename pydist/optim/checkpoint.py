"""Checkpoints of all optimizers: what is saved, and what is taken of it, all or nothing.

State that differs by rank (momenta of voters, residuals) stands in a checkpoint below the rank it
is of::

    {"state": {0: {"momentum": {"rank 1 of 2": tensor}}}, "param_groups": [...]}

Other state is the same on all ranks and stands there as it is. So torch.distributed.checkpoint,
which keeps one value a key, keeps every rank's, each rank loads its own, and a file of another
rank or world is not mistaken for one's own. Where a checkpoint holds the states of all ranks of
another world, every new rank takes the mean of the momenta, and of what had not been sent the sum
over the old ranks divided by their number: what is unsent keeps its weight.

Everything is checked before anything is changed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.optim.layout import check_count, is_active, names_of
from pydist.optim.matching import match
from pydist.optim.state import Kept
from pydist.training.dtensor import local_of
from pydist.training.replicas import checksum
from pydist.transport.communicator import Call

if TYPE_CHECKING:
    from pydist.optim.saving import StatefulOptimizer

_LABEL = re.compile(r"rank (\d+) of (\d+)")

SAVED_BY = "saved_by"
"""Option of a group with the step of every rank whose state a checkpoint holds."""

_OWN = ("params", "skipped", SAVED_BY)  # options that may differ by rank


def label(rank: int, ranks: int) -> str:
    """Whose a value is that differs by rank."""
    return f"rank {rank} of {ranks}"


# --------------------------------------------------------------------------- saving


def state_dict(optimizer: StatefulOptimizer, world_size: int | None) -> dict[str, Any]:
    """See :meth:`pydist.optim.saving.StatefulOptimizer.state_dict`.

    Args:
        optimizer: The optimizer.
        world_size: Ranks whose state is to be loaded into the result, where it is not as many.
    """
    indices: dict[Tensor, int] = {}
    for p in optimizer.parameters():
        indices.setdefault(p, len(indices))
    groups = []
    for group in optimizer.param_groups:
        packed = {**group, "params": [indices[p] for p in group["params"]]}
        packed["skipped"] = optimizer.skipped_steps
        if SAVED_BY in group:
            labels = _labels(optimizer, world_size)
            packed[SAVED_BY] = dict.fromkeys(labels, group["step"])
        groups.append(packed)
    state = {
        i: {
            key: _saved(optimizer, i, p, key, world_size) if kept.by_rank
            else optimizer.saved_value(i, p, key)
            for key, kept in optimizer.kept.items()
        }
        for p, i in indices.items()
        if optimizer.kept and _is_kept(optimizer, p)
    }  # fmt: skip
    return {"state": state, "param_groups": groups}


def _labels(optimizer: StatefulOptimizer, world_size: int | None) -> list[str]:
    """Whose state a checkpoint holds."""
    rank, ranks = optimizer.rank_and_world
    if world_size is not None:
        return [label(r, world_size) for r in range(world_size)]
    if optimizer.consolidated:
        return [label(r, ranks) for r in range(ranks)]
    return [label(rank, ranks)]


def _saved(
    optimizer: StatefulOptimizer, i: int, p: Tensor, key: str, world_size: int | None
) -> dict[str, Any]:
    """An entry that differs by rank, by the rank that it is of."""
    labels = _labels(optimizer, world_size)
    if world_size is None and (everyones := optimizer.consolidated.get((i, key))):
        return {each: everyones[each] for each in labels}
    value = optimizer.saved_value(i, p, key)
    if world_size is None:
        return {labels[0]: value}
    empty = torch.zeros_like(value) if isinstance(value, Tensor) else value
    return {each: deepcopy(empty) for each in labels}


def _is_kept(optimizer: StatefulOptimizer, p: Tensor) -> bool:
    """Whether a parameter's state is saved: it is trained, or was."""
    return is_active(p) or p in optimizer.state


def saved_world_size(checkpoint_id: str) -> int:
    """How many ranks saved an optimizer's state in a checkpoint of torch.distributed.checkpoint.

    Args:
        checkpoint_id: Its directory.

    Raises:
        ValueError: It holds no optimizer state that differs by rank.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for key in FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata:
        found = _LABEL.search(key)
        if found:
            return int(found[2])
    raise ValueError(f"checkpoint_id: {checkpoint_id!r} holds no optimizer state by rank")


# --------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """A state that was checked and can be taken over.

    Attributes:
        groups: Options of every parameter group.
        entries: Each parameter's state, in its memory order; ``None`` where none was saved.
        missing: Names of trained parameters without one.
        digests: Checksum of what must be equal on all ranks, by parameter's name.
    """

    groups: list[dict[str, Any]]
    entries: list[dict[str, Any] | None]
    missing: list[str]
    digests: dict[str, int]


def read(optimizer: StatefulOptimizer, saved: object) -> Loaded:
    """Checks a state or those of all ranks; changes nothing.

    Raises:
        ValueError: It is no state of this optimizer; names what is wrong.
    """
    try:
        states = [_sections(one) for one in _listed(saved)]
        _compare_groups([groups for _, groups in states])
        _check_moments([groups for _, groups in states])
        groups = states[0][1]
        matched = match(optimizer.param_groups, groups)
        options = _options(optimizer, groups, [g for g, _ in matched])
        known = {key for group in groups for key in group["params"]}
        for entries, _ in states:
            if strangers := [key for key in entries if key not in known]:
                raise ValueError(f"it has state of unknown parameters: {strangers[:5]}")
        names = names_of(optimizer.param_groups)
        ids = [key for _, keys in matched for key in keys]
        found: list[dict[str, Any] | None] = []
        missing = []
        for name, p, key in zip(names, optimizer.parameters(), ids, strict=True):
            entry = _entry(optimizer, name, p, [one.get(key) for one, _ in states])
            if entry is None and is_active(p) and optimizer.kept:
                missing.append(name)
            found.append(entry)
        digests = _digests(optimizer, names, found, options)
    except Exception as error:  # what someone put there may raise anything where it is looked at
        raise ValueError(f"state_dict: {error}") from error
    return Loaded(options, found, missing, digests)


def _listed(saved: object) -> list[Any]:
    if isinstance(saved, Mapping):
        return [saved]
    if not isinstance(saved, Sequence) or isinstance(saved, str | bytes) or not saved:
        raise TypeError(f"it must be a dict, or those of all ranks in order, got {_kind(saved)}")
    return list(saved)


def _kind(value: object) -> str:
    return "an empty sequence" if isinstance(value, list | tuple) else type(value).__name__


def _sections(one: Any) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """State and parameter groups of a state dict."""
    if not isinstance(one, Mapping) or not {"state", "param_groups"} <= one.keys():
        raise TypeError("it must have the entries 'state' and 'param_groups'")
    state, groups = one["state"], one["param_groups"]
    if not isinstance(state, Mapping):
        raise TypeError(f"'state' must be a dict, got {type(state).__name__}")
    if not isinstance(groups, list | tuple) or not all(isinstance(x, Mapping) for x in groups):
        raise TypeError("'param_groups' must be a list of dicts")
    for i, group in enumerate(groups):
        ids = group.get("params")
        if not isinstance(ids, list | tuple) or not all(isinstance(x, int | str) for x in ids):
            raise TypeError(f"param_groups[{i}]['params'] must be a list of numbers or names")
    return state, [dict(group) for group in groups]


def _compare_groups(everyones: list[list[dict[str, Any]]]) -> None:
    """Raises where ranks saved at different moments."""
    for i, groups in enumerate(everyones):
        if len(groups) != len(everyones[0]):
            raise ValueError(f"entry {i} has {len(groups)} param_groups, not {len(everyones[0])}")
        for g, (group, first) in enumerate(zip(groups, everyones[0], strict=True)):
            for key in (first.keys() | group.keys()) - set(_OWN):
                if str(group.get(key)) != str(first.get(key)):
                    raise ValueError(
                        f"ranks saved at different moments: param_groups[{g}][{key!r}] is "
                        f"{first.get(key)} in entry 0 and {group.get(key)} in entry {i}"
                    )


# --------------------------------------------------------------------------- options


def _options(
    optimizer: StatefulOptimizer, groups: list[dict[str, Any]], places: list[int]
) -> list[dict[str, Any]]:
    """The options of every group, checked."""
    result = []
    for g, place in enumerate(places):
        options = deepcopy({k: v for k, v in groups[place].items() if k != "params"})
        if SAVED_BY in options:
            options[SAVED_BY] = {}
        own = optimizer.param_groups[g]
        if "param_names" in own:
            options["param_names"] = own["param_names"]
        else:
            options.pop("param_names", None)
        try:
            optimizer.check_group(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"param_groups[{place}]: {error}") from error
        result.append(options)
    steps = [options["step"] for options in result]
    if any(step != steps[0] for step in steps):
        raise ValueError(f"its param_groups are at different steps: {steps}")
    return result


def _check_moments(everyones: list[list[dict[str, Any]]]) -> None:
    """Raises where the state of a rank is not of the same step as the options.

    torch's tools leave what they do not find in a checkpoint as it was.
    """
    for groups in everyones:
        for group in groups:
            saved_by = group.get(SAVED_BY, {})
            if not isinstance(saved_by, Mapping):
                raise TypeError(f"{SAVED_BY!r} must be a dict, got {type(saved_by).__name__}")
            now = check_count("step", group.get("step"))
            for who, step in saved_by.items():
                if check_count(f"{SAVED_BY!r} of {who}", step) != now:
                    raise ValueError(
                        f"what it holds of {who} is of step {step}, its options are of step "
                        f"{now}: it has the state of other ranks alone; let every "
                        "rank save its own, or call consolidate_state_dict() before state_dict()"
                    )


# --------------------------------------------------------------------------- one parameter


def _entry(
    optimizer: StatefulOptimizer, name: str, p: Tensor, given: list[Any]
) -> dict[str, Any] | None:
    """A parameter's state out of those that ranks saved."""
    if all(one is None for one in given):
        return None
    for one in given:
        if not isinstance(one, Mapping):
            raise TypeError(f"state of {name} must be a dict, got {type(one).__name__}")
        if one.keys() != optimizer.kept.keys():
            raise ValueError(
                f"state of {name} has {sorted(map(str, one))}, "
                f"{type(optimizer).__name__} keeps {sorted(optimizer.kept)}"
            )
    entry, others = {}, {}
    for key, kept in optimizer.kept.items():
        what, values = f"{key} of {name}", [one[key] for one in given]
        if kept.by_rank:
            values = _by_rank(optimizer, what, values)
        values = [_checked(kept, what, value, p, optimizer.order_of(p)) for value in values]
        if kept.by_rank and len(values) > 1:
            others[key] = values
            continue
        if any(not _equal(value, values[0]) for value in values):
            raise ValueError(f"{what} must be equal on all ranks, and is not")
        entry[key] = values[0]
    if others:
        entry |= optimizer.share_out(others)
    optimizer.check_entry(name, entry)
    return entry


def _checked(kept: Kept, what: str, value: object, p: Tensor, order: tuple[int, ...]) -> Any:
    """A saved value as it is kept, in memory of its own."""
    checked = kept.check(what, value, p, order)
    if not isinstance(checked, Tensor) or kept.rows is not None:
        return checked
    if bool(kept.bad(checked).any()):
        worst = local_of(checked).float().abs().max()
        raise ValueError(
            f"{what} must be from {kept.least:g} to 1e+30, got values up to {float(worst):g}"
            if bool(worst.isfinite())
            else f"{what} is not finite"
        )
    return checked.detach().clone() if checked is value else checked


def _by_rank(optimizer: StatefulOptimizer, what: str, given: list[Any]) -> list[Any]:
    """This rank's own value, or those of all ranks of another world."""
    everyones: dict[tuple[int, int], Any] = {}
    for one in given:
        if not isinstance(one, Mapping) or not one:
            raise TypeError(f"{what} must be a dict from 'rank r of n' to a value")
        for key, value in one.items():
            found = _LABEL.fullmatch(str(key))
            if found is None:
                raise ValueError(f"{what} must stand below 'rank r of n', got {key!r}")
            everyones[int(found[1]), int(found[2])] = value
    rank, ranks = optimizer.rank_and_world
    if (rank, ranks) in everyones:
        return [everyones[rank, ranks]]
    world = max(n for _, n in everyones)
    if everyones.keys() == {(r, world) for r in range(world)}:
        return [everyones[r, world] for r in range(world)]
    saved = ", ".join(label(r, n).removeprefix("rank ") for r, n in sorted(everyones))
    raise ValueError(
        f"{what} was saved by rank {saved}, and this is rank {rank} of {ranks}: give the states "
        f"of all {world} ranks"
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a is b or torch.equal(local_of(a), local_of(b))
    return bool(a == b)


def mean_of(values: list[Any]) -> Any:
    """The mean of what ranks of another world kept, of the same type."""
    first = values[0]
    if not isinstance(first, Tensor):
        return max(values)
    result = torch.empty_like(first)
    parts = torch.stack([local_of(value).double() for value in values])
    local_of(result).copy_(parts.mean(0))
    return result


def _digests(
    optimizer: StatefulOptimizer,
    names: list[str],
    entries: list[dict[str, Any] | None],
    options: list[dict[str, Any]],
) -> dict[str, int]:
    """Checksums of what must be equal on all ranks, by parameter."""
    common = sorted(key for key in optimizer.kept if optimizer.is_common(key, options))
    result = {}
    for name, entry in zip(names, entries, strict=True):
        if common and entry is not None:
            values = [entry[key] for key in common]
            parts = [checksum(x) if isinstance(x, Tensor) else x for x in values]
            result[name] = zlib.crc32(repr(parts).encode())
    return result


# --------------------------------------------------------------------------- all ranks' in one


def gathered(optimizer: StatefulOptimizer, to: int) -> dict[tuple[int, str], dict[str, Any]]:
    """What differs by rank, of all ranks, on one of them; by parameter's ordinal and entry."""
    comm = optimizer.communicator
    result: dict[tuple[int, str], dict[str, Any]] = {}
    labels = [label(r, comm.world_size) for r in range(comm.world_size)]

    def gather(value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            mine = local_of(value).detach().contiguous().cpu()
        else:
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            mine = torch.tensor(value, dtype=dtype, device="cpu")
        rows = [torch.empty_like(mine) for _ in labels] if comm.rank == to else None
        if comm.world_size > 1:
            dist.gather(mine, rows, comm.ranks[to], group=comm.control)
        elif rows is not None:
            rows[0].copy_(mine)
        return [_like(value, row) for row in rows or ()]

    wanted = [
        (i, p, key)
        for i, p in enumerate(optimizer.parameters())
        for key, kept in optimizer.kept.items()
        if kept.by_rank and _is_kept(optimizer, p)
    ]
    fields = {"to": to, "state": [f"{key} of {optimizer.name_of(i)}" for i, _, key in wanted]}

    def gather_all() -> None:
        comm.agree(Call("consolidate_state_dict", fields))
        for i, p, key in wanted:
            values = gather(optimizer.saved_value(i, p, key))
            if values:
                result[i, key] = dict(zip(labels, values, strict=True))

    comm.run(gather_all)
    return result


def _like(value: Any, row: Tensor) -> Any:
    """What another rank has, as this rank's value is."""
    if not isinstance(value, Tensor):
        return type(value)(row.item())
    result = torch.empty_like(value)
    local_of(result).copy_(row)
    return result
