"""Puts pydist's communication into an FSDP2 model, and takes it out again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pydist.codecs.coders import Codec, check_codec
from pydist.codecs.topk import TopK
from pydist.communicator import communicator
from pydist.ddp.options import Exclude, Options, plain_name
from pydist.fsdp import private
from pydist.fsdp.sharded import (
    CompressedAllGather,
    CompressedAllReduce,
    CompressedReduceScatter,
    Unit,
)
from pydist.fsdp.state import Parameter, ShardedState


def compress(
    module: nn.Module,
    gradients: Codec | None,
    parameters: Codec | None,
    *,
    across: Codec | None,
    across_group: dist.ProcessGroup | None,
    error_feedback: bool | str,
    min_numel: int,
    exclude: Exclude | None,
    seed: int,
    residual_dtype: torch.dtype,
) -> ShardedState:
    """See :func:`pydist.fsdp.compress`."""
    if gradients is None and parameters is None and across is None:
        raise ValueError("gradients, parameters, across: at least one must be a codec")
    if (across is None) != (across_group is None):
        raise ValueError("across and across_group go together: a codec, and the ranks it is for")
    for codec in (gradients, parameters, across):
        if codec is not None:
            check_codec(codec)
    for name, codec in (("parameters", parameters), ("across", across)):
        if isinstance(codec, TopK):
            raise ValueError(
                f"{name}={codec}: it sends a few entries of each block alone, and nothing keeps "
                "the others there"
            )
    if gradients is None and error_feedback is True:
        raise ValueError("error_feedback=True needs a codec for gradients")
    found = _groups(module, across=across is not None)

    def options(codec: Codec | None, feedback: bool | str) -> Options:
        chosen: Any = codec
        return Options(
            chosen, feedback, 0, min_numel, exclude, seed, "mean", "auto", residual_dtype, False
        )

    of_gradients = options(gradients, error_feedback)
    first = private.shard_group(found[0][2])
    known = _parameters(module, found)
    state = ShardedState(communicator(first), of_gradients, known)
    ordinals = _ordinals(module)
    units = [
        Unit(
            name, group, state,
            [state.parameters[_ordinal(ordinals, x)] for x in private.parameters_of(group)],
        )
        for name, _, group in found
    ]  # fmt: skip
    comms = {id(unit.comm): unit.comm for unit in units}
    if across_group is not None:
        comms[0] = communicator(across_group)
    codecs = {"weights": repr(parameters), "across": repr(across)}
    state.agree("pydist.fsdp.compress", list(comms.values()), **codecs)
    for unit, (_, child, group) in zip(units, found, strict=True):
        private.watch_backward(group, unit.look)
        child.set_custom_reduce_scatter(
            CompressedReduceScatter(unit, private.reduce_scatter_of(group), gradients)
        )
        if parameters is not None:
            child.set_custom_all_gather(
                CompressedAllGather(
                    unit, private.all_gather_of(group), parameters, options(parameters, False)
                )
            )
        if across is not None and across_group is not None:
            child.set_all_reduce_hook(
                CompressedAllReduce(unit, across_group, across, options(across, False))
            )
    state.announce()
    return state


def restore(module: nn.Module) -> None:
    """See :func:`pydist.fsdp.restore`."""
    found = 0
    for _, child in private.fsdp_modules(module):
        for group in private.groups_of(child):
            reduce, gather = private.reduce_scatter_of(group), private.all_gather_of(group)
            if isinstance(reduce, CompressedReduceScatter):
                child.set_custom_reduce_scatter(reduce.before)
                private.unwatch_backward(group)
                found += 1
            if isinstance(private.all_reduce_hook_of(group), CompressedAllReduce):
                private.remove_all_reduce_hook(group)
            if isinstance(gather, CompressedAllGather):
                child.set_custom_all_gather(gather.before)
    if not found:
        raise ValueError("module: pydist.fsdp.compress was not called on it")


def _groups(module: nn.Module, *, across: bool) -> list[tuple[str, private.FSDPModule, Any]]:
    """All groups of parameters, with the names of their modules, checked."""
    found: dict[int, tuple[str, private.FSDPModule, Any]] = {}
    for wrapped, child in private.fsdp_modules(module):
        name = plain_name(f"{wrapped}.").removesuffix(".")  # equal whether compiled or not
        groups = private.groups_of(child)
        if len(groups) > 1:
            raise ValueError(
                f"module {name!r} has {len(groups)} parameter groups (a shard_placement_fn over "
                "several meshes): PyTorch takes no custom communication there; call fully_shard "
                "on its parts"
            )
        for group in groups:
            if private.shard_group(group) is None:
                raise ValueError(f"module {name!r} is replicated, not sharded")
            if across and (private.is_hybrid(group) or private.all_reduce_hook_of(group)):
                raise ValueError(
                    f"module {name!r} averages over replicas already (a mesh of two dimensions, or "
                    "an all-reduce hook): across needs fully_shard on the one that shards alone"
                )
            if isinstance(private.reduce_scatter_of(group), CompressedReduceScatter):
                raise ValueError(
                    f"module {name!r} is compressed already; call pydist.fsdp.restore first"
                )
            found.setdefault(id(group), (name, child, group))
    if not found:
        raise ValueError(
            "module: no part of it was given to torch.distributed.fsdp.fully_shard, got a "
            f"{type(module).__name__}"
        )
    return list(found.values())


def _ordinals(module: nn.Module) -> dict[int, tuple[int, str]]:
    """By identity, every parameter's place and name."""
    return {
        id(parameter): (ordinal, plain_name(name))
        for ordinal, (name, parameter) in enumerate(module.named_parameters())
    }


def _ordinal(ordinals: dict[int, tuple[int, str]], member: Any) -> int:
    return next(ordinals[id(x)][0] for x in private.tensors_of(member) if id(x) in ordinals)


def _parameters(
    module: nn.Module, found: list[tuple[str, private.FSDPModule, Any]]
) -> list[Parameter]:
    ordinals, result = _ordinals(module), []
    for _, _, group in found:
        for member in private.parameters_of(group):
            ordinal = _ordinal(ordinals, member)
            name = next(name for place, name in ordinals.values() if place == ordinal)
            result.append(
                Parameter(
                    name, ordinal, private.whole_shape(member), member.sharded_param.dtype,
                    group.device, private.shard_dim(member), member.sharded_param.requires_grad,
                )
            )  # fmt: skip
    return sorted(result, key=lambda parameter: parameter.ordinal)
