"""The executable specification: every kernel again, plain and slow, in NumPy.

Kernels on every backend are bit-identical to these; ``pydist check`` and the tests compare
them. Values are float32 throughout: float16 and bfloat16 inputs widen exactly beforehand, and
``storage`` names the type a result is rounded to. Where a sum or a product is written here, it is
rounded on its own; nothing is fused.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pydist.formats import wire
from pydist.formats.philox import draws16 as draws16
from pydist.formats.philox import philox4x32 as philox4x32
from pydist.formats.philox import philox_groups

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
Storage = Literal["float32", "float16", "bfloat16"]
Ties = Literal["hash", "zero", "positive"]

TIE_DOMAIN = 0x80000000


# --------------------------------------------------------------------------- number formats


def round_to(x: F32, storage: Storage) -> F32:
    """Rounds to nearest even into ``storage``, as float32; every NaN becomes the canonical one."""
    x = np.asarray(x, dtype=np.float32)
    if storage == "float16":
        with np.errstate(over="ignore"):
            x = x.astype(np.float16).astype(np.float32)
    elif storage == "bfloat16":
        u = x.view(np.uint32).astype(np.uint64)
        u = (u + 0x7FFF + ((u >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16) << np.uint64(16)
        x = np.where(np.isnan(x), x, u.astype(np.uint32).view(np.float32))
    return np.where(np.isnan(x), np.float32(np.nan), x).astype(np.float32)


def bfloat16_bits(x: F32) -> npt.NDArray[np.uint16]:
    """The 16 bits of values that bfloat16 holds exactly."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> F32:
    """Widens bfloat16 bit patterns; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# --------------------------------------------------------------------------- random bits


def tie_bits(seed: int, step: int, ordinal: int, first: int, n: int) -> U8:
    """What a tie of elements ``first`` … ``first + n - 1`` of a parameter resolves to (0 or 1).

    ``h(seed, step >> 1, ordinal, element) xor (step & 1)``: fair, and a coordinate that is always
    tied comes back after two steps.
    """
    element = np.arange(first, first + n, dtype=np.int64)
    words = philox_groups(element >> 7, step >> 1, ordinal, (seed, TIE_DOMAIN))
    word = words[np.arange(n), (element >> 5) & 3]
    return (((word >> (element & 31).astype(np.uint32)) & 1) ^ (step & 1)).astype(np.uint8)


# --------------------------------------------------------------------------- bits and planes


def pack_bits(bits: npt.NDArray[np.bool_]) -> U8:
    """One bit per element, element i in bit i % 8 of byte i // 8, zero padding to 4 bytes."""
    payload = np.zeros(wire.payload_bytes(bits.size), dtype=np.uint8)
    packed = np.packbits(bits, bitorder="little")
    payload[: packed.size] = packed
    return payload


def unpack_bits(payload: U8, n: int) -> U8:
    """The inverse of :func:`pack_bits`: n values of 0 or 1."""
    return np.unpackbits(payload, count=n, bitorder="little")


def _scatter(parts: list[U8], table: wire.IntArray, total_bytes: int) -> U8:
    payload = np.zeros(total_bytes, dtype=np.uint8)
    for part, offset in zip(parts, table[:, 0] // 8, strict=True):
        payload[offset : offset + part.size] = part
    return payload


def _split(x: npt.NDArray[Any], table: wire.IntArray) -> list[npt.NDArray[Any]]:
    return np.split(x, np.cumsum(table[:, 1])[:-1]) if len(table) else []


# --------------------------------------------------------------------------- signs


def sign_bits(x: F32, zero_bit: int) -> npt.NDArray[np.bool_]:
    """1 for positive; +0 and -0 take ``zero_bit``; NaN takes 0."""
    return (x > 0) | ((x == 0) & bool(zero_bit))


def non_finite(x: F32) -> int:
    """The flag an encoder raises for this input."""
    return 0 if bool(np.isfinite(x).all()) else wire.FLAG_NON_FINITE


def pack_signs(
    x: F32, *, zero_bit: int = 1, segments: wire.IntArray | None = None
) -> tuple[U8, int]:
    """Signs of ``x`` as one bit per element.

    Returns:
        The payload (uint8, a multiple of 4 bytes) and the flags.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    table = wire.one_segment(x.size) if segments is None else segments
    parts = [pack_bits(sign_bits(part, zero_bit)) for part in _split(x, table)]
    return _scatter(parts, table, wire.segments_words(table) * 4), non_finite(x)


def unpack_votes(planes: U8, n: int, *, ranks: int | None = None, mean: bool = False) -> F32:
    """Values of a vote.

    Args:
        planes: uint8 ``[p, bytes]``: sign plane; sign and non-zero planes; or count planes.
        n: Elements.
        ranks: ``None`` for sign planes; the number of voters for count planes.
        mean: Divide the sum of the votes by ``ranks``.

    Returns:
        float32 ``[n]``: ±1 (0 for a tie), or ``2 * count - ranks``, or that divided by ``ranks``.
    """
    bits = np.stack([unpack_bits(plane, n) for plane in planes]).astype(np.int64)
    if ranks is not None:
        total = 2 * (bits << np.arange(len(bits))[:, None]).sum(0) - ranks
        divisor = np.float32(ranks if mean else 1)
        return total.astype(np.float32) / divisor
    sign = (2 * bits[0] - 1).astype(np.float32)
    return sign if len(bits) == 1 else np.where(bits[1] == 1, sign, np.float32(0))


# --------------------------------------------------------------------------- votes


def _counts(payloads: U8, n: int) -> npt.NDArray[np.int64]:
    return np.stack([unpack_bits(p, n) for p in payloads]).astype(np.int64).sum(0)


def count_votes(payloads: U8, n: int | None = None) -> U8:
    """How many ranks voted +1, as bit planes.

    Args:
        payloads: uint8 ``[ranks, bytes]``.
        n: Elements; default all bits of a payload.

    Returns:
        uint8 ``[ceil(log2(ranks + 1)), bytes]``; plane j holds bit j of every count.
    """
    ranks, size = payloads.shape
    n = size * 8 if n is None else n
    counts = _counts(payloads, n)
    planes = np.zeros((wire.planes_for(ranks), size), dtype=np.uint8)
    for j, plane in enumerate(planes):
        packed = pack_bits(((counts >> j) & 1).astype(bool))
        plane[: packed.size] = packed
    return planes


def majority_vote(
    payloads: U8,
    *,
    ties: Ties = "hash",
    seed: int = 0,
    step: int = 0,
    n: int | None = None,
    segments: wire.IntArray | None = None,
) -> U8:
    """The side that most ranks voted for.

    Args:
        payloads: uint8 ``[ranks, bytes]``.
        ties: ``"hash"`` (:func:`tie_bits`), ``"zero"`` (a second plane says so) or ``"positive"``.
        seed: Seed of the tie hash.
        step: Step of the tie hash.
        n: Elements; default all bits of a payload.
        segments: Which elements of which parameters the bits are.

    Returns:
        uint8 ``[1, bytes]`` (sign), or with ``ties="zero"`` ``[2, bytes]`` (sign, non-zero).
    """
    ranks, size = payloads.shape
    if segments is None:
        segments = wire.one_segment(size * 8 if n is None else n)
    planes = np.zeros((2 if ties == "zero" else 1, size), dtype=np.uint8)
    for offset, length, ordinal, first in segments.tolist():
        part = slice(offset // 8, offset // 8 + wire.payload_bytes(length))
        counts = _counts(payloads[:, part], length)
        sign, tied = 2 * counts > ranks, 2 * counts == ranks
        if ties == "hash":
            sign |= tied & tie_bits(seed, step, ordinal, first, length).astype(bool)
        elif ties == "positive":
            sign |= tied
        planes[0, part] = pack_bits(sign)
        if ties == "zero":
            planes[1, part] = pack_bits(~tied)
    return planes


# --------------------------------------------------------------------------- Lion


def lion_pack(
    grad: F32,
    momentum: F32,
    *,
    beta1: float,
    beta2: float,
    zero_bit: int = 1,
    momentum_storage: Storage = "float32",
    binarization_range: float | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int = 0,
    segments: wire.IntArray | None = None,
) -> tuple[U8, F32, int]:
    """A worker's vote and its new momentum (Distributed Lion, arXiv 2404.00438, Algorithm 1).

    The vote is the sign of ``beta1 * m + (1 - beta1) * g`` with the old momentum; with
    ``binarization_range`` r it is +1 with probability ``(1 + c / r) / 2`` instead. An element whose
    gradient or new momentum is not finite keeps its old momentum and raises the flag.

    Returns:
        Payload, new momentum, flags.
    """
    g = np.asarray(grad, dtype=np.float32).ravel()
    m = np.asarray(momentum, dtype=np.float32).ravel()
    f = np.float32
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        c = f(beta1) * m + f(1.0 - beta1) * g
        mixed = f(beta2) * m + f(1.0 - beta2) * g
        stored = round_to(mixed, momentum_storage)
    keep = np.isfinite(g) & np.isfinite(stored)
    table = wire.one_segment(g.size) if segments is None else segments
    if binarization_range is None:
        bits = sign_bits(c, zero_bit)
    else:
        draws = [
            draws16(seed, rank << 2, step, ordinal, first, length)
            for _, length, ordinal, first in table.tolist()
        ]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            threshold = (c * f(1.0 / binarization_range) + f(1)) * f(32768)
        bits = threshold > np.concatenate([*draws, np.zeros(0, np.uint32)]).astype(np.float32)
    payload = _scatter(
        [pack_bits(part) for part in _split(bits, table)], table, wire.segments_words(table) * 4
    )
    new = round_to(np.where(keep, stored, m), momentum_storage)
    return payload, new, 0 if bool(keep.all()) else wire.FLAG_NON_FINITE


def lion_apply(
    param: F32,
    planes: U8,
    *,
    lr: float,
    weight_decay: float,
    ranks: int | None = None,
    storage: Storage = "float32",
) -> F32:
    """The update every rank makes: ``x - lr * (delta + weight_decay * x)``.

    Computed as ``x * (1 - lr * weight_decay) - update`` with both scalars rounded once to float32;
    the update is ``lr`` times the majority, or ``(lr / ranks)`` times the sum of the votes.
    """
    x = np.asarray(param, dtype=np.float32).ravel()
    votes = unpack_votes(planes, x.size, ranks=ranks)
    step = np.float32(lr if ranks is None else lr / ranks)
    decay = np.float32(1.0 - lr * weight_decay)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return round_to(x * decay - step * votes, storage)
