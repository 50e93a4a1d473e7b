"""The hook itself, in PyTorch's convention.

This module has no postponed annotations: DDP checks the hook's annotations as objects.
"""

import torch
from torch._C._distributed_c10d import GradBucket

from pydist.ddp.state import CompressionState


def compression_hook(
    state: CompressionState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Reduces a bucket over all ranks in compressed form; for ``register_comm_hook``.

    1. Parameters whose gradient is all zeros send nothing; to the others the residual is added.
    2. Each is encoded with its codec; what was lost becomes its residual. Excluded and small
       parameters go raw. All of it is one message to every owner of a share.
    3. Owners decode, sum in rank order in float32, divide, add their own residual, encode again.
    4. All ranks decode the same bytes, so replicas stay bit-identical.

    The hook returns at once; the rest overlaps with backward.

    Args:
        state: The model's :class:`CompressionState`.
        bucket: DDP's bucket of local gradients; overwritten.

    Returns:
        A future of the bucket's buffer. What goes wrong is raised by backward, on every rank.
    """
    with torch.profiler.record_function("pydist.compression_hook"):
        return state.reduce_bucket(bucket)
