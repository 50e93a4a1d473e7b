"""DDP's private interface: all that pydist takes from it, and nothing else.

Needed are, of ``DistributedDataParallel``, ``_comm_hooks`` (the hooks that were registered) and
what its own ``__setstate__`` calls to build a reducer: ``_build_params_for_reducer``,
``_build_debug_param_to_name_mapping``, ``_ddp_init_helper``, ``_set_static_graph``. Read in torch
2.9.1 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def hooks_of(ddp: DistributedDataParallel) -> list[tuple[Callable[..., Any], Any]]:
    """The communication hooks that were registered, and their states."""
    return list(ddp._comm_hooks)


def forget_hook(ddp: DistributedDataParallel, hook: Callable[..., Any]) -> None:
    """Takes a hook out of the list, which a copied model has without a reducer that knows them."""
    ddp._comm_hooks = [pair for pair in ddp._comm_hooks if pair[0] is not hook]


def register(ddp: DistributedDataParallel, state: object, hook: Callable[..., Any]) -> None:
    """Registers a hook.

    Raises:
        RuntimeError: The model has one.
    """
    listed = hooks_of(ddp)
    forget_hook(ddp, hook)  # of the original, in a copied model
    try:
        ddp.register_comm_hook(state, hook)
    except RuntimeError:
        ddp._comm_hooks = listed
        raise


def build_reducer(ddp: DistributedDataParallel) -> None:
    """Gives a model a new reducer, as it has when it is unpickled: one without a hook.

    A reducer takes one hook in its life and does not give it back. The new one lays its buckets out
    anew before the second backward, which all ranks do together.
    """
    model: Any = ddp
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:
        model.static_graph = False  # else the call below does nothing
        model._set_static_graph()


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != -1
