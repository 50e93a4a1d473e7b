"""What sharded training keeps: parameters by name, residuals, counters, checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydist.codecs.base import Coder, Worker
from pydist.codecs.bucket_coder import bytes_in_bucket
from pydist.codecs.coders import Codec
from pydist.codecs.shard_layout import Residuals as Places
from pydist.codecs.shard_layout import Shards
from pydist.codecs.shares import Part
from pydist.codecs.topk import TopK
from pydist.collectives import refuse
from pydist.communicator import Call, Communicator
from pydist.ddp import checkpoint
from pydist.ddp.options import Choice, Options
from pydist.feedback import Residuals, contracts
from pydist.fsdp.stats import Direction
from pydist.momentum import Momenta
from pydist.road import Road, Route

logger = logging.getLogger("pydist.fsdp")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sharded model.

    Attributes:
        name: Its name, without wrappers.
        ordinal: Its place in ``named_parameters()``.
        shape: Its shape before it was sharded.
        dtype: Of its shards.
        device: Where it computes.
        dim: The dimension along which it is sharded.
        requires_grad: Whether it is trained.
    """

    name: str
    ordinal: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    dim: int
    requires_grad: bool

    @property
    def numel(self) -> int:
        """Elements before it was sharded."""
        return self.shape.numel()

    def like(self) -> Tensor:
        """A tensor of its shape, without memory of its own."""
        return torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape)


class Parameters:
    """The parameters of a sharded model by place and by name.

    Args:
        parameters: All of them, in the order of ``named_parameters()``.

    Attributes:
        names: By place, their names.
        tensors: By place, tensors of their whole shapes, without memory of their own.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._all = {parameter.ordinal: parameter for parameter in parameters}
        self._ordinals = {parameter.name: parameter.ordinal for parameter in parameters}
        self.names = {i: parameter.name for i, parameter in self._all.items()}
        self.tensors = {i: parameter.like() for i, parameter in self._all.items()}

    def __getitem__(self, ordinal: int) -> Parameter:
        return self._all[ordinal]

    def ordinal_of(self, name: str) -> int | None:
        """The place of a name; ``None`` where there is none such."""
        return self._ordinals.get(name)

    def described(self) -> dict[str, Any]:
        """Name, dtype, shape and sharded dimension of all: equal on all ranks."""
        return {
            f"parameter {i}": [one.name, str(one.dtype), list(one.shape), one.dim]
            for i, one in self._all.items()
        }

    def with_residuals(self, options: Options) -> Iterable[tuple[int, str]]:
        """Place and name of every parameter that keeps residuals."""
        for ordinal, one in self._all.items():
            if one.requires_grad and options.choose(one.name, one.like(), torch.float32).feedback:
                yield ordinal, one.name


def check_feedback(options: Options) -> None:
    """Raises ValueError where most of a gradient would be lost: top-k without residuals."""
    if isinstance(options.codec, TopK) and not options.error_feedback:
        raise ValueError(
            f"error_feedback={options.error_feedback}: {options.codec} sends a few entries of each "
            'block alone, and the others must be kept; use error_feedback="auto" or True'
        )


def choose(
    options: Options, parameter: Parameter, given: Tensor, shards: Shards, dtype: torch.dtype
) -> Choice:
    """How a sharded parameter travels as values of ``dtype``; a predicate sees ``given``."""
    choice = options.choose(parameter.name, parameter.like(), dtype)
    if choice.codec is not None and callable(options.exclude):
        choice = options.choose(parameter.name, given, dtype)
    if choice.codec is None:
        return choice
    # Every shard has blocks of its own, and the last of them is filled up.
    most = max(shards.numel)
    if (size := bytes_in_bucket(choice.codec, most)) and size >= most * dtype.itemsize:
        return Choice(None, reason="would not be smaller")
    return choice


def submit(
    comm: Communicator,
    call: Call,
    route: Route | str,
    device: torch.device,
    make: Callable[[Worker], Coder],
) -> Road:
    """Sends a call on its way.

    Args:
        comm: The group's communicator.
        call: What all ranks must agree on.
        route: See :class:`pydist.road.Road`.
        device: Where its data is.
        make: Makes the coder.

    Raises:
        Exception: What ``make`` raises, after the other ranks were told.
    """
    try:
        worker = Worker(comm.rank, comm.world_size, call.step, torch.get_num_threads())
        road = Road(comm, make(worker), call, route, device)
    except Exception as error:
        # The other ranks are about to wait for this one.
        refuse(comm, Call(call.name, {}, call.step, problem=str(error)))
        raise
    comm.submit(road)
    return road


class ShardedState:
    """What :func:`pydist.fsdp.compress` returns: counters, residuals, checkpoints.

    Args:
        comm: The communicator of the ranks over which the model is sharded.
        options: How gradients travel.
        parameters: All parameters of the model, in the order of ``named_parameters()``.

    Attributes:
        step: Reductions so far; part of all random draws.
        feedback: Whether gradients that are encoded keep residuals.
    """

    def __init__(
        self, comm: Communicator, options: Options, parameters: Sequence[Parameter]
    ) -> None:
        check_feedback(options)
        self.communicator = comm
        self.options = options
        self.parameters = Parameters(parameters)
        self.residuals = Residuals(options.residual_dtype, comm.world_size, mean=True)
        self.momenta = Momenta(0.0, options.residual_dtype)  # none: optimizers see shards
        self.gradients, self.weights, self.across = Direction(), Direction(), Direction()
        self.step = 0
        codec, asked = options.codec, options.error_feedback
        self.feedback = bool(
            isinstance(codec, Codec)
            and (codec.block_format is not None or isinstance(codec, TopK))
            and (contracts(codec) if asked == "auto" else asked)
        )
        self.scale: float | None = None

    def agree(self, name: str, comms: Sequence[Communicator], **more: object) -> None:
        """Compares options and parameters over all ranks of some groups."""
        fields = {**more, **self.options.described(), **self.parameters.described()}
        for comm in comms:
            call = Call(name, {**fields, "world_size": comm.world_size})
            comm.run(partial(comm.agree, call))

    def announce(self) -> None:
        """Says what residuals will cost."""
        if self.feedback:
            logger.warning(
                "error feedback will take %.3g MB on every rank: a residual for every element of "
                "the unsharded model", self.residual_bytes / 1e6,
            )  # fmt: skip

    # ----------------------------------------------------------------- residuals

    def places(self, shards: Sequence[Shards]) -> Places:
        """The residuals of some parameters; zeros at first."""
        return Places([self._residual(self.parameters[s.ordinal]) for s in shards])

    def _residual(self, parameter: Parameter) -> Tensor:
        part = Part(parameter.ordinal, 0, parameter.numel)
        return self.residuals.worker_of(part, parameter.device)

    @property
    def residual_bytes(self) -> int:
        """Bytes that residuals will take on this rank once every parameter had a gradient."""
        width = self.options.residual_dtype.itemsize
        kept = self.parameters.with_residuals(self.options)
        return sum(width * self.parameters[ordinal].numel for ordinal, _ in kept)

    def rescale(self, ratio: float) -> None:
        """Follows a loss scale that was multiplied by ``ratio``.

        Raises:
            ValueError: ``ratio`` is not a positive number.
        """
        if not 0 < ratio < math.inf:
            raise ValueError(f"ratio must be positive and finite, got {ratio}")
        self.residuals.rescale(ratio)

    # ----------------------------------------------------------------- what is known

    def stats(self) -> dict[str, Any]:
        """What was sent so far, by direction; see ``docs/fsdp.md`` for the entries."""
        return {
            "gradients": self.gradients.summary(),
            "parameters": self.weights.summary(),
            "across": self.across.summary(),
            "residual_bytes": self.residuals.memory_bytes,
            "residual_norm": self.residuals.norm(),
            "world_size": self.communicator.world_size,
        }

    # ----------------------------------------------------------------- checkpoint

    @property
    def _saved(self) -> Any:
        """This state as :mod:`pydist.ddp.checkpoint` takes states: by its attributes."""
        return self

    rescaled = 1.0  # nothing depends on it here

    def restore(self, step: int, scale: float | None, rescaled: float) -> None:
        """Takes over step and loss scale of a checkpoint."""
        self.step, self.scale = step, scale

    @contextmanager
    def in_natural_order(self) -> Iterator[None]:
        """Residuals of parameters sharded along a later dimension, turned for a checkpoint."""
        self._turn(natural=True)
        try:
            yield
        finally:
            self._turn(natural=False)

    def _turn(self, *, natural: bool) -> None:
        ranks = self.communicator.world_size
        for ordinal, flat in self.residuals.worker.items():
            shape, dim = self.parameters[ordinal].shape, self.parameters[ordinal].dim
            if dim == 0:
                continue
            if natural:
                size = torch.Size([*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :]])
                whole = torch.cat([shard.view(size) for shard in flat.chunk(ranks)], dim)
                flat.copy_(whole.reshape(-1))
            else:
                shards = flat.clone().view(shape).chunk(ranks, dim)
                flat.copy_(torch.cat([shard.reshape(-1) for shard in shards]))

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter name, for ``torch.save``; ranks differ.

        Save one file a rank (``weights_only=True`` reads it), or see :meth:`sharded`.
        """
        with self.in_natural_order():
            return checkpoint.state_dict(self._saved)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Restores what :meth:`state_dict` gave.

        Args:
            state: This rank's own state, saved by the same rank of as many; or the states of all
                ranks of a world of any size, in rank order.

        Raises:
            ValueError: The state is of another world size or rank, or of other parameters.
        """
        checkpoint.load_state_dict(self._saved, state)
        self._turn(natural=False)

    def sharded(self, saved_world_size: int | None = None) -> checkpoint.Sharded:
        """The state as torch.distributed.checkpoint takes it.

        Args:
            saved_world_size: Ranks that saved what is to be loaded, where it was another number
                (:func:`pydist.ddp.saved_world_size`).
        """
        return _Sharded(self._saved, saved_world_size)


class _Sharded(checkpoint.Sharded):
    """The same, with residuals in the order of the parameters' elements."""

    def state_dict(self) -> dict[str, Any]:
        state: Any = self._state
        with state.in_natural_order():
            return super().state_dict()
