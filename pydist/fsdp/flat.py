"""FSDP1: a communication hook and its state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pydist.codecs import Codec
from pydist.collectives.flat import check_tensor
from pydist.encoding.bucket import BucketCoder, BucketPlan
from pydist.encoding.choose import check_codec
from pydist.encoding.plans import Layout, Shards
from pydist.encoding.sharded import scatter_coder
from pydist.encoding.shares import Part
from pydist.fsdp import private_flat as private
from pydist.fsdp.parameters import Parameter, choose
from pydist.fsdp.request import Request, check_feedback
from pydist.fsdp.state import ShardedState, submit
from pydist.training.options import Choice, Options
from pydist.training.together import compare, of_all_ranks, tell
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator, communicator
from pydist.transport.exchange import REDUCE_SCATTER


class FlatUnit:
    """One FSDP1 unit: what its flat gradient holds.

    Args:
        state: What the model keeps.
        comm: The communicator of the ranks that reduce it.
        name: Its name, for messages.
        held: Its parameters and where each begins; ``None``: all of it is one parameter.
    """

    def __init__(
        self,
        state: ShardedState,
        comm: Communicator,
        name: str,
        held: Sequence[tuple[Parameter, int]] | None,
    ) -> None:
        self.state, self.comm, self.name, self.held = state, comm, name, held
        self._layouts: dict[tuple[int, torch.dtype], Layout] = {}
        self._plans: dict[tuple[int, torch.dtype], BucketPlan] = {}

    def _choose(self, parameter: Parameter, shards: Shards, dtype: torch.dtype) -> Choice:
        options = self.state.options
        choice = choose(options, parameter, parameter.like(), shards, dtype)
        if choice.codec is None:
            self.state.gradients.raw[parameter.name] = choice.reason
        return choice

    def _parts(self, numel: int) -> list[Part]:
        if self.held is None:
            return [Part(0, 0, numel)]
        return [Part(parameter.ordinal, at, parameter.numel) for parameter, at in self.held]

    def layout(self, numel: int, dtype: torch.dtype) -> Layout:
        """A padded gradient of ``numel`` elements, cut into equal rows wherever that may be."""
        key = (numel, dtype)
        if key not in self._layouts:
            ranks = self.comm.world_size
            row = numel // ranks
            coded: list[Shards] = []
            raw: list[Shards] = []
            for i, part in enumerate(self._parts(numel)):
                begin, end = part.offset, part.offset + part.numel
                cuts = [(max(begin, r * row), min(end, (r + 1) * row)) for r in range(ranks)]
                shards = Shards(
                    part.ordinal,
                    tuple(a - r * row if b > a else 0 for r, (a, b) in enumerate(cuts)),
                    tuple(max(0, b - a) for a, b in cuts),
                )
                one = self.held is None or self._choose(self.held[i][0], shards, dtype).codec
                (coded if one else raw).append(shards)
            self._layouts[key] = Layout(row, ranks, tuple(coded), tuple(raw))
        return self._layouts[key]

    def plan(self, numel: int, dtype: torch.dtype, codec: Codec) -> BucketPlan:
        """A gradient that is not sharded, as a bucket."""
        key = (numel, dtype)
        if key not in self._plans:
            parts, ranks = self._parts(numel), self.comm.world_size
            codecs: list[Codec | None] = [codec] * len(parts)
            for i, (parameter, _) in enumerate(self.held or ()):
                whole = Shards(parameter.ordinal, (0,), (parameter.numel,))
                codecs[i] = self._choose(parameter, whole, dtype).codec
            feedback = [False] * len(parts)
            self._plans[key] = BucketPlan(parts, codecs, feedback, dtype, ranks, ranks)
        return self._plans[key]

    def reduce(self, grad: Tensor, output: Tensor | None) -> None:
        """Averages a gradient over all ranks, in place or into this rank's share."""
        state, codec = self.state, self.state.options.codec
        assert isinstance(codec, Codec)
        step = state.next_step()
        seed, mean, ranks = state.options.seed, True, self.comm.world_size
        kind = "all-reduce" if output is None else "reduce-scatter"
        fields = {
            "codec": repr(codec), "seed": seed, "dtype": str(grad.dtype), "numel": grad.numel(),
        }  # fmt: skip
        call = Call(f"{kind} of {self.name!r}", fields, step)

        def make(worker: Worker) -> Coder:
            check_tensor("grad", grad)
            flat = grad.view(-1)
            if output is None:
                plan = self.plan(flat.numel(), flat.dtype, codec)
                none = [None] * len(plan.sections)
                return BucketCoder(
                    plan, flat, worker, mean=mean, seed=seed, feedback=none, staged=True
                )
            layout = self.layout(flat.numel(), flat.dtype)
            return scatter_coder(
                output.view(-1), flat, layout, codec, worker, mean=mean, seed=seed,
                residuals=state.places(layout.coded) if state.feedback else None,
            )  # fmt: skip

        size = grad.numel() // ranks if output is None else output.numel()
        state.gradients.planned(grad.view(-1)[:size], ranks * (2 if output is None else 1))
        route = "two_phase" if output is None else REDUCE_SCATTER
        with state.lock:
            exchange = submit(self.comm, call, route, grad.device, make)
            # Whoever called uses the result at once, in this thread or on this stream.
            exchange.wait()
            state.arrived(exchange)


class CompressionState(ShardedState):
    """What :func:`compression_hook` keeps of an FSDP1 model.

    Construction is collective: all ranks of ``group`` make a state, with equal arguments. Before
    there is a process group it is not: arguments are then compared at the first gradient.

    PyTorch gives this one state to all units and does not say which of them calls. So the blocks
    lie over a unit's flat gradient, everything in it is encoded, and there can be no residuals;
    :func:`pydist.fsdp.compress` gives every unit a state of its own, with all that.

    Args:
        codec: Such as ``pydist.QSGD(bits=4)``.
        group: The process group of the model; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        error_feedback: Must be false here.

    Raises:
        TypeError: ``codec`` is no codec, or there is no argument of a name.
        ValueError: ``error_feedback`` is true, ``codec`` is a ``TopK``, which needs it, or ``seed``
            is out of range.
        MismatchError: Ranks gave different arguments; raised on every rank.
        PydistError: Another rank has a problem.
    """

    @of_all_ranks("pydist.fsdp.CompressionState")
    def __init__(
        self,
        codec: Codec,
        *,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        error_feedback: Literal[False] = False,
    ) -> None:
        try:
            check_codec(codec)
            if error_feedback:
                raise ValueError(
                    f"error_feedback={error_feedback}: PyTorch does not tell the hook which unit "
                    "calls; use pydist.fsdp.compress(model, codec, error_feedback=True)"
                )
            options = Options(
                codec, False, 0, 0, None, seed, "mean", "auto", torch.float32, False
            )  # fmt: skip
            check_feedback(options)
        except Exception as error:
            tell("pydist.fsdp.CompressionState", group, error)
            raise
        super().__init__(options, [])
        self.group = group
        self._unit: FlatUnit | None = None
        if dist.is_available() and dist.is_initialized():
            self._bind(torch.device("cpu"))

    def _bind(self, device: torch.device) -> FlatUnit:
        """Takes its group, for data on a device; the first time it is collective."""
        if self._comm is None:
            compare("pydist.fsdp.CompressionState", self.group, self.options.described())
        self._unit = FlatUnit(self, self.bind(self.group, device), "unit", None)
        return self._unit

    def reduce(self, grad: Tensor, output: Tensor | None) -> None:
        """Averages a gradient over all ranks; :func:`compression_hook` calls it."""
        unit = self._unit
        if unit is None or unit.comm is not communicator(self.group, grad.device):
            unit = self._bind(grad.device)
        unit.reduce(grad, output)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_unit": None}


def compression_hook(state: Any, grad: Tensor, output: Tensor | None = None) -> None:
    """Averages a unit's gradient over all ranks in compressed form; for ``register_comm_hook``.

    For NO_SHARD, SHARD_GRAD_OP and FULL_SHARD; PyTorch takes no hook for the hybrid ones.

    Args:
        state: A :class:`CompressionState`, or what :func:`pydist.fsdp.compress` made.
        grad: The unit's flat gradient, padded where it is sharded; overwritten where it is not.
        output: This rank's share of the result, where it is sharded; overwritten.
    """
    with torch.profiler.record_function("pydist.fsdp.compression_hook"):
        state.reduce(grad, output)


# --------------------------------------------------------------------------- whole models


def find(module: nn.Module, request: Request) -> list[private.Unit]:
    """All units of a tree, checked; none where it holds no FullyShardedDataParallel.

    Raises:
        ValueError: FSDP1 does not do what is asked for, or PyTorch takes no hook in a unit.
    """
    units = list(private.units_of(module))
    if units and (request.gradients is None or request.parameters or request.across):
        raise ValueError(
            "gradients must be a codec, parameters and across None: FSDP1 takes a hook for "
            "gradients alone; for the others use FSDP2 (fully_shard)"
        )
    for unit in units:
        if private.is_hybrid(unit.module):
            raise ValueError(
                f"module {unit.name!r} has {unit.module.sharding_strategy}: PyTorch takes no hook "
                "there; use FSDP2 (fully_shard)"
            )
        if private.is_replicated(unit.module) and request.options.error_feedback is not False:
            raise ValueError(
                f"module {unit.name!r} is not sharded (NO_SHARD): for error_feedback use "
                "DistributedDataParallel and pydist.ddp.compress"
            )
        if private.hook_of(unit.module) is not None:
            raise ValueError(f"module {unit.name!r} has a communication hook already")
    return units


def ranks_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that reduce the gradients of a tree's first unit."""
    return next((private.group_of(unit) for _, unit in private.units_of(module)), None)


def compress(module: nn.Module, units: Sequence[private.Unit], request: Request) -> ShardedState:
    """See :func:`pydist.fsdp.compress`."""
    held = _held(units)
    parameters = [parameter for each in held for parameter, _ in each]
    state = ShardedState(request.options, parameters)
    groups = {id(group): group for _, u in units if (group := private.group_of(u))}
    state.agree("pydist.fsdp.compress", list(groups.values()))
    state.bind(private.group_of(units[0].module), private.device_of(units[0].module))
    comms = [communicator(private.group_of(u), private.device_of(u)) for _, u in units]
    for root in private.roots_of(module):
        root.register_comm_hook(state, compression_hook)
    for (name, unit), comm, its in zip(units, comms, held, strict=True):
        private.set_hook_state(unit, FlatUnit(state, comm, name, its))
    state.announce()
    return state


def _held(units: Sequence[private.Unit]) -> list[list[tuple[Parameter, int]]]:
    """By unit its parameters, and where each begins."""
    ordinals = itertools.count()
    return [
        [
            (
                Parameter(
                    f"{name}.{one.name}" if name else one.name, next(ordinals), one.shape,
                    private.dtype_of(unit), private.device_of(unit), 0,
                    private.group_of(unit).size(), private.requires_grad(unit),
                ),
                one.offset,
            )
            for one in private.parameters_of(unit)
        ]
        for name, unit in units
    ]  # fmt: skip


def restore(module: nn.Module) -> bool:
    """See :func:`pydist.fsdp.restore`; whether there was anything to undo."""
    return private.remove_hook(module, compression_hook)
