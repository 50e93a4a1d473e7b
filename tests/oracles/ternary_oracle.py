"""What the collectives leave behind with ``Ternary``, by the specification alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pydist.formats import wire
from pydist.formats.ternary import UNIT
from pydist.reference import ternary as rt
from pydist.reference.blocks import Draws


def payloads(
    tensors: list[Tensor], clip: float | None, seed: int, step: int, table: Any = None
) -> tuple[Any, Any]:
    """All ranks' payloads, and the scalers they share."""
    values = [x.float().numpy() for x in tensors]
    own = np.stack([rt.scale(x, clip, segments=table)[0] for x in values])
    shared = rt.shared_scalers(own)
    packed = [
        rt.pack(x, own[rank], shared=shared, draws=Draws(seed, rank, 0, step), segments=table)[0]
        for rank, x in enumerate(values)
    ]
    return np.stack(packed), shared


def all_reduce(
    tensors: list[Tensor], clip: float | None, *, mean: bool, seed: int, step: int
) -> Any:
    """Sums that travel as integers."""
    n, ranks = tensors[0].numel(), len(tensors)
    packed, shared = payloads(tensors, clip, seed, step)
    sums = rt.sum_payloads(packed, n)
    return rt.values_of_sums(sums, shared, n, ranks=ranks, mean=mean)[0]


def reduce_scatter(
    tensors: list[Tensor], clip: float | None, *, mean: bool, seed: int, step: int
) -> Any:
    """All ranks' shares, one behind the other."""
    n, ranks = tensors[0].numel(), len(tensors)
    table = wire.segments([n // ranks] * ranks, block=UNIT)
    packed, shared = payloads(tensors, clip, seed, step, table)
    return rt.unpack(packed, shared, n, mean=mean, segments=table)[0]


def all_gather(tensors: list[Tensor], clip: float | None, *, seed: int, step: int) -> Any:
    """All ranks' tensors, one behind the other, each with a scaler of its own."""
    parts = []
    for rank, x in enumerate(tensors):
        values = x.float().numpy()
        own, _ = rt.scale(values, clip)
        packed, _ = rt.pack(values, own, draws=Draws(seed, rank, 0, step))
        parts.append(rt.unpack(packed[None], own, values.size)[0])
    return np.concatenate(parts)
