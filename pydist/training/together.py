"""Calls that all ranks make: what goes wrong on one of them is told to the others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from pydist.collectives.work import refuse
from pydist.transport.communicator import Call, communicator

P = ParamSpec("P")
T = TypeVar("T")


def alone() -> bool:
    """Whether this process has nobody to talk to."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def tell(name: str, group: dist.ProcessGroup | None, error: Exception) -> None:
    """Takes part in a call of all ranks of a group with a problem, so that all raise."""
    if dist.is_available() and dist.is_initialized():
        refuse(communicator(group), Call(name, {}, problem=str(error)))


def compare(
    name: str,
    group: dist.ProcessGroup | None,
    fields: dict[str, Any],
    problem: str | None = None,
) -> None:
    """Makes sure that all ranks of a group make one call with equal values; collective.

    On the hosts, whatever carries the group's data, so that a rank which failed before it knew of
    any device can still say so.

    Args:
        name: Of the call.
        group: The ranks.
        fields: The values, as JSON.
        problem: Why this rank cannot take part.

    Raises:
        MismatchError: They don't; raised on every rank.
        PydistError: A rank has a problem.
    """
    comm, call = communicator(group), Call(name, fields, problem=problem)
    comm.run(lambda: comm.agree(call))


def of_all_ranks(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that all ranks call with the same arguments.

    Arguments that do not fit its signature would be raised before it begins, and the other ranks
    wait for this one; so they are told first. Their group is the argument ``group``, else the
    ``process_group`` of the first argument, else the world.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> T:
            try:
                signature.bind(*args, **options)
            except TypeError as error:
                first: Any = args[0] if args else None
                group: Any = options.get("group", getattr(first, "process_group", None))
                tell(name, group, error)
                raise TypeError(f"{name}: {error}") from None
            return function(*args, **options)

        return call

    return decorate
