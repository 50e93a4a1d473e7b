"""Which ranks of a group are on one node."""

from __future__ import annotations

import os
import socket
import warnings
import weakref
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pydist.collectives.grid import Levels, pair
from pydist.transport import groups
from pydist.transport.communicator import checked
from pydist.transport.rendezvous import meet

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]
"""This rank's groups across nodes, and inside its node."""

_found: weakref.WeakKeyDictionary[Any, Groups | None] = weakref.WeakKeyDictionary()


def check_levels(mesh: Levels | None, levels: str | None) -> str | None:
    """How two levels were asked for: ``"mesh"``, ``"auto"``, or not at all: ``None``.

    Raises:
        TypeError: ``mesh`` is neither a mesh nor two groups.
        ValueError: ``levels`` is unknown, or both were given.
    """
    if levels not in (None, "auto"):
        raise ValueError(f"levels must be 'auto' or None, got {levels!r}")
    if mesh is None:
        return levels
    if levels is not None:
        raise ValueError("mesh and levels='auto' were both given: a mesh says what nodes are")
    if not isinstance(mesh, DeviceMesh | tuple):
        raise TypeError(f"mesh must be a DeviceMesh or two groups, got {type(mesh).__name__}")
    return "mesh"


def check_mesh(group: dist.ProcessGroup | None, mesh: Levels) -> Groups:
    """The two groups of a mesh; not collective.

    Raises:
        TypeError: ``mesh`` holds no groups.
        ValueError: It does not hold the ranks of ``group``, or has another number of dimensions.
    """
    across, inside = pair(mesh)
    mine, all_ranks = {*_ranks(across), *_ranks(inside)}, set(_ranks(checked(group)))
    if not mine <= all_ranks or across.size() * inside.size() != len(all_ranks):
        raise ValueError(
            f"mesh: {across.size()} nodes of {inside.size()} ranks, with ranks {sorted(mine)}; the "
            f"group has the ranks {sorted(all_ranks)}"
        )
    return across, inside


def groups_of(
    group: dist.ProcessGroup | None, mesh: Levels | None, levels: str | None
) -> Groups | None:
    """The two levels of a group's ranks; collective. ``None``: there is one level.

    Args:
        group: All ranks; ``None``: the default one.
        mesh: The levels, where the user gave them.
        levels: How they were asked for (:func:`check_levels`); ``None``: not at all.

    Raises:
        TypeError, ValueError: As of :func:`check_mesh`.
    """
    if levels is None:
        return None
    if mesh is not None:
        found = check_mesh(group, mesh)
        return None if found[1].size() == 1 else found
    parent = checked(group)
    if parent not in _found:
        _found[parent] = _find(parent)
    return _found[parent]


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def node_name() -> str:
    """What the ranks of this node, and no others, call it.

    torchrun numbers its agents (``GROUP_RANK``); other launchers say how many ranks a node has
    (``LOCAL_WORLD_SIZE``), whose ranks then follow each other; else the host has a name.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    number = os.environ.get("GROUP_RANK", "")
    if local and number:
        return f"agent {number}"
    if local.isdecimal() and int(local):
        return f"node {dist.get_rank() // int(local)}"
    return socket.gethostname()


def _find(parent: dist.ProcessGroup) -> Groups | None:
    """The groups of the nodes that all ranks say they are on."""
    timeout = groups.timeout_of(parent)
    (roster,) = meet([parent], "nodes of a process group", timeout, node_name())
    nodes: dict[str, list[int]] = {}
    for rank, name in zip(_ranks(parent), roster.texts, strict=True):
        nodes.setdefault(name, []).append(rank)
    sizes = {name: len(ranks) for name, ranks in nodes.items()}
    local = max(sizes.values())
    if len(nodes) == 1 or local == 1:
        return None
    if min(sizes.values()) != local:
        warnings.warn(
            f"levels='auto': nodes have different numbers of ranks ({sizes}): one level is used",
            stacklevel=2,
        )
        return None
    me = dist.get_rank()
    columns = [list(column) for column in zip(*nodes.values(), strict=True)]

    def made(kind: str, rows: list[list[int]]) -> dist.ProcessGroup:
        number, ranks = next((i, row) for i, row in enumerate(rows) if me in row)
        return groups.new_group(
            ranks, ranks.index(me), backend=groups.backends_of(parent),
            name=f"{roster.name}/{kind} {number}", timeout=timeout,
        )  # fmt: skip

    found = made("across", columns), made("inside", list(nodes.values()))
    for each in found:
        weakref.finalize(parent, groups.destroy, each)
    return found
