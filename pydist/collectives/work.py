"""A collective under way: how it is started, and what its caller gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydist.collectives.grid import Grid, HierarchicalCall, Stages
from pydist.errors import PydistError
from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.torch_tensors import written
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator
from pydist.transport.exchange import Exchange, Route


class Work:
    """A collective under way, as ``torch.distributed`` hands it out with ``async_op=True``."""

    def __init__(
        self, exchange: Exchange | HierarchicalCall, tensor: Tensor, dense: Tensor
    ) -> None:
        self._exchange, self._tensor = exchange, tensor
        self._dense: Tensor | None = dense

    def is_completed(self) -> bool:
        """Whether the result is there."""
        return self._exchange.future.done()

    def wait(self, timeout: float | None = None) -> Tensor:
        """Waits for the result (on CUDA: makes the current stream wait).

        Args:
            timeout: Seconds; ``None`` waits as long as the process group does.

        Returns:
            The tensor that was given, now holding the result.

        Raises:
            PydistError: The call failed; on every rank where ranks disagree.
            TimeoutError: It took longer than ``timeout``.
        """
        self._exchange.wait(timeout)
        if self._dense is not None:
            written(self._tensor.detach(), self._dense)
            self._dense = None
        return self._tensor


def _step_of(step: int | Tensor) -> int:
    value: Any = step.item() if isinstance(step, Tensor) else step
    number = wire.as_int("step", value)
    checks.check_step(number)
    return number


@torch.inference_mode(False)  # what a call makes outlives the caller's modes
def start(
    name: str,
    comm: Communicator,
    step: int | Tensor | None,
    fields: dict[str, Any],
    prepare: Callable[[Worker], tuple[Coder, Tensor, Tensor]],
    route: Route | str,
    async_op: bool,
) -> Tensor | Work:
    """Submits a collective.

    Args:
        name: What the user called.
        comm: The group's communicator.
        step: As the user gave it.
        fields: What must be equal on all ranks; ``prepare`` may add to it.
        prepare: Checks the arguments; returns the coder, the tensor that the user gave for the
            result, and the dense one that the coder writes.
        route: See :class:`pydist.transport.exchange.Exchange`.
        async_op: Return at once.
    """
    number, comm.step = comm.step, comm.step + 1  # counted on all ranks, whatever comes of it
    try:
        number = number if step is None else _step_of(step)
        coder, result, dense = prepare(
            Worker(comm.rank, comm.world_size, number, torch.get_num_threads())
        )
        exchange = Exchange(comm, coder, Call(name, fields, number), route, dense.device)
    except Exception as error:
        # The other ranks are about to wait for this one: they are told, then this one raises.
        refuse(comm, Call(name, {}, number, problem=str(error)))
        raise
    comm.submit(exchange)
    work = Work(exchange, result, dense)
    return work if async_op else work.wait()


@torch.inference_mode(False)
def start_on_levels(
    name: str,
    where: Grid,
    step: int | Tensor | None,
    fields: dict[str, Any],
    prepare: Callable[[Worker], tuple[Stages, Tensor, Tensor]],
    async_op: bool,
) -> Tensor | Work:
    """Submits a collective on two levels; ``prepare`` returns its stages in the coder's place."""
    number, where.step = where.step, where.step + 1
    try:
        number = number if step is None else _step_of(step)
        stages, result, dense = prepare(
            Worker(where.rank, where.ranks, number, torch.get_num_threads())
        )
        call = HierarchicalCall(where, name, fields, number, stages)
    except Exception as error:
        where.start(HierarchicalCall(where, name, {}, number, None, str(error)))
        raise
    where.start(call)
    work = Work(call, result, dense)
    return work if async_op else work.wait()


def refuse(comm: Communicator, call: Call) -> None:
    """Takes part in a call's agreement with a problem, so that all ranks raise."""
    with contextlib.suppress(PydistError):
        comm.refuse(call).result()
