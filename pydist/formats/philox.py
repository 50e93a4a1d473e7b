"""Random bits that every machine has alike: Philox, by place and not by order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]


def philox4x32(counter: U32, key: tuple[int, int]) -> U32:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: uint32 ``[..., 4]``.
        key: Two 32-bit words.

    Returns:
        uint32 ``[..., 4]``, independent uniform bits for each counter.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def philox_groups(
    groups: npt.NDArray[np.int64], c2: int, ordinal: int, key: tuple[int, int]
) -> U32:
    """Four words of each of some groups of a parameter's elements."""
    counter = np.empty((len(groups), 4), dtype=np.uint32)
    counter[:, 0] = groups & 0xFFFFFFFF
    counter[:, 1] = groups >> 32
    counter[:, 2] = c2 % 2**32
    counter[:, 3] = ordinal % 2**32
    return philox4x32(counter, key)


def draws16(seed: int, key1: int, step: int, ordinal: int, first: int, n: int) -> U32:
    """16-bit draws of elements ``first`` … ``first + n - 1``: lane i % 8 of group i // 8."""
    element = np.arange(first, first + n, dtype=np.int64)
    words = philox_groups(element >> 3, step, ordinal, (seed, key1))
    word = words[np.arange(n), (element & 7) >> 1]
    return (word >> ((element & 1) * 16).astype(np.uint32)) & np.uint32(0xFFFF)
