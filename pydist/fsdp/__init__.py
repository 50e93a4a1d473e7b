"""Compressed gradients and weights for fully sharded training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from pydist.codecs.coders import Codec
from pydist.ddp.options import Exclude
from pydist.fsdp import flat
from pydist.fsdp.flat import CompressionState, compression_hook
from pydist.fsdp.state import ShardedState

__all__ = ["CompressionState", "ShardedState", "compress", "compression_hook", "restore"]


def compress(
    module: nn.Module,
    gradients: Codec | None = None,
    parameters: Codec | None = None,
    *,
    across: Codec | None = None,
    across_group: dist.ProcessGroup | None = None,
    error_feedback: bool | str = False,
    min_numel: int = 1024,
    exclude: Exclude | None = None,
    seed: int = 0,
    residual_dtype: torch.dtype = torch.float32,
) -> ShardedState:
    """Compresses what a sharded model sends: gradients, weights, or both.

    Collective: every rank calls it, after ``fully_shard`` and before the first forward. Every
    FSDPModule in the tree gets communication objects of pydist's; :func:`restore` takes them out
    again. A ``FullyShardedDataParallel`` (FSDP1) gets a hook for its gradients, with a state for
    every unit.

    1. Gradients: every rank encodes what each rank owns of them and sends it there; the owner
       decodes, sums in float32 in rank order, and divides. Nothing is encoded again.
    2. Weights: every rank encodes its shard, and all ranks, the owner too, compute with what was
       decoded, so all hold the same bits. The shards that the optimizer updates stay exact.

    Blocks and random draws belong to parameters and shards, not to FSDP's buffers.

    Args:
        module: The model, or a part of it.
        gradients: Their codec, such as ``pydist.QSGD(bits=4)``; ``None``: as before.
        parameters: The weights' codec, such as ``pydist.BlockInt(bits=8)``; ``None``: as before.
        across: For replicas of a sharded model (HSDP): the codec of the all-reduce that averages
            each rank's shards over ``across_group``, after the reduce-scatter. Give ``fully_shard``
            the dimension of the mesh that shards, alone.
        across_group: The ranks that hold the same shards, of different replicas.
        error_feedback: What a gradient's codec loses is added to the next gradient. Each rank then
            keeps an element of ``residual_dtype`` for every element of the *unsharded* model; the
            result's ``residual_bytes`` says how much that is. ``"auto"``: where it helps. ``TopK``
            cannot do without.
        min_numel: Parameters with fewer elements travel raw.
        exclude: Patterns of names, or a predicate ``(name, parameter) -> bool``, of parameters that
            travel raw.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        residual_dtype: float32, or bfloat16 for half the memory.

    Returns:
        The state: ``stats()``, ``state_dict()``, ``residual_bytes``.

    Raises:
        TypeError: A codec is none.
        ValueError: No codec was given, an option is out of range, ``TopK`` was given for gradients
            without error feedback, or for anything else, the module has no FSDPModule, is
            compressed already, or PyTorch takes no custom communication in it.
        MismatchError: Ranks disagree; raised on every rank.
        ImportError: This torch has no custom communication for FSDP2.
    """
    if isinstance(module, FullyShardedDataParallel):
        if gradients is None or parameters is not None or across is not None:
            raise ValueError(
                "gradients must be a codec, parameters and across None: FSDP1 takes a hook for "
                "gradients alone; for the others use FSDP2 (fully_shard)"
            )
        return flat.compress(
            module, gradients, error_feedback=error_feedback, min_numel=min_numel,
            exclude=exclude, seed=seed, residual_dtype=residual_dtype,
        )  # fmt: skip
    from pydist.fsdp import install

    return install.compress(
        module, gradients, parameters, across=across, across_group=across_group,
        error_feedback=error_feedback, min_numel=min_numel, exclude=exclude, seed=seed,
        residual_dtype=residual_dtype,
    )  # fmt: skip


def restore(module: nn.Module) -> None:
    """Undoes :func:`compress`: the model communicates as it did before.

    Args:
        module: What was given to :func:`compress`.

    Raises:
        ValueError: It was not.
    """
    if isinstance(module, FullyShardedDataParallel):
        flat.restore(module)
        return
    from pydist.fsdp import install

    install.restore(module)
