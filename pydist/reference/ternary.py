"""The executable specification of ternary payloads: plain and slow, in NumPy.

As in :mod:`pydist.reference`: kernels on every backend are bit-identical to these, values are
float32, and every operation that is written is rounded on its own.

TernGrad: Wen et al., NeurIPS 2017, arXiv 1705.07878.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pydist.formats import ternary, wire
from pydist.formats.ternary import LARGEST_BYTE, SUM_SEGMENT, UNIT, UNIT_BYTES
from pydist.reference.blocks import FLOAT32_MAX, Draws, block_sum, power_of_two
from pydist.reference.signs import F32, U8, draws16, round_to

SMALLEST_SCALER = np.float32(2.0**-110)
"""A scaler below it counts as zero: 65536 / scaler would overflow."""

DIGITS = 5
I32 = npt.NDArray[np.int32]


def _rows(n: int, segments: wire.IntArray | None) -> Iterator[tuple[slice, int, int, int, int]]:
    """Row by row: where its values are, its first unit, its bytes, its ordinal and first element.

    The last unit of the payload may be short; the others are padded to 32 bytes.
    """
    table = wire.one_segment(n) if segments is None else segments
    dense, end = 0, ternary.table_bytes(table)
    for offset, length, ordinal, first in table.tolist():
        unit = offset // UNIT
        size = min(ternary.units_for(length) * UNIT_BYTES, end - unit * UNIT_BYTES)
        yield slice(dense, dense + length), unit, size, ordinal, first
        dense += length


# --------------------------------------------------------------------------- scalers


def root_mean_square(x: F32) -> tuple[np.float32, int]:
    """Root of the mean square of finite values, in units of the power of two it comes with.

    Segments of 4,096 elements are summed over the power of two near their largest magnitude, so
    that no square overflows; then the segments' sums in the same order, over the largest power.
    """
    top = power_of_two(np.abs(x).max(initial=np.float32(0)), -126, 126)
    parts = []
    for begin in range(0, x.size, SUM_SEGMENT):
        part = x[begin : begin + SUM_SEGMENT]
        exponent = power_of_two(np.abs(part).max(), -126, 126)
        y = part * np.float32(2.0**-exponent)
        factor = np.float32(2.0 ** max(exponent - top, -126))
        parts.append(block_sum(y * y) * factor * factor)
    total = block_sum(np.array(parts, dtype=np.float32))
    return np.sqrt(total / np.float32(max(x.size, 1))), top


def layer_scaler(x: F32, clip: float | None) -> np.float32:
    """The largest magnitude of one layer after clipping to ``clip`` deviations; NaN if not finite.

    The deviation is the root of the mean square, about zero as the clipping is: about the mean, as
    TernGrad's authors take it, a layer of one element, or of equal ones, would become zero.
    """
    if not np.isfinite(x).all():
        return np.float32(np.nan)
    scaler = np.float32(np.abs(x).max(initial=np.float32(0)))
    if clip is not None:
        root, top = root_mean_square(x)
        scaler = min(scaler, np.float32(clip) * root * np.float32(2.0**top), FLOAT32_MAX)
    return scaler if scaler >= SMALLEST_SCALER else np.float32(0)


def scale(x: F32, clip: float | None, *, segments: wire.IntArray | None = None) -> tuple[F32, int]:
    """The scaler of every segment, and the flags."""
    x = np.asarray(x, dtype=np.float32).ravel()
    with np.errstate(all="ignore"):
        scalers = [layer_scaler(x[place], clip) for place, *_ in _rows(x.size, segments)]
    out = np.array(scalers, dtype=np.float32)
    return out, wire.FLAG_NON_FINITE if np.isnan(out).any() else 0


def shared_scalers(scalers: F32) -> F32:
    """The scalers that all ranks use: the largest over the rows of ``scalers``; NaN if one is."""
    return np.asarray(scalers.max(axis=0), dtype=np.float32)


# --------------------------------------------------------------------------- trits


def trits(x: F32, own: np.float32, shared: np.float32, draws: wire.IntArray) -> I32:
    """Trits of one layer: the sign with probability min(abs(x), own) / shared, else 0.

    What is not finite becomes 0, and so does everything where the shared scaler is no number or
    below 2**-110.
    """
    limit = own if own > 0 else np.float32(0)
    factor = np.float32(65536) / shared if shared >= SMALLEST_SCALER else np.float32(0)
    a = np.where(np.isfinite(x), np.minimum(np.abs(x), limit), np.float32(0))
    hit = a * factor > draws.astype(np.float32)
    return np.where(hit, np.where(x < 0, -1, 1), 0).astype(np.int32)


def pack_trits(values: I32) -> U8:
    """Whole units of trits: element i of a unit is digit i // 32 of byte i % 32; -1 is digit 2."""
    digits = (values % 3).reshape(-1, DIGITS, UNIT_BYTES)
    weights = 3 ** np.arange(DIGITS)[:, None]
    return (digits * weights).sum(1).astype(np.uint8).ravel()


def unpack_trits(units: U8) -> I32:
    """The inverse of :func:`pack_trits`.

    Raises:
        ValueError: A byte is above 242: no encoder writes it.
    """
    if units.size and int(units.max()) > LARGEST_BYTE:
        at = int(np.flatnonzero(units > LARGEST_BYTE)[0])
        raise ValueError(f"byte {at} is {units[at]}: malformed, five trits are at most 242")
    bytes_of = units.reshape(-1, 1, UNIT_BYTES).astype(np.int32)
    digits = bytes_of // 3 ** np.arange(DIGITS)[:, None] % 3
    return np.where(digits == 2, -1, digits).astype(np.int32).ravel()


def pack(
    x: F32,
    scalers: F32,
    *,
    shared: F32 | None = None,
    draws: Draws = Draws(),  # noqa: B008  (frozen)
    segments: wire.IntArray | None = None,
) -> tuple[U8, int]:
    """The payload of ``x``, and the flags.

    Args:
        x: Values, any shape.
        scalers: This rank's own, one per segment: values are clipped to it.
        shared: Those of all ranks, one per segment; default ``scalers``.
        draws: Random bits.
        segments: Which elements of which parameters the values are.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    shared = scalers if shared is None else shared
    table = wire.one_segment(x.size) if segments is None else segments
    payload = np.zeros(ternary.table_bytes(table), dtype=np.uint8)
    key1 = draws.rank << 2 | draws.phase
    with np.errstate(all="ignore"):
        for row, (place, unit, size, ordinal, first) in enumerate(_rows(x.size, table)):
            n = place.stop - place.start
            drawn = draws16(draws.seed, key1, draws.step, ordinal, first, n).astype(np.int64)
            values = trits(x[place], scalers[row], shared[row], drawn)
            units = pack_trits(np.pad(values, (0, -n % UNIT)))
            payload[unit * UNIT_BYTES :][:size] = units[:size]
    return payload, 0 if np.isfinite(x).all() else wire.FLAG_NON_FINITE


# --------------------------------------------------------------------------- sums


def trit_sums(payloads: U8, unit: int, size: int) -> I32:
    """The exact sums over the ranks of ``size`` bytes from a unit on: whole units, padding too."""
    units = payloads[:, unit * UNIT_BYTES :][:, :size]
    padded = np.pad(units, ((0, 0), (0, -size % UNIT_BYTES)))
    return np.sum([unpack_trits(row) for row in padded], axis=0, dtype=np.int32)


def pack_sums(sums: I32, ranks: int) -> U8:
    """Whole units of sums: bit planes of 20 bytes, in two's complement, the lowest bit first."""
    bits = ternary.sum_bits(ranks)
    planes = (sums.reshape(-1, 1, UNIT) >> np.arange(bits)[:, None]) & 1
    return np.packbits(planes.astype(bool), axis=-1, bitorder="little").ravel()


def unpack_sums(units: U8, ranks: int) -> I32:
    """The inverse of :func:`pack_sums`.

    Raises:
        ValueError: A sum is not one of so many trits.
    """
    bits = ternary.sum_bits(ranks)
    planes = np.unpackbits(units.reshape(-1, bits, UNIT // 8), axis=-1, bitorder="little")
    weights = 1 << np.arange(bits, dtype=np.int64)
    weights[-1] *= -1
    sums = (planes.astype(np.int64) * weights[:, None]).sum(1).ravel()
    if sums.size and int(np.abs(sums).max()) > ranks:
        at = int(np.flatnonzero(np.abs(sums) > ranks)[0])
        raise ValueError(f"sum {at} is {sums[at]}: malformed, {ranks} trits add up to less")
    return sums.astype(np.int32)


def sum_payloads(payloads: U8, n: int, *, segments: wire.IntArray | None = None) -> U8:
    """What the owner of a shard makes of all ranks' payloads: their sums, in whole units."""
    table = wire.one_segment(n) if segments is None else segments
    ranks = len(payloads)
    size = ternary.sum_unit_bytes(ranks)
    out = np.zeros(ternary.table_units(table) * size, dtype=np.uint8)
    for _, unit, length, _, _ in _rows(n, table):
        packed = pack_sums(trit_sums(payloads, unit, length), ranks)
        out[unit * size :][: packed.size] = packed
    return out


# --------------------------------------------------------------------------- values


def _values(
    sums: I32, scalers: F32, divisor: int, segments: wire.IntArray | None
) -> tuple[F32, int]:
    out = np.empty(sums.size, dtype=np.float32)
    with np.errstate(all="ignore"):
        for row, (place, *_) in enumerate(_rows(sums.size, segments)):
            share = sums[place].astype(np.float32) / np.float32(divisor)
            out[place] = scalers[row] * share
    flags = 0 if np.isfinite(out).all() else wire.FLAG_NON_FINITE
    return round_to(out, "float32"), flags


def unpack(
    payloads: U8,
    scalers: F32,
    n: int,
    *,
    mean: bool = False,
    segments: wire.IntArray | None = None,
) -> tuple[F32, int]:
    """The sum, or the mean, of what all ranks' payloads hold: scaler * (sum / ranks); flags."""
    sums = np.empty(n, dtype=np.int32)
    for place, unit, size, _, _ in _rows(n, segments):
        sums[place] = trit_sums(payloads, unit, size)[: place.stop - place.start]
    return _values(sums, scalers, len(payloads) if mean else 1, segments)


def values_of_sums(
    packed: U8,
    scalers: F32,
    n: int,
    *,
    ranks: int,
    mean: bool = False,
    segments: wire.IntArray | None = None,
) -> tuple[F32, int]:
    """The same of what :func:`sum_payloads` made of them."""
    size = ternary.sum_unit_bytes(ranks)
    sums = np.empty(n, dtype=np.int32)
    for place, unit, _, _, _ in _rows(n, segments):
        count = place.stop - place.start
        units = packed[unit * size :][: ternary.units_for(count) * size]
        sums[place] = unpack_sums(units, ranks)[:count]
    return _values(sums, scalers, ranks if mean else 1, segments)
