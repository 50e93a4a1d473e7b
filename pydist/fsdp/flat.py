"""FSDP1: a communication hook and its state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.codecs.base import Coder, Worker
from pydist.codecs.bucket_coder import BucketCoder, BucketPlan
from pydist.codecs.coders import Codec, check_codec
from pydist.codecs.shard_coder import scatter_coder
from pydist.codecs.shard_layout import Layout, Shards
from pydist.codecs.shares import Part
from pydist.collectives import check_tensor
from pydist.communicator import Call, Communicator, communicator
from pydist.ddp.options import Choice, Exclude, Options, plain_name
from pydist.fsdp import private_flat as private
from pydist.fsdp.state import Parameter, ShardedState, choose, submit
from pydist.road import REDUCE_SCATTER

logger = logging.getLogger("pydist.fsdp")


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
        step, state.step = state.step, state.step + 1
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
        road = submit(
            self.comm, call, "two_phase" if output is None else REDUCE_SCATTER, grad.device, make
        )
        # Whoever called uses the result at once, in this thread or on this stream.
        road.wait()
        state.gradients.arrived(road)


class CompressionState(ShardedState):
    """What :func:`compression_hook` keeps of an FSDP1 model.

    Construction is collective: all ranks of ``group`` make a state, with equal arguments.

    PyTorch gives this one state to all units and does not say which of them calls. So the blocks
    lie over a unit's flat gradient, everything in it is encoded, and there can be no residuals;
    :func:`pydist.fsdp.compress` gives every unit a state of its own, with all that.

    Args:
        codec: Such as ``pydist.QSGD(bits=4)``.
        group: The process group of the model; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        error_feedback: Must be false here.

    Raises:
        TypeError: ``codec`` is no codec.
        ValueError: ``error_feedback`` is true, ``codec`` is a ``TopK``, which needs it, or ``seed``
            is out of range.
        MismatchError: Ranks gave different arguments; raised on every rank.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        error_feedback: bool = False,
    ) -> None:
        check_codec(codec)
        if error_feedback:
            raise ValueError(
                "error_feedback=True: PyTorch does not tell the hook which unit calls; use "
                "pydist.fsdp.compress(model, codec, error_feedback=True)"
            )
        options = Options(
            codec, False, 0, 0, None, seed, "mean", "auto", torch.float32, False
        )  # fmt: skip
        super().__init__(communicator(group), options, [])
        self.unit = FlatUnit(self, self.communicator, "unit", None)
        call = Call("pydist.fsdp.CompressionState", options.described())
        self.communicator.run(partial(self.communicator.agree, call))

    def reduce(self, grad: Tensor, output: Tensor | None) -> None:
        """Averages a gradient over all ranks; :func:`compression_hook` calls it."""
        self.unit.reduce(grad, output)


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


def compress(
    module: private.FullyShardedDataParallel,
    codec: Codec,
    *,
    error_feedback: bool | str,
    min_numel: int,
    exclude: Exclude | None,
    seed: int,
    residual_dtype: torch.dtype,
) -> ShardedState:
    """See :func:`pydist.fsdp.compress`."""
    check_codec(codec)
    options = Options(
        codec, error_feedback, 0, min_numel, exclude, seed, "mean", "auto", residual_dtype, False
    )
    units = list(private.units_of(module))
    for name, unit in units:
        if private.is_hybrid(unit):
            raise ValueError(
                f"module {name!r} has {unit.sharding_strategy}: PyTorch takes no hook there; use "
                "FSDP2 (fully_shard)"
            )
        if private.is_replicated(unit) and error_feedback is not False:
            raise ValueError(
                f"module {name!r} is not sharded (NO_SHARD): for error_feedback use "
                "DistributedDataParallel and pydist.ddp.compress"
            )
        if private.hook_of(unit) is not None:
            raise ValueError(f"module {name!r} has a communication hook already")
    held: list[list[tuple[Parameter, int]]] = []
    count = 0
    for name, unit in units:
        prefix = plain_name(f"{name}." if name else "").replace("_fsdp_wrapped_module.", "")
        held.append([])
        for one in private.parameters_of(unit):
            parameter = Parameter(
                prefix + plain_name(one.name), count, one.shape, private.dtype_of(unit),
                private.device_of(unit), 0, private.requires_grad(unit),
            )  # fmt: skip
            held[-1].append((parameter, one.offset))
            count += 1
    state = ShardedState(
        communicator(private.group_of(module)), options,
        [parameter for unit in held for parameter, _ in unit],
    )  # fmt: skip
    state.agree("pydist.fsdp.compress", [state.communicator])
    module.register_comm_hook(state, compression_hook)
    for (name, unit), parameters in zip(units, held, strict=True):
        comm = communicator(private.group_of(unit))
        private.set_hook_state(unit, FlatUnit(state, comm, name, parameters))
    state.announce()
    return state


def restore(module: private.FullyShardedDataParallel) -> None:
    """See :func:`pydist.fsdp.restore`."""
    found = 0
    for _, unit in private.units_of(module):
        if private.hook_of(unit) is compression_hook:
            private.remove_hook(unit)
            found += 1
    if not found:
        raise ValueError("module: pydist.fsdp.compress was not called on it")
