"""The executable specification of plain values: plain and slow, in NumPy.

As :mod:`pydist.reference`: kernels on every backend are bit-identical to these functions.
"""

from __future__ import annotations

import numpy as np

from pydist.reference.signs import (
    F32,
    U8,
    Storage,
    bfloat16_bits,
    from_bfloat16_bits,
    non_finite,
    round_to,
)


def to_bytes(x: F32, storage: Storage) -> tuple[U8, int]:
    """Values as they travel.

    Args:
        x: Values; rounded to nearest even into ``storage``.
        storage: Dtype on the wire.

    Returns:
        The payload (uint8, padded with zeros to 4 bytes) and the flags: 1 where a value is not
        finite in ``storage``.
    """
    stored = round_to(np.asarray(x, dtype=np.float32).ravel(), storage)
    if storage == "float32":
        payload = stored.astype("<f4").view(np.uint8)
    elif storage == "float16":
        payload = stored.astype("<f2").view(np.uint8)
    else:
        payload = bfloat16_bits(stored).astype("<u2").view(np.uint8)
    return np.pad(payload, (0, -payload.size % 4)), non_finite(stored)


def from_bytes(payload: U8, n: int, storage: Storage) -> F32:
    """The ``n`` values of a payload; exact."""
    payload = np.ascontiguousarray(payload)
    if storage == "float32":
        return payload[: 4 * n].view("<f4").astype(np.float32)
    if storage == "float16":
        return payload[: 2 * n].view("<f2").astype(np.float32)
    return from_bfloat16_bits(payload[: 2 * n].view("<u2"))


def sum_values(values: F32, storage: Storage, *, mean: bool = False) -> tuple[F32, int]:
    """All ranks' values, added in rank order.

    Args:
        values: float32 [ranks, n].
        storage: What the result is rounded to.
        mean: Divide the sum by the number of ranks, once.

    Returns:
        The n values as float32, and the flags: 1 where one is not finite in ``storage``.
    """
    with np.errstate(all="ignore"):
        total = values[0].astype(np.float32)
        for row in values[1:]:
            total = total + row
        if mean:
            total = total / np.float32(len(values))
    stored = round_to(total, storage)
    return stored, non_finite(stored)
