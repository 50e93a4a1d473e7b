"""Compresses what a sharded model sends, whatever wraps it, and undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pydist.codecs import Codec
from pydist.fsdp import flat
from pydist.fsdp.parameters import unsharded
from pydist.fsdp.request import Compressed, Request
from pydist.fsdp.state import ShardedState
from pydist.training.options import ErrorFeedback, Exclude, Options
from pydist.training.reducer import in_backward
from pydist.training.together import alone, of_all_ranks, tell

_compressed = Compressed()


@of_all_ranks("pydist.fsdp.compress")
def compress(
    module: nn.Module,
    gradients: Codec | None = None,
    parameters: Codec | None = None,
    *,
    across: Codec | None = None,
    across_group: dist.ProcessGroup | None = None,
    error_feedback: ErrorFeedback = False,
    min_numel: int = 1024,
    exclude: Exclude | None = None,
    seed: int = 0,
    residual_dtype: torch.dtype = torch.float32,
) -> ShardedState:
    """Compresses what a sharded model sends: gradients, weights, or both.

    Collective: every rank calls it, after ``fully_shard`` and before the first forward. Every
    FSDPModule in the tree gets communication objects of pydist's; :func:`restore` takes them out
    again. A ``FullyShardedDataParallel`` (FSDP1) gets a hook for its gradients, with a state for
    every unit. Called again with equal arguments it returns the state that there is.

    1. Gradients: every rank encodes what each rank owns of them and sends it there; the owner
       decodes, sums in float32 in rank order, and divides. Nothing is encoded again.
    2. Weights: every rank encodes its shard, and all ranks, the owner too, compute with what was
       decoded, so all hold the same bits. The shards that the optimizer updates stay exact.

    Blocks and random draws belong to parameters and shards, not to FSDP's buffers.

    Args:
        module: The model, a part of it, or what wraps it (``torch.compile``, Lightning Fabric). In
            a single process any module: the state then has nothing to do and says so.
        gradients: Their codec, such as ``pydist.QSGD(bits=4)``; ``None``: as before.
        parameters: The weights' codec, such as ``pydist.BlockInt(bits=8)``; ``None``: as before.
        across: For replicas of a sharded model (HSDP): the codec of the all-reduce that averages
            each rank's shards over ``across_group``, after the reduce-scatter. Give ``fully_shard``
            the dimension of the mesh that shards, alone.
        across_group: The ranks that hold the same shards, of different replicas.
        error_feedback: What a gradient's codec loses is added to the next gradient. Each rank then
            keeps an element of ``residual_dtype`` for every element of the *unsharded* model; the
            result's ``residual_bytes`` says how much that is. ``"auto"``: where it helps. ``TopK``
            cannot do without. Under Adam it was measured to do harm with signs and ``TopK``
            (``docs/ddp.md``).
        min_numel: Parameters with fewer elements travel raw.
        exclude: Patterns of names, or a predicate ``(name, parameter) -> bool``, of parameters that
            travel raw.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        residual_dtype: float32, or bfloat16 for half the memory.

    Returns:
        The state: ``stats()``, ``state_dict()``, ``residual_bytes``.

    Raises:
        TypeError: A codec is none, ``module`` is no module, or an argument has no such name.
        ValueError: No codec was given, an option is out of range, ``TopK`` was given for gradients
            without error feedback, or for anything else, the module has no FSDPModule and there
            are several processes, it is compressed already with other arguments, or PyTorch takes
            no custom communication in it.
        MismatchError: Ranks disagree; raised on every rank.
        ImportError: This torch has no custom communication for FSDP2.
    """
    try:
        options = Options(
            gradients, error_feedback, 0, min_numel, exclude, seed, "mean", "auto", residual_dtype,
            False,
        )  # fmt: skip
        request = Request(options, parameters, across, across_group)
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        state = _compressed.same(module, request)
        make = None if state is not None else _find(module, request)
    except Exception as error:
        tell("pydist.fsdp.compress", _ranks_of(module), error)
        raise
    if state is not None:
        if state.group is not None:
            state.agree("pydist.fsdp.compress, again", [state.group], **request.described())
        return state
    assert make is not None
    state = make()
    _compressed.add(module, request, state)
    return state


def _find(module: nn.Module, request: Request) -> Callable[[], ShardedState]:
    """What compresses a model, after all that can be wrong with it on this rank was looked for."""
    if units := flat.find(module, request):
        return lambda: flat.compress(module, units, request)
    if found := _modules().find(module, request):
        return lambda: _modules().compress(found, request)
    if not alone():
        raise ValueError(
            "module: no part of it was given to torch.distributed.fsdp.fully_shard, got a "
            f"{type(module).__name__}"
        )
    return lambda: ShardedState(request.options, unsharded(module))


def _ranks_of(module: object) -> dist.ProcessGroup | None:
    """The ranks over which a model is sharded, where that can be told; ``None``: the world."""
    if not isinstance(module, nn.Module):
        return None
    return next((x for find in (flat, _modules()) if (x := find.ranks_of(module))), None)


def restore(module: nn.Module) -> None:
    """Undoes :func:`compress`: the model communicates as it did before.

    Args:
        module: What was given to :func:`compress`.

    Raises:
        ValueError: It was not.
        RuntimeError: Called in the middle of backward.
    """
    if in_backward():
        raise RuntimeError("restore: not in the middle of backward")
    known = _compressed.forget(module)
    undone = flat.restore(module) or _modules().restore(module)
    if not known and not undone:
        raise ValueError("module: pydist.fsdp.compress was not called on it")


def _modules() -> Any:
    """FSDP2's part, a module; raises ImportError where torch has moved what it needs."""
    from pydist.fsdp import modules

    return modules
