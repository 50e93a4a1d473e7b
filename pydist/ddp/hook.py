"""The hook itself, in PyTorch's convention, and the one-line way to it.

This module has no postponed annotations: DDP checks the hook's annotations as objects.
"""

from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from pydist.codecs.coders import Codec
from pydist.ddp.schedule import Schedule
from pydist.ddp.state import CompressionState


def compression_hook(
    state: CompressionState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Reduces a bucket over all ranks in compressed form; for ``register_comm_hook``.

    1. Parameters whose gradient is all zeros send nothing; to the others the residual is added.
    2. Each is encoded with its codec; what was lost becomes its residual. Excluded and small
       parameters go raw. All of it is one message to every owner of a share.
    3. Owners decode, sum in rank order in float32, divide, add their own residual, encode again.
    4. All ranks decode the same bytes, so replicas stay equal to the bit.

    The hook returns at once; the rest overlaps with backward.

    Args:
        state: The model's :class:`CompressionState`.
        bucket: DDP's bucket of local gradients; overwritten.

    Returns:
        A future of the bucket's buffer. What goes wrong is raised by backward, on every rank.
    """
    with torch.profiler.record_function("pydist.compression_hook"):
        return state.reduce_bucket(bucket)


def compress(
    model: DistributedDataParallel,
    codec: Codec | dict[str, Codec | None] | Schedule,
    **options: Any,
) -> CompressionState:
    """Compresses the gradients of a DDP model: makes a state and registers the hook.

    Collective: every rank calls it. Names, shapes and dtypes of all parameters are compared over
    the ranks at once.

    Args:
        model: The model; it must not have a communication hook yet.
        codec: As of :class:`CompressionState`.
        **options: Further arguments of :class:`CompressionState`, but for ``group`` and
            ``named_parameters``, which are the model's.

    Returns:
        The state: ``stats()``, ``state_dict()``.

    Raises:
        TypeError: ``model`` is not a DistributedDataParallel, or an option is of another type.
        ValueError: An option is out of range.
        MismatchError: Ranks disagree; raised on every rank.
        RuntimeError: The model has a hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    state = CompressionState(
        codec, group=model.process_group, named_parameters=model.module.named_parameters(),
        **options,
    )  # fmt: skip
    model.register_comm_hook(state, compression_hook)
    return state
