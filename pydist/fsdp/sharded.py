"""FSDP2: communication objects for every FSDPModule of a tree."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.codecs import Codec
from pydist.encoding.plans import Layout, Shards
from pydist.encoding.sharded import gather_coder, reduce_coder, scatter_coder
from pydist.fsdp import private
from pydist.fsdp.parameters import Parameter, choose
from pydist.fsdp.state import ShardedState, submit
from pydist.fsdp.stats import Direction
from pydist.kernels.torch_tensors import normal
from pydist.training.options import Choice, Options
from pydist.training.reducer import in_backward
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, communicator
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, Exchange

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAYOUTS = 8
"""Layouts that a unit remembers: which parameters have a gradient may change with every step."""


class Unit:
    """One group of parameters that FSDP2 communicates together.

    Args:
        name: Name of its module.
        group: FSDP2's object.
        state: What the model keeps.
        parameters: Its parameters, in the order of its buffers.
    """

    def __init__(
        self,
        name: str,
        group: Any,
        state: ShardedState,
        parameters: Sequence[Parameter],
    ) -> None:
        self.name, self.group, self.state = name, group, state
        self.parameters = list(parameters)
        shard_group = private.shard_group(group)
        assert shard_group is not None
        self.comm = communicator(shard_group, group.device)
        self.members = private.parameters_of(group)
        self.present: tuple[bool, ...] | None = None
        self.reduced: tuple[int, tuple[bool, ...] | None] = 0, None
        self.weight_step = 0
        self._layouts: OrderedDict[tuple[Any, ...], Layout] = OrderedDict()
        self._chosen: dict[tuple[torch.dtype, int], dict[int, Choice]] = {}

    def shards(self, present: Sequence[bool]) -> list[Shards]:
        """Where the shards of some of the parameters lie, one behind the other."""
        ranks, at, result = self.comm.world_size, 0, []
        for there, parameter, member in zip(present, self.parameters, self.members, strict=True):
            if not there:
                continue
            slot, numel = private.padded_numel(member), parameter.numel
            if parameter.dim == 0:  # like torch.chunk: the last shards are short, or empty
                held = tuple(min(max(numel - rank * slot, 0), slot) for rank in range(ranks))
            else:
                held = (slot,) * ranks
            result.append(Shards(parameter.ordinal, (at,) * ranks, held))
            at += slot
        return result

    def row(self, present: Sequence[bool]) -> int:
        """Elements of a row of a buffer of some of the parameters."""
        return sum(
            private.padded_numel(member) for member in itertools.compress(self.members, present)
        )

    def layout(
        self, present: tuple[bool, ...], dtype: torch.dtype, options: Options, counts: Direction
    ) -> Layout:
        """A buffer of some of the parameters; remembered for a while."""
        key = (present, dtype, id(options))
        layout = self._layouts.pop(key, None) or self._lay_out(present, dtype, options, counts)
        self._layouts[key] = layout
        if len(self._layouts) > _LAYOUTS:
            self._layouts.popitem(last=False)
        return layout

    def _lay_out(
        self, present: tuple[bool, ...], dtype: torch.dtype, options: Options, counts: Direction
    ) -> Layout:
        coded: list[Shards] = []
        raw: list[Shards] = []
        chosen = self._choices(dtype, options)
        for one in self.shards(present):
            choice = chosen[one.ordinal]
            (raw if choice.codec is None else coded).append(one)
            if choice.codec is None:
                counts.raw[self.state.parameters.name_of(one.ordinal)] = choice.reason
        return Layout(self.row(present), self.comm.world_size, tuple(coded), tuple(raw))

    def _choices(self, dtype: torch.dtype, options: Options) -> dict[int, Choice]:
        """How each parameter travels, by ordinal, whichever others do; found once."""
        key = dtype, id(options)
        if key not in self._chosen:
            everything = self.shards((True,) * len(self.members))
            self._chosen[key] = {
                one.ordinal: choose(options, parameter, member.sharded_param, one, dtype)
                for one, parameter, member in zip(
                    everything, self.parameters, self.members, strict=True
                )
            }
        return self._chosen[key]

    def look(self) -> None:
        """Notes which parameters have a gradient; called just before they are reduced."""
        self.present = tuple(private.has_gradient(member, self.group) for member in self.members)


def _fields(layout: Layout, codec: Codec, **more: object) -> dict[str, Any]:
    """What all ranks must agree on about a buffer."""
    held = [shards.ordinal for shards in layout.coded], [shards.ordinal for shards in layout.raw]
    return {"codec": repr(codec), "parameters": held, **more}


class _Work(dist.Work):
    """A collective under way; FSDP2 waits only for objects of this type."""

    def __init__(self, exchange: Exchange, arrived: Callable[[Exchange], object]) -> None:
        super().__init__()
        self._exchange, self._arrived = exchange, arrived
        self._counted = False

    def is_completed(self) -> bool:
        return self._exchange.future.done()

    def wait(self, timeout: Any = None) -> bool:
        seconds = timeout.total_seconds() if timeout else None
        self._exchange.wait(seconds or None)
        if not self._counted:
            self._counted = True
            self._arrived(self._exchange)
        return True


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --------------------------------------------------------------------------- gradients


class _Before:
    """Memory comes from where it came before."""

    before: private.ReduceScatter | private.AllGather

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a buffer, as before."""
        return self.before.allocate(size, dtype=dtype, device=device)


class CompressedReduceScatter(_Before, private.ReduceScatter):
    """Reduces a unit's gradients in compressed form.

    Args:
        unit: The unit.
        before: What did it before; still does what pydist does not take.
        codec: The gradients' codec; ``None`` leaves them alone.
    """

    def __init__(self, unit: Unit, before: private.ReduceScatter, codec: Codec | None) -> None:
        self.unit, self.codec = unit, codec
        self.before: private.ReduceScatter = before

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduces ``input_tensor`` over ``group``; this rank's row goes to ``output_tensor``."""
        unit, state = self.unit, self.unit.state
        step = state.next_step()
        present, unit.present = unit.present, None
        unit.reduced = step, present
        size = state.gradients.planned(output_tensor, group.size())
        reduction = _reduction(op)
        reason = self._reason(input_tensor, group, reduction, present)
        if reason:
            state.gradients.passed(reason, size)
            return self.before(output_tensor, input_tensor, group, op, async_op)
        assert reduction is not None and present is not None and self.codec is not None
        mean, factor = reduction
        layout = unit.layout(present, input_tensor.dtype, state.options, state.gradients)
        codec = self.codec

        def make(worker: Worker) -> Coder:
            return scatter_coder(
                output_tensor, input_tensor, layout, codec, worker, mean=mean,
                seed=state.options.seed,
                residuals=state.places(layout.coded) if state.feedback else None,
            )  # fmt: skip

        fields = _fields(
            layout, codec, op="mean" if mean else "sum", factor=factor, seed=state.options.seed,
            dtype=str(input_tensor.dtype), numel=input_tensor.numel(),
        )  # fmt: skip
        call = Call(f"reduce-scatter of {unit.name!r}", fields, step)
        with state.lock:
            exchange = submit(unit.comm, call, REDUCE_SCATTER, output_tensor.device, make)
            # Whoever called uses the output at once, in this thread or on this stream.
            _Work(exchange, state.arrived).wait()
        if factor != 1:
            output_tensor.mul_(factor)
        return None

    def _reason(
        self,
        data: Tensor,
        group: dist.ProcessGroup,
        reduction: tuple[bool, float] | None,
        present: tuple[bool, ...] | None,
    ) -> str:
        """Why a call is not compressed; empty where it is."""
        if self.codec is None:
            return "no codec for gradients"
        if data.dtype not in _FLOATS:
            return f"codecs do not take {data.dtype}"
        if reduction is None:
            return "neither a mean nor a sum"
        ranks = self.unit.comm.world_size
        if group.size() != ranks:
            return "reduced over other ranks than the parameters are sharded over"
        if present is None or ranks * self.unit.row(present) != data.numel():
            return "cannot tell which parameters the buffer holds"
        return ""


def _reduction(op: Any) -> tuple[bool, float] | None:
    """Whether ``op`` is a mean, and the factor of its sum; ``None`` for anything else."""
    if op == dist.ReduceOp.AVG:
        return True, 1.0
    if op == dist.ReduceOp.SUM:
        return False, 1.0
    if op == dist.ReduceOp.PREMUL_SUM:
        factor = op.__getstate__()[1]
        return None if isinstance(factor, Tensor) else (False, float(factor))
    return None


class CompressedAllReduce:
    """Averages a unit's reduced gradients over replicas of the model: an all-reduce hook.

    Args:
        unit: The unit.
        group: The ranks that have the same shards.
        codec: The codec across them.
        options: It, and what travels raw.
    """

    def __init__(
        self, unit: Unit, group: dist.ProcessGroup, codec: Codec, options: Options
    ) -> None:
        self.unit, self.codec, self.options, self.group = unit, codec, options, group
        self.comm = communicator(group, unit.group.device)

    def __call__(self, reduced: Tensor) -> None:
        """Averages this rank's row, in place."""
        unit, state, codec = self.unit, self.unit.state, self.codec
        step, present = unit.reduced
        ranks = self.comm.world_size
        size = state.across.planned(reduced[: -(-reduced.numel() // ranks)], 2 * ranks - 1)
        if reduced.dtype not in _FLOATS or present is None or unit.row(present) != reduced.numel():
            state.across.passed("cannot tell which parameters the buffer holds", size)
            dist.all_reduce(reduced, group=self.group)
            reduced.div_(ranks)
            return
        layout = unit.layout(present, reduced.dtype, self.options, state.across)
        seed = self.options.seed

        def make(worker: Worker) -> Coder:
            return reduce_coder(reduced, unit.comm.rank, layout, codec, worker, seed=seed)

        fields = _fields(layout, codec, seed=seed, dtype=str(reduced.dtype), row=unit.comm.rank)
        call = Call(f"all-reduce of {unit.name!r}", fields, step)
        _Work(submit(self.comm, call, "auto", reduced.device, make), state.across.arrived).wait()


# --------------------------------------------------------------------------- weights


class CompressedAllGather(_Before, private.AllGather):
    """Gathers a unit's parameters in compressed form; the shards themselves stay as they are.

    Args:
        unit: The unit.
        before: What did it before; still does what pydist does not take.
        codec: The weights' codec.
        options: It, and what travels raw.
    """

    def __init__(
        self, unit: Unit, before: private.AllGather, codec: Codec, options: Options
    ) -> None:
        self.unit, self.codec, self.options = unit, codec, options
        self.before: private.AllGather = before

    @torch.inference_mode(False)  # validation may run in it; what a call makes outlives that
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` of all ranks of ``group`` into ``output_tensor``."""
        output_tensor, input_tensor = normal(output_tensor), normal(input_tensor)
        unit, state, codec = self.unit, self.unit.state, self.codec
        # Backward must compute with the weights that forward had, so their draws stay.
        if not in_backward():
            unit.weight_step = state.step
        size = state.weights.planned(input_tensor, group.size())
        reason = self._reason(input_tensor, group)
        if reason:
            state.weights.passed(reason, size)
            return self.before(output_tensor, input_tensor, group, async_op)
        whole, seed = (True,) * len(unit.members), self.options.seed
        layout = unit.layout(whole, input_tensor.dtype, self.options, state.weights)

        def make(worker: Worker) -> Coder:
            return gather_coder(output_tensor, input_tensor, layout, codec, worker, seed=seed)

        fields = _fields(
            layout, codec, seed=seed, dtype=str(input_tensor.dtype), numel=input_tensor.numel()
        )
        call = Call(f"all-gather of {unit.name!r}", fields, unit.weight_step)
        exchange = submit(unit.comm, call, ALL_GATHER, output_tensor.device, make)
        work = _Work(exchange, state.weights.arrived)
        if async_op:
            return work
        work.wait()
        return None

    def _reason(self, data: Tensor, group: dist.ProcessGroup) -> str:
        """Why a call is not compressed; empty where it is."""
        unit = self.unit
        if data.dtype == torch.uint8:
            return "parameters of several dtypes travel as bytes"
        if data.dtype not in _FLOATS:
            return f"codecs do not take {data.dtype}"
        if any(private.has_own_gather(member) for member in unit.members):
            return "a tensor subclass gathers something of its own"
        expected = unit.row((True,) * len(unit.members))
        if group.size() != unit.comm.world_size or data.numel() != expected:
            # What was decoded in forward would be encoded again.
            return "resharded over other ranks after forward"
        return ""
