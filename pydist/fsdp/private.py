"""FSDP2's private interface: the one place that imports it, and all that pydist takes from it.

Needed are, of ``torch.distributed.fsdp``:

* ``FSDPModule`` with ``set_custom_all_gather`` and ``set_custom_reduce_scatter`` (public);
* ``_fully_shard._fsdp_api.AllGather`` and ``ReduceScatter``, the bases of what these take;
* of an ``FSDPModule`` its parameter groups, and of each group ``fsdp_params``, ``mesh_info``,
  ``reduce_grads``, ``post_backward`` and the two communication objects;
* of each of its parameters the sizes, and whether it has a gradient.

``docs/fsdp.md`` says in which versions of torch they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

    _SETTERS = (FSDPModule.set_custom_all_gather, FSDPModule.set_custom_reduce_scatter)
except (ImportError, AttributeError) as error:
    raise ImportError(
        "pydist.fsdp.compress needs FSDPModule.set_custom_all_gather, set_custom_reduce_scatter "
        "and torch.distributed.fsdp._fully_shard._fsdp_api, which torch 2.9 has and later ones may "
        f"move; this is torch {torch.__version__}: {error}"
    ) from error

__all__ = ["AllGather", "FSDPModule", "ReduceScatter"]


def fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """Every FSDPModule of a tree."""
    return (child for child in module.modules() if isinstance(child, FSDPModule))


def groups_of(module: FSDPModule) -> list[Any]:
    """A module's parameter groups: usually one; none where its children have all parameters."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def shard_group(group: Any) -> dist.ProcessGroup | None:
    """The ranks over which a group is sharded; ``None`` where it is only replicated."""
    return getattr(group.mesh_info, "shard_process_group", None)


def reduce_scatter_of(group: Any) -> ReduceScatter:
    """What reduces a group's gradients now."""
    return group._reduce_scatter_comm


def all_gather_of(group: Any) -> AllGather:
    """What gathers a group's parameters now."""
    return group._all_gather_comm


def all_reduce_hook_of(group: Any) -> Any:
    """What runs after a group's reduce-scatter."""
    return group._all_reduce_hook


def remove_all_reduce_hook(group: Any) -> None:
    """Takes that away; PyTorch has no call for it."""
    group._all_reduce_hook = None


def is_hybrid(group: Any) -> bool:
    """Whether FSDP2 itself averages over replicas."""
    return bool(group._is_hsdp)


# --------------------------------------------------------------------------- parameters


def parameters_of(group: Any) -> list[Any]:
    """A group's parameters, in the order of its buffers."""
    return list(group.fsdp_params)


def tensors_of(param: Any) -> list[Tensor]:
    """The objects under which a parameter may stand in its module now."""
    unsharded = getattr(param, "_unsharded_param", None)
    return [param.sharded_param] + ([] if unsharded is None else [unsharded])


def whole_shape(param: Any) -> torch.Size:
    """The parameter's shape before it was sharded."""
    return torch.Size(param._orig_size)


def shard_dim(param: Any) -> int:
    """The dimension along which it is sharded."""
    return int(param.fsdp_placement.dim)


def padded_numel(param: Any) -> int:
    """Elements that its shard takes in a buffer's row, padding included."""
    return int(param.padded_sharded_param_size.numel())


def has_own_gather(param: Any) -> bool:
    """Whether a tensor subclass changes what is gathered (float8 training, say)."""
    local = getattr(param.sharded_param, "_local_tensor", param.sharded_param)
    return hasattr(local, "fsdp_pre_all_gather")


def has_gradient(param: Any, group: Any) -> bool:
    """Whether the next reduction of its group has it."""
    unsharded = getattr(param, "_unsharded_param", None)
    if unsharded is None:
        return False
    if param.unsharded_accumulated_grad is not None or unsharded.grad is not None:
        return True
    unused_too = getattr(group, "reduce_scatter_unused_params", False)
    return bool(unused_too and unsharded.requires_grad)


# --------------------------------------------------------------------------- the moment before


def watch_backward(group: Any, before: Callable[[], None]) -> None:
    """Has ``before`` called whenever a group is about to reduce its gradients.

    A communication object is only given a flat buffer, from which parameters without gradient are
    missing; which ones can no longer be seen then, as the gradients were moved into it.
    """
    original = group.post_backward

    @torch.compiler.disable
    def post_backward(*args: Any) -> Any:
        if group.reduce_grads:
            before()
        return original(*args)

    group.post_backward = post_backward


def unwatch_backward(group: Any) -> None:
    """Undoes :func:`watch_backward`."""
    del group.post_backward
