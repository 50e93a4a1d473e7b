"""DDP's bucket buffers as flat values, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def real(param: Tensor) -> Tensor:
    """A parameter as its gradients lie in a bucket: complex numbers as two real ones."""
    return torch.view_as_real(param.detach()) if param.is_complex() else param


def values_of(buffer: Tensor) -> Tensor:
    """A bucket's values, dense, real and flat; its own memory unless it is sparse."""
    flat = buffer.to_dense().view(-1) if buffer.is_sparse else buffer
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def result_of(buffer: Tensor, flat: Tensor) -> Tensor:
    """What DDP gets back: the buffer, whose memory holds the values, or a new sparse one."""
    if not buffer.is_sparse:
        return buffer
    return flat.view(buffer.shape).to_sparse(buffer.sparse_dim())


def filled_with_nan(buffer: Tensor) -> Tensor:
    """A bucket's buffer overwritten with NaN; a new one where it is sparse."""
    if not buffer.is_sparse:
        return buffer.fill_(float("nan"))
    dense = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype, device=buffer.device)
    return dense.to_sparse(buffer.sparse_dim())
