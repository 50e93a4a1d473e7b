"""The executable specification of top-k blocks: plain and slow, in NumPy.

As in :mod:`pydist.reference`: kernels on every backend are bit-identical to these, values are
float32, and every operation that is written is rounded on its own.
"""

from __future__ import annotations

import numpy as np

from pydist.formats import wire
from pydist.formats.topk import BITMAP, TopKFormat, places_of, read_positions, table_bytes
from pydist.formats.wire import IntArray
from pydist.reference.signs import (
    F32,
    U8,
    Storage,
    bfloat16_bits,
    from_bfloat16_bits,
    pack_bits,
    philox4x32,
    round_to,
)

TURN_DOMAIN = 0xC0000000
"""Second word of the key that ties are broken with; no rank and phase make it."""

INFINITE = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


# --------------------------------------------------------------------------- which entries


def turn_of(seed: int, step: int, ordinal: int, index: int, n: int) -> int:
    """Where ties of a block begin: a position 0 … n - 1 that depends on the block's place alone.

    Args:
        seed: Seed, 0 … 2**32 - 1.
        step: Step of the call.
        ordinal: The parameter's place in ``named_parameters()``.
        index: The block's number inside its parameter.
        n: Elements of the block.
    """
    counter = [index % 2**32, index >> 32, step % 2**32, ordinal % 2**32]
    draw = philox4x32(np.array(counter, dtype=np.uint32), (seed, TURN_DOMAIN))[0]
    return int(draw) * n >> 32


def largest(x: F32, k: int, turn: int) -> IntArray:
    """Positions of the ``k`` largest magnitudes of a block, ascending.

    Magnitudes are compared as bit patterns. Among equal ones those that come first from position
    ``turn`` on, past the end and on from the beginning, are taken.
    """
    magnitude = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    place = (np.arange(x.size) - turn) % x.size
    order = np.lexsort((place, -magnitude.astype(np.int64)))
    return np.sort(order[:k]).astype(np.int64)


def stored_values(x: F32, form: TopKFormat) -> U8:
    """Values as they travel: to nearest even; what would become infinite is the largest number."""
    if form.values == "float32":
        return round_to(x, "float32").view(np.uint8)
    half = form.values == "float16"
    rounded = round_to(x, "float16" if half else "bfloat16")
    bits = rounded.astype(np.float16).view("<u2") if half else bfloat16_bits(rounded)
    bits = np.where(np.isnan(x), 0x7E00 if half else 0x7FC0, bits)
    held = (bits & 0x7FFF) == INFINITE[form.values]
    return np.where(held, bits - 1, bits).astype("<u2").view(np.uint8)


def loaded_values(stored: U8, form: TopKFormat) -> F32:
    """The float32 values of what has travelled."""
    if form.values == "float32":
        return stored.view("<f4").astype(np.float32)
    bits = stored.view("<u2")
    if form.values == "float16":
        return bits.view(np.float16).astype(np.float32)
    return from_bfloat16_bits(bits)


# --------------------------------------------------------------------------- positions


def _bits(numbers: IntArray, width: int) -> U8:
    """Numbers of ``width`` bits as one little-endian stream, padded to words."""
    return pack_bits(((numbers[:, None] >> np.arange(width)) & 1).astype(bool).ravel())


def pack_positions(positions: IntArray, n: int, form: TopKFormat) -> U8:
    """Ascending positions of a block of ``n`` elements: a bitmap, or Elias-Fano."""
    low = form.low_bits
    bits = np.zeros(form.high_bits(n), dtype=bool)
    if low == BITMAP:
        bits[positions] = True
        return pack_bits(bits)
    bits[(positions >> low) + np.arange(positions.size)] = True
    return np.concatenate([_bits(positions & ((1 << low) - 1), low), pack_bits(bits)])


# --------------------------------------------------------------------------- one block


def encode_block(x: F32, form: TopKFormat, turn: int) -> tuple[U8, IntArray]:
    """The bytes of one block, and the positions in it; of NaN where a value is not finite."""
    k = form.entries(x.size)
    if np.isfinite(x).all():
        positions = largest(x, k, turn)
        values = x[positions]
    else:
        positions, values = np.arange(k), np.full(k, np.nan, dtype=np.float32)
    stored = stored_values(values, form)
    return np.concatenate(
        [np.pad(stored, (0, -stored.size % 4)), pack_positions(positions, x.size, form)]
    ), positions


def decode_block(payload: U8, form: TopKFormat, n: int) -> tuple[IntArray, F32]:
    """Positions and values of a block of ``n`` elements.

    Raises:
        ValueError: The bytes are malformed.
    """
    positions = read_positions(payload, n, form)
    used = form.entries(n) * form.value_bytes
    return positions, loaded_values(payload[:used], form)


# --------------------------------------------------------------------------- kernels


def select(
    x: F32,
    form: TopKFormat,
    *,
    seed: int = 0,
    step: int = 0,
    segments: IntArray | None = None,
) -> tuple[U8, int]:
    """The largest entries of each block of ``x``.

    A block that holds a NaN or an infinity sends NaN in its first entries, and raises the flag.

    Args:
        x: Values, any shape.
        form: The format.
        seed: Seed of the order of ties.
        step: Step of the order of ties.
        segments: Which elements of which parameters the values are.

    Returns:
        The payload (uint8, a multiple of 4 bytes) and the flags.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    table = wire.one_segment(x.size) if segments is None else segments
    payload, flags = np.zeros(table_bytes(table, form), dtype=np.uint8), 0
    for place in places_of(x.size, table, form):
        values = x[place.values]
        turn = turn_of(seed, step, place.ordinal, place.index, place.size)
        payload[place.bytes], _ = encode_block(values, form, turn)
        flags |= 0 if np.isfinite(values).all() else wire.FLAG_NON_FINITE
    return payload, flags


def scatter(
    payloads: U8,
    form: TopKFormat,
    n: int,
    *,
    mean: bool = False,
    segments: IntArray | None = None,
) -> F32:
    """The sum, or the mean, of what the rows of ``payloads`` hold.

    Every element begins as +0; the entries are added to it in rank order.

    Raises:
        ValueError: A payload is malformed.
    """
    out = np.zeros(n, dtype=np.float32)
    with np.errstate(all="ignore"):
        for place in places_of(n, segments, form):
            total = out[place.values]
            for payload in payloads:
                positions, values = decode_block(payload[place.bytes], form, place.size)
                total[positions] = total[positions] + values
        if mean:
            out = out / np.float32(len(payloads))
    return round_to(out, "float32")


def reduce(
    payloads: U8,
    form: TopKFormat,
    n: int,
    *,
    mean: bool = False,
    seed: int = 0,
    step: int = 0,
    segments: IntArray | None = None,
) -> tuple[U8, int]:
    """:func:`scatter`, and the largest entries of the result: payload and flags."""
    total = scatter(payloads, form, n, mean=mean, segments=segments)
    return select(total, form, seed=seed, step=step, segments=segments)


def clear(x: F32, payload: U8, form: TopKFormat, *, segments: IntArray | None = None) -> F32:
    """``x`` with +0 in the places of the payload's entries."""
    out = np.array(x, dtype=np.float32).ravel()
    for place in places_of(out.size, segments, form):
        positions, _ = decode_block(payload[place.bytes], form, place.size)
        out[place.values][positions] = 0
    return out


def feedback(
    x: F32,
    residual: F32,
    form: TopKFormat,
    *,
    storage: Storage = "float32",
    seed: int = 0,
    step: int = 0,
    segments: IntArray | None = None,
) -> tuple[U8, F32, int]:
    """Error feedback: selects from ``p = x + residual`` and keeps what was not sent.

    The new residual is ``p``, less the value that was sent where one was. It stays as it was in a
    block that holds a NaN or an infinity, and where ``storage`` cannot hold the new one.

    Returns:
        Payload, new residual, flags.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    old = np.asarray(residual, dtype=np.float32).ravel()
    with np.errstate(all="ignore"):
        p = x + old
        payload, flags = select(p, form, seed=seed, step=step, segments=segments)
        new = p.copy()
        for place in places_of(p.size, segments, form):
            rest = new[place.values]
            if np.isfinite(rest).all():
                positions, values = decode_block(payload[place.bytes], form, place.size)
                rest[positions] = rest[positions] - values
            else:
                rest[:] = np.nan
        new = round_to(new, storage)
    return payload, round_to(np.where(np.isfinite(new), new, old), storage), flags
