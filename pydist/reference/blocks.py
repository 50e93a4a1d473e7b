"""The executable specification of block formats: plain and slow, in NumPy.

As in :mod:`pydist.reference`: kernels on every backend are bit-identical to these, values are
float32, and every operation that is written is rounded on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.reference.signs import F32, U8, Storage, draws16, round_to, sign_bits

FLOAT32_MAX = np.finfo(np.float32).max
SMALLEST_NORM = np.float32(2.0**-120)
"""A block of levels whose norm is below it counts as zeros: L / norm would overflow."""

# format: (bits of the mantissa, bias of the exponent, largest exponent of a value, largest value)
FLOAT8 = {"e4m3": (3, 7, 8, 448.0), "e5m2": (2, 15, 15, 57344.0)}


@dataclass(frozen=True)
class Draws:
    """Where the random bits of stochastic rounding come from.

    Attributes:
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: The rank that encodes.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws.
    """

    seed: int = 0
    rank: int = 0
    phase: int = 0
    step: int = 0


# --------------------------------------------------------------------------- arithmetic


def block_sum(x: F32) -> np.float32:
    """The sum of a block, in the order of a warp of 32 lanes.

    Lane l adds elements l, l + 32, … to 0; then the lanes are added over distances 16, 8, 4, 2, 1.
    """
    lanes = np.zeros(32, dtype=np.float32)
    for begin in range(0, x.size, 32):
        part = x[begin : begin + 32]
        lanes[: part.size] += part
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[np.arange(32) ^ distance]
    return lanes[0]


def power_of_two(x: np.float32, lowest: int, highest: int) -> int:
    """floor(log2(x)), where subnormals have -127, held to ``lowest`` … ``highest``."""
    exponent = int(np.float32(x).view(np.uint32) >> 23) - 127
    return min(max(exponent, lowest), highest)


def block_scale(x: F32, form: BlockFormat) -> np.float32:
    """The scale of a block of finite values."""
    largest = np.float32(np.abs(x).max())
    if form.scheme in FLOAT8:
        emax = FLOAT8[form.scheme][2]
        return np.float32(2.0 ** max(power_of_two(largest, -127, 127) - emax, -126))
    scale = largest if form.norm == "max" else _mean_scale(x, largest, form)
    if form.scheme == "levels" and scale < SMALLEST_NORM:
        return np.float32(0)
    return scale


def _mean_scale(x: F32, largest: np.float32, form: BlockFormat) -> np.float32:
    # Over a power of two near the largest, so that no square overflows or vanishes.
    exponent = power_of_two(largest, -126, 126)
    y = x * np.float32(2.0**-exponent)
    total = block_sum(np.abs(y) if form.norm == "l1" else y * y)
    if form.scheme == "sign":
        total = total / np.float32(x.size)
    if form.norm == "l2":
        total = np.sqrt(total)
    return min(total * np.float32(2.0**exponent), FLOAT32_MAX)


def level_values(form: BlockFormat) -> F32:
    """What the codes 0 … 2**bits - 1 of levels stand for, before the scale; -1 … 1.

    Code c is level c - L; the one code above 2 L, which no encoder writes, counts as 2 L.
    """
    top = form.levels
    levels = np.minimum(np.arange(2**form.bits), 2 * top) - top
    return levels.astype(np.float32) / np.float32(top)


def level_codes(x: F32, scale: np.float32, form: BlockFormat, draws: wire.IntArray | None) -> U8:
    """Codes of levels, to nearest even or, with ``draws`` of 0 … 65535, at random."""
    top = np.float32(form.levels)
    a = np.abs(x) * (top / scale if scale else np.float32(0))
    a = np.minimum(a, top)
    level = np.rint(a) if draws is None else np.floor(a)
    if draws is not None:
        level += (a - level) * np.float32(65536) > draws.astype(np.float32)
    return (np.copysign(level, x) + top).astype(np.uint8)


def float8_values(scheme: str) -> F32:
    """What the 256 codes of an 8-bit float stand for; as torch.float8_e4m3fn and float8_e5m2."""
    mantissa_bits, bias, _, largest = FLOAT8[scheme]
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude % 2**mantissa_bits
    significand = np.where(exponent > 0, 2**mantissa_bits + mantissa, mantissa)
    values = significand * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)
    values[values > largest] = np.nan
    if scheme == "e5m2":
        values[0x7C] = np.inf
    return np.concatenate([values, -values]).astype(np.float32)


def float8_codes(x: F32, scheme: str) -> U8:
    """The codes of the nearest 8-bit floats, even ones in ties; held to the largest."""
    values = float8_values(scheme)[:128]
    values = values[np.isfinite(values)].astype(np.float64)
    a = np.minimum(np.abs(x.astype(np.float64)), values[-1])
    above = np.minimum(np.searchsorted(values, a), values.size - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - a, a - values[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return (np.where(up, above, below) | (np.signbit(x) << 7)).astype(np.uint8)


# --------------------------------------------------------------------------- bits


def pack_codes(codes: U8, bits: int) -> U8:
    """Codes as one little-endian stream of ``bits`` a code, padded with zeros to 4 bytes."""
    stream = (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(stream.astype(bool).ravel(), bitorder="little")
    return np.pad(packed, (0, -packed.size % 4))


def unpack_codes(payload: U8, n: int, bits: int) -> U8:
    """The inverse of :func:`pack_codes`."""
    stream = np.unpackbits(payload, count=n * bits, bitorder="little").reshape(n, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


# --------------------------------------------------------------------------- one block


def encode_block(
    x: F32, form: BlockFormat, zero_bit: int, draws: wire.IntArray | None
) -> tuple[U8, np.float32]:
    """Packed codes and the scale of one block of up to ``form.block`` values."""
    if not np.isfinite(x).all():
        return np.zeros(form.code_bytes(x.size), dtype=np.uint8), np.float32(np.nan)
    scale = block_scale(x, form)
    if form.scheme == "sign":
        codes = sign_bits(x, zero_bit).astype(np.uint8)
    elif form.scheme == "levels":
        codes = level_codes(x, scale, form, draws if form.stochastic else None)
    else:
        codes = float8_codes(x / scale, form.scheme)
    return pack_codes(codes, form.bits), scale


def decode_block(codes: U8, scale: np.float32, form: BlockFormat, n: int) -> F32:
    """The ``n`` values of one block."""
    unpacked = unpack_codes(codes, n, form.bits)
    if form.scheme == "sign":
        return np.where(unpacked == 1, scale, -scale)
    if form.scheme == "levels":
        return level_values(form)[unpacked] * scale
    return float8_values(form.scheme)[unpacked] * scale


# --------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class _Place:
    """One block: its elements among the dense values, its codes and scale in the payload."""

    values: slice
    codes: slice
    scale: slice
    ordinal: int
    first: int

    @property
    def size(self) -> int:
        return int(self.values.stop - self.values.start)


def _places(table: wire.IntArray, form: BlockFormat) -> Iterator[_Place]:
    scales = blocks.table_code_bytes(table, form)
    dense = 0
    for offset, length, ordinal, first in table.tolist():
        for begin in range(0, length, form.block):
            n = min(form.block, length - begin)
            index = (offset + begin) // form.block
            codes, scale = index * form.block_bytes, scales + 4 * index
            yield _Place(
                slice(dense + begin, dense + begin + n),
                slice(codes, codes + form.code_bytes(n)), slice(scale, scale + 4),
                ordinal, first + begin,
            )  # fmt: skip
        dense += length


def _table(n: int, segments: wire.IntArray | None) -> wire.IntArray:
    return wire.one_segment(n) if segments is None else segments


def quantize(
    x: F32,
    form: BlockFormat,
    *,
    zero_bit: int = 1,
    draws: Draws = Draws(),
    segments: wire.IntArray | None = None,
) -> tuple[U8, int]:
    """Codes and scales of ``x``.

    A block that holds a NaN or an infinity has zero codes and the scale NaN, so that all of it
    decodes to NaN, and raises the flag.

    Args:
        x: Values, any shape.
        form: The format.
        zero_bit: Bit of a zero; for signs.
        draws: Random bits; for stochastic rounding.
        segments: Which elements of which parameters the values are.

    Returns:
        The payload (uint8, a multiple of 4 bytes) and the flags.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    table = _table(x.size, segments)
    payload = np.zeros(blocks.table_bytes(table, form), dtype=np.uint8)
    flags = 0
    with np.errstate(all="ignore"):
        for place in _places(table, form):
            values = x[place.values]
            drawn = None
            if form.stochastic:
                key1 = draws.rank << 2 | draws.phase
                drawn = draws16(
                    draws.seed, key1, draws.step, place.ordinal, place.first, place.size
                ).astype(np.int64)
            codes, scale = encode_block(values, form, zero_bit, drawn)
            payload[place.codes] = codes
            payload[place.scale] = np.array([scale], dtype="<f4").view(np.uint8)
            flags |= wire.FLAG_NON_FINITE if np.isnan(scale) else 0
    return payload, flags


def dequantize(
    payload: U8, form: BlockFormat, n: int, *, segments: wire.IntArray | None = None
) -> F32:
    """The ``n`` values that a payload holds."""
    out = np.empty(n, dtype=np.float32)
    with np.errstate(all="ignore"):
        for place in _places(_table(n, segments), form):
            scale = payload[place.scale].copy().view("<f4")[0]
            out[place.values] = decode_block(payload[place.codes], scale, form, place.size)
    return round_to(out, "float32")


def sum_quantized(
    payloads: U8,
    form: BlockFormat,
    n: int,
    *,
    mean: bool = False,
    segments: wire.IntArray | None = None,
) -> F32:
    """The sum, or the mean, of what the rows of ``payloads`` decode to, added in rank order."""
    total = dequantize(payloads[0], form, n, segments=segments)
    with np.errstate(all="ignore"):
        for payload in payloads[1:]:
            total = total + dequantize(payload, form, n, segments=segments)
        if mean:
            total = total / np.float32(len(payloads))
    return round_to(total, "float32")


def reduce_quantized(
    payloads: U8,
    form: BlockFormat,
    n: int,
    *,
    mean: bool = False,
    zero_bit: int = 1,
    draws: Draws = Draws(phase=1),
    segments: wire.IntArray | None = None,
) -> tuple[U8, int]:
    """:func:`sum_quantized`, and the result quantized again: payload and flags."""
    total = sum_quantized(payloads, form, n, mean=mean, segments=segments)
    return quantize(total, form, zero_bit=zero_bit, draws=draws, segments=segments)


def quantize_feedback(
    x: F32,
    residual: F32,
    form: BlockFormat,
    *,
    storage: Storage = "float32",
    zero_bit: int = 1,
    draws: Draws = Draws(),
    segments: wire.IntArray | None = None,
) -> tuple[U8, F32, int]:
    """Error feedback: quantizes ``p = x + residual`` and keeps what was lost.

    The new residual is ``p - decoded``. It stays as it was in a block that holds a NaN or an
    infinity (nothing of it was sent), and where ``storage`` cannot hold the new one.

    Returns:
        Payload, new residual, flags.
    """
    x = np.asarray(x, dtype=np.float32).ravel()
    old = np.asarray(residual, dtype=np.float32).ravel()
    with np.errstate(all="ignore"):
        p = x + old
        payload, flags = quantize(p, form, zero_bit=zero_bit, draws=draws, segments=segments)
        sent = dequantize(payload, form, p.size, segments=segments)
        new = round_to(p - sent, storage)
    return payload, round_to(np.where(np.isfinite(new), new, old), storage), flags
