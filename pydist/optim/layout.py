"""What optimizers ask of their parameters, and how they tell the other ranks about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydist import wire
from pydist.optim.shards import check_placements, is_sharded, local_of, part_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def names_of(param_groups: Iterable[dict[str, Any]]) -> list[str]:
    """A name for every parameter: its own, quoted, where names were given; else its place."""
    given = [name for group in param_groups for name in group.get("param_names", group["params"])]
    return [
        repr(name) if isinstance(name, str) else f"parameter {i}" for i, name in enumerate(given)
    ]


def describe(param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Name, dtype, shape and strides of every parameter: what must be equal on all ranks."""
    params = [p for group in param_groups for p in group["params"]]
    fields: dict[str, Any] = {"parameters": len(params)}
    for i, (name, p) in enumerate(zip(names_of(param_groups), params, strict=True)):
        local = local_of(p)
        shape, strides = list(local.shape), list(local.stride())
        fields[f"parameter {i}"] = [name, str(p.dtype), shape, strides]
        if is_sharded(p):
            fields[f"shard of parameter {i}"] = part_of(p)
    return fields


def check_betas(betas: Sequence[float]) -> None:
    """Raises ValueError unless there are two, each in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def check_parameters(params: Iterable[Tensor], *, shards: bool) -> None:
    """Raises unless the kernels can work with the parameters.

    Args:
        params: The parameters.
        shards: DTensors are taken.
    """
    for given in params:
        check_placements(given)
        p = local_of(given) if shards else given
        if type(p) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"params must be plain tensors, got {type(p).__name__}")
        if p.device.type not in ("cpu", "cuda"):
            raise ValueError(f"params must be on cpu or cuda, got {p.device}")
        if p.dtype not in FLOATS:
            raise TypeError(f"params must be float32, float16 or bfloat16, got {p.dtype}")
        if not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise TypeError(f"params must be dense in memory, got strides {p.stride()}")


def with_strides_of(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the parameter's memory order (a copy only where it has another)."""
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def check_gradient(name: str, grad: Tensor) -> None:
    """Raises TypeError, naming the parameter, unless the kernels can read its gradient."""
    if grad.layout != torch.strided:
        raise TypeError(f"gradient of {name} is sparse ({grad.layout})")
    if type(grad) is not Tensor:
        raise TypeError(f"gradient of {name} must be a plain tensor, got {type(grad).__name__}")
    if grad.dtype not in FLOATS:
        raise TypeError(
            f"gradient of {name} must be float32, float16 or bfloat16, got {grad.dtype}"
        )


def sample_of(grads: list[Tensor]) -> bytes:
    """The first elements of every gradient; nothing where one of them is not finite."""
    parts = [grad.reshape(-1)[:64].float().cpu() for grad in grads]
    sample = torch.cat([torch.zeros(1), *parts])
    return sample.numpy().tobytes() if bool(sample.isfinite().all()) else b""


def shaped(flat: Tensor, param: Tensor) -> Tensor:
    """A view of what is flat in a dense parameter's memory order, in the parameter's shape."""
    return flat.as_strided(param.size(), param.stride(), flat.storage_offset())


def which_has(has: np.ndarray) -> Tensor:
    """One bit a parameter, the first one lowest, padded to payload words."""
    bits = np.packbits(has, bitorder="little")
    padded = np.zeros(wire.payload_bytes(len(has)), dtype=np.uint8)
    padded[: len(bits)] = bits
    return torch.from_numpy(padded)


def any_rank_has(extras: Tensor, count: int) -> np.ndarray:
    """Which parameters any rank has, from the bits of all ranks, uint8 [ranks, bytes]."""
    bits = np.bitwise_or.reduce(extras.cpu().numpy(), axis=0)
    return np.unpackbits(bits, count=count, bitorder="little").astype(bool)
