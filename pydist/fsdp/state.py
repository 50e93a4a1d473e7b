"""What sharded training keeps: residuals, counters, checkpoints."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.codecs import Codec, TopK, is_custom
from pydist.collectives.work import refuse
from pydist.encoding.plans import Residuals as Places
from pydist.encoding.plans import Shards
from pydist.encoding.shares import Part
from pydist.fsdp.parameters import Parameter, Parameters
from pydist.fsdp.stats import Direction
from pydist.training import checkpoint
from pydist.training.damage import LOOK_EVERY
from pydist.training.kept import Kept
from pydist.training.options import Options
from pydist.training.residuals import Residuals, contracts
from pydist.training.sharded import Sharded
from pydist.training.together import compare
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator, communicator
from pydist.transport.exchange import Exchange, Route

logger = logging.getLogger("pydist.fsdp")


def submit(
    comm: Communicator,
    call: Call,
    route: Route | str,
    device: torch.device,
    make: Callable[[Worker], Coder],
) -> Exchange:
    """Sends a call on its way.

    Args:
        comm: The group's communicator.
        call: What all ranks must agree on.
        route: See :class:`pydist.transport.exchange.Exchange`.
        device: Where its data is.
        make: Makes the coder.

    Raises:
        Exception: What ``make`` raises, after the other ranks were told.
    """
    try:
        worker = Worker(comm.rank, comm.world_size, call.step, torch.get_num_threads())
        exchange = Exchange(comm, make(worker), call, route, device)
    except Exception as error:
        # The other ranks are about to wait for this one.
        refuse(comm, Call(call.name, {}, call.step, problem=str(error)))
        raise
    comm.submit(exchange)
    return exchange


class ShardedState:
    """What :func:`pydist.fsdp.compress` returns: counters, residuals, checkpoints.

    Everything that only tells something can be called at any time, from any thread. A copy
    (``copy.deepcopy``, ``pickle``) has options, residuals and counters, and no group; its
    ``state_dict()`` goes into the state of a model.

    Args:
        options: How gradients travel.
        parameters: All parameters of the model, in the order of ``named_parameters()``.

    Attributes:
        feedback: Whether gradients that are encoded keep residuals.
        group: The ranks over which the model is sharded; ``None`` in a copy, or in a single
            process, where nothing is sent.
        lock: Held while residuals change.
    """

    def __init__(self, options: Options, parameters: Sequence[Parameter]) -> None:
        self.options = options
        self.parameters = Parameters(parameters)
        self.kept = Kept(options, self.parameters)
        self.gradients, self.weights, self.across = Direction(), Direction(), Direction()
        codec, asked = options.codec, options.error_feedback
        self.feedback = bool(
            isinstance(codec, Codec)
            and (codec.block_format is not None or isinstance(codec, TopK) or is_custom(codec))
            and (contracts(codec) if asked == "auto" else asked)
        )
        self.group: dist.ProcessGroup | None = None
        self._comm: Communicator | None = None
        self._looked = 0
        self.lock = threading.RLock()

    def bind(self, group: dist.ProcessGroup | None, device: torch.device) -> Communicator:
        """Takes the ranks over which the model is sharded, and the device where its data is."""
        self.group = group
        self._comm = communicator(group, device)
        self.kept.join(self._comm.rank, self._comm.world_size)
        return self._comm

    @property
    def communicator(self) -> Communicator:
        """The communicator of the ranks over which the model is sharded.

        Raises:
            RuntimeError: It has none: a copy, or a single process.
        """
        if self._comm is None:
            raise RuntimeError("the state has no process group: a copy, or a single process")
        return self._comm

    @property
    def residuals(self) -> Residuals:
        """The rank's residuals."""
        return self.kept.residuals

    @property
    def step(self) -> int:
        """Reductions so far; part of all random draws."""
        return self.kept.step

    def next_step(self) -> int:
        """The number of a reduction that begins."""
        self.kept.step += 1
        return self.kept.step - 1

    def agree(self, name: str, groups: Sequence[dist.ProcessGroup], **more: object) -> None:
        """Compares options and parameters over all ranks of some groups; collective."""
        fields = {**more, **self.options.described(), **self.parameters.described()}
        for group in groups:
            compare(name, group, {**fields, "world_size": group.size()})

    def announce(self) -> None:
        """Says what residuals will cost, and what will not be compressed against expectation."""
        if self.feedback:
            logger.warning(
                "error feedback will take %.3g MB on every rank: a residual for every element of "
                "the unsharded model", self.residual_bytes / 1e6,
            )  # fmt: skip
        named = list(self.parameters.named())
        small = self.options.uncompressed(named) if self.options.codec is not None else None
        if small is not None:
            warnings.warn(small, stacklevel=3)
        unmatched = self.options.unmatched(self.parameters.names)
        if unmatched:
            warnings.warn(f"patterns that match no parameter: {unmatched}", stacklevel=3)

    # ----------------------------------------------------------------- residuals

    def places(self, shards: Sequence[Shards]) -> Places:
        """The residuals of some parameters; zeros at first."""
        return Places([self._residual(self.parameters[s.ordinal]) for s in shards])

    def _residual(self, parameter: Parameter) -> Tensor:
        part = Part(parameter.ordinal, 0, parameter.numel)
        if parameter.ordinal not in self.kept.orders:
            self.kept.orders[parameter.ordinal] = self.parameters.place(parameter.ordinal).order
        return self.residuals.worker_of(part, parameter.device)

    def arrived(self, exchange: Exchange) -> None:
        """Counts a reduction that is over; residuals that fill_nan all of them are dropped."""
        bad = self.gradients.arrived(exchange)
        if isinstance(bad, Tensor):  # to look waits for the device
            seen = self.gradients.non_finite if self.step % LOOK_EVERY == 0 else self._looked
            bad, self._looked = seen > self._looked, seen
        if bad and self.feedback:
            self.gradients.damage.add(self.kept.drop_damaged()[0])

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
        with self.lock:
            self.kept.multiply(ratio)

    # ----------------------------------------------------------------- what is known

    def stats(self) -> dict[str, Any]:
        """What was sent so far, by direction; see ``docs/fsdp.md`` for the entries."""
        return {
            "gradients": self.gradients.summary(),
            "parameters": self.weights.summary(),
            "across": self.across.summary(),
            "step": self.step,
            "residual_bytes": self.residuals.memory_bytes,
            "residual_norm": self.residuals.norm(),
            "world_size": self.kept.ranks,
        }

    def scalars(self) -> dict[str, float]:
        """:meth:`stats` as flat numbers, for loggers."""
        flat: dict[str, float] = {}
        for key, value in self.stats().items():
            if isinstance(value, dict):
                flat |= {f"{key}/{name}": x for name, x in Direction.scalars(value).items()}
            else:
                flat[key] = float(value)
        return flat

    def log(self, writer: Any, step: int | None = None, prefix: str = "pydist") -> None:
        """Writes scalars to a TensorBoard ``SummaryWriter``, or to what has its ``add_scalar``."""
        for name, value in self.scalars().items():
            writer.add_scalar(f"{prefix}/{name}", value, self.step if step is None else step)

    # ----------------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter name, for ``torch.save``; ranks differ.

        Save one file per rank (``weights_only=True`` reads it), or see :meth:`sharded`.
        """
        with self.lock:
            return checkpoint.state_dict(self.kept)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Restores what :meth:`state_dict` gave; all of it, or nothing where it raises.

        Args:
            state: This rank's own state, saved by the same rank of as many; or the states of all
                ranks of a world of any size, in rank order.

        Raises:
            TypeError: It is no such state.
            ValueError: The state is of another world size or rank, of other parameters, or damaged
                (values that are not finite, or beyond 1.8e19).
        """
        with self.lock:
            memory = checkpoint.read(self.kept, state, self.kept.rank, self.kept.ranks)
            self.kept.load(memory)

    def sharded(self, saved_world_size: int | None = None) -> Sharded:
        """The state as torch.distributed.checkpoint takes it.

        Args:
            saved_world_size: Ranks that saved what is to be loaded, where it was another number
                (:func:`pydist.ddp.saved_world_size`).
        """
        return Sharded(self, self._place_in_world, saved_world_size)

    def _place_in_world(self) -> tuple[int, int]:
        """This rank as the world counts it, and over how many the model is sharded."""
        if self._comm is None:
            return (dist.get_rank() if dist.is_initialized() else self.kept.rank), self.kept.ranks
        return self._comm.ranks[self._comm.rank], self._comm.world_size

    def __getstate__(self) -> dict[str, Any]:
        with self.lock:
            return {**self.__dict__, "group": None, "_comm": None, "lock": None}

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held)
        self.lock = threading.RLock()
