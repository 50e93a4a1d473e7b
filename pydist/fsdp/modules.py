"""Puts pydist's communication into an FSDP2 model, and takes it out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from pydist.fsdp import private
from pydist.fsdp.parameters import Parameter
from pydist.fsdp.request import Request
from pydist.fsdp.sharded import (
    CompressedAllGather,
    CompressedAllReduce,
    CompressedReduceScatter,
    Unit,
)
from pydist.fsdp.state import ShardedState
from pydist.training.names import module_names, named_parameters


@dataclass
class Found:
    """A group of parameters that FSDP2 communicates together.

    Attributes:
        name: Of its module, wrappers left out.
        module: Its module.
        group: FSDP2's object.
        parameters: Its parameters, in the order of its buffers.
    """

    name: str
    module: private.FSDPModule
    group: Any
    parameters: list[Parameter]

    @property
    def ranks(self) -> dist.ProcessGroup:
        """Those over which it is sharded."""
        ranks = private.shard_group(self.group)
        assert ranks is not None
        return ranks


def compress(found: list[Found], request: Request) -> ShardedState:
    """See :func:`pydist.fsdp.compress`."""
    known = {one.ordinal: one for each in found for one in each.parameters}
    state = ShardedState(request.options, [known[ordinal] for ordinal in sorted(known)])
    ranks = {id(each.ranks): each.ranks for each in found}
    if request.across_group is not None:
        ranks[id(request.across_group)] = request.across_group
    state.agree("pydist.fsdp.compress", list(ranks.values()), **request.described())
    state.bind(found[0].ranks, found[0].group.device)
    for each in found:
        unit = Unit(each.name, each.group, state, each.parameters)
        _install(unit, each.module, request)
    state.announce()
    return state


def _install(unit: Unit, module: private.FSDPModule, request: Request) -> None:
    group = unit.group
    private.watch_backward(group, unit.look)
    module.set_custom_reduce_scatter(
        CompressedReduceScatter(unit, private.reduce_scatter_of(group), request.gradients)
    )
    if (codec := request.parameters) is not None:
        module.set_custom_all_gather(
            CompressedAllGather(
                unit, private.all_gather_of(group), codec, request.without_feedback(codec)
            )
        )
    if (codec := request.across) is not None and request.across_group is not None:
        module.set_all_reduce_hook(
            CompressedAllReduce(unit, request.across_group, codec, request.without_feedback(codec))
        )


def restore(module: nn.Module) -> bool:
    """See :func:`pydist.fsdp.restore`; whether there was anything to undo."""
    found = False
    for child in private.fsdp_modules(module):
        for group in private.groups_of(child):
            reduce, gather = private.reduce_scatter_of(group), private.all_gather_of(group)
            if isinstance(reduce, CompressedReduceScatter):
                child.set_custom_reduce_scatter(reduce.before)
                private.unwatch_backward(group)
                found = True
            if isinstance(private.all_reduce_hook_of(group), CompressedAllReduce):
                private.remove_all_reduce_hook(group)
            if isinstance(gather, CompressedAllGather):
                child.set_custom_all_gather(gather.before)
    return found


def find(module: nn.Module, request: Request) -> list[Found]:
    """All groups of parameters in a tree, checked; none where it holds no FSDPModule.

    Raises:
        ValueError: PyTorch takes no custom communication in one of them, or it has some already.
    """
    names, across = module_names(module), request.across is not None
    ordinals = {
        id(parameter): (ordinal, name)
        for ordinal, (name, parameter) in enumerate(named_parameters(module))
    }
    found: dict[int, Found] = {}
    for child in private.fsdp_modules(module):
        name = names[cast(nn.Module, child)]  # equal whether compiled or not
        groups = private.groups_of(child)
        if len(groups) > 1:
            raise ValueError(
                f"module {name!r} has {len(groups)} parameter groups (a shard_placement_fn over "
                "several meshes): PyTorch takes no custom communication there; call fully_shard "
                "on its parts"
            )
        for group in groups:
            _check(name, group, across=across)
            if id(group) not in found:
                found[id(group)] = Found(name, child, group, _parameters(group, ordinals))
    return list(found.values())


def ranks_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a tree's first group of parameters is sharded."""
    groups = (x for child in private.fsdp_modules(module) for x in private.groups_of(child))
    return next((private.shard_group(group) for group in groups), None)


def _check(name: str, group: Any, *, across: bool) -> None:
    """Raises ValueError where a group takes no communication of pydist's."""
    if private.shard_group(group) is None:
        raise ValueError(f"module {name!r} is replicated, not sharded")
    if across and (private.is_hybrid(group) or private.all_reduce_hook_of(group)):
        raise ValueError(
            f"module {name!r} averages over replicas already (a mesh of two dimensions, or "
            "an all-reduce hook): across needs fully_shard on the one that shards alone"
        )
    if isinstance(private.reduce_scatter_of(group), CompressedReduceScatter):
        raise ValueError(f"module {name!r} is compressed already; call pydist.fsdp.restore first")


def _parameters(group: Any, ordinals: dict[int, tuple[int, str]]) -> list[Parameter]:
    result, shard_group = [], private.shard_group(group)
    ranks = 1 if shard_group is None else shard_group.size()
    for member in private.parameters_of(group):
        tensors = private.tensors_of(member)
        place = next((ordinals[id(x)] for x in tensors if id(x) in ordinals), None)
        if place is None:
            raise ValueError(
                f"module: a sharded parameter of shape {list(private.whole_shape(member))} is not "
                "among its parameters any more; call fully_shard again"
            )
        ordinal, name = place
        result.append(
            Parameter(
                name, ordinal, private.whole_shape(member), member.sharded_param.dtype,
                group.device, private.shard_dim(member), ranks, member.sharded_param.requires_grad,
            )
        )  # fmt: skip
    return result
