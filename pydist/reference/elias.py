"""The executable specification of Elias-coded blocks: plain and slow, in Python and NumPy.

A payload of :mod:`pydist.reference.blocks` with a scheme of levels becomes one of variable length
and back; nothing is lost. ``docs/wire_format.md`` says the same in prose. A stream is written here
as text of ``0`` and ``1``, in the order in which its bits are read.
"""

from __future__ import annotations

import numpy as np

from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.formats.elias import MODE_BITS, MalformedError, longest_bytes, stream_bytes
from pydist.reference.blocks import pack_codes, unpack_codes
from pydist.reference.signs import U8

SPARSE, DENSE, PLAIN = range(3)


# --------------------------------------------------------------------------- the code


def omega(value: int) -> str:
    """The Elias omega code of 1, 2, 3, … (Elias 1975)."""
    code = "0"
    while value > 1:
        group = f"{value:b}"
        code, value = group + code, len(group) - 1
    return code


class _Reader:
    """Takes codes from a stream; raises what is wrong with it."""

    def __init__(self, stream: str, block: int) -> None:
        self.stream, self.block, self.at = stream, block, 0

    def fail(self, reason: int) -> MalformedError:
        return MalformedError(self.block, reason)

    def take(self, count: int) -> str:
        bits = self.stream[self.at : self.at + count]
        if len(bits) < count:
            raise self.fail(1)
        self.at += count
        return bits

    def number(self, most: int, reason: int) -> int:
        """An omega code of 1 … ``most``; ``reason`` is what a larger one means."""
        value = 1
        while self.take(1) == "1":
            if value + 1 > most.bit_length():
                raise self.fail(reason)
            value = int("1" + self.take(value), 2)
        if value > most:
            raise self.fail(reason)
        return value


# --------------------------------------------------------------------------- one block


def _sign(level: int) -> str:
    return "1" if level > 0 else "0"


def sparse_bits(levels: list[int]) -> str:
    """Mode, number of nonzero levels plus 1, then gap, sign and magnitude of each."""
    places = [i for i, level in enumerate(levels) if level]
    text = omega(len(places) + 1)
    before = -1
    for i in places:
        text += omega(i - before) + _sign(levels[i]) + omega(abs(levels[i]))
        before = i
    return "00" + text


def dense_bits(levels: list[int]) -> str:
    """Mode, then magnitude plus 1 of every level, with a sign where it is not zero."""
    codes = [omega(abs(level) + 1) + (_sign(level) if level else "") for level in levels]
    return "10" + "".join(codes)


def plain_bits(levels: list[int], form: BlockFormat) -> str:
    """Mode, then the codes as they are, the lowest bit first."""
    codes = [f"{level + form.levels:0{form.bits}b}"[::-1] for level in levels]
    return "01" + "".join(codes)


def encode_block(codes: U8, form: BlockFormat) -> str:
    """The shortest stream of a block's codes: plain before dense before sparse where equal."""
    levels = [min(int(code), 2 * form.levels) - form.levels for code in codes]
    return min(plain_bits(levels, form), dense_bits(levels), sparse_bits(levels), key=len)


def decode_block(stream: str, n: int, form: BlockFormat, block: int = 0) -> U8:
    """The ``n`` codes of a block; the stream is padded to whole bytes with zeros.

    Raises:
        MalformedError: No encoder wrote this stream.
    """
    read, top = _Reader(stream, block), form.levels
    mode = int(read.take(MODE_BITS)[::-1], 2)
    levels = [0] * n
    if mode == SPARSE:
        count = read.number(n + 1, 3) - 1
        at = -1
        for _ in range(count):
            if at == n - 1:
                raise read.fail(5)
            at += read.number(n - 1 - at, 5)
            sign = read.take(1)
            levels[at] = read.number(top, 4) * (1 if sign == "1" else -1)
    elif mode == DENSE:
        for i in range(n):
            magnitude = read.number(top + 1, 4) - 1
            if magnitude:
                levels[i] = magnitude * (1 if read.take(1) == "1" else -1)
    elif mode == PLAIN:
        for i in range(n):
            code = int(read.take(form.bits)[::-1], 2)
            if code > 2 * top:
                raise read.fail(4)
            levels[i] = code - top
    else:
        raise read.fail(2)
    if len(stream) - read.at >= 8 or "1" in stream[read.at :]:
        raise read.fail(6)
    return (np.array(levels, dtype=np.int64) + top).astype(np.uint8)


# --------------------------------------------------------------------------- payloads


def _blocks_of(table: wire.IntArray, form: BlockFormat) -> list[tuple[int, int]]:
    """Place in the fixed payload and elements of every block."""
    return [
        ((offset + begin) // form.block, min(form.block, length - begin))
        for offset, length, _, _ in table.tolist()
        for begin in range(0, length, form.block)
    ]


def _table(n: int, segments: wire.IntArray | None) -> wire.IntArray:
    return wire.one_segment(n) if segments is None else segments


def _is_nan(scale: U8) -> bool:
    return bool(np.isnan(scale.copy().view("<f4")[0]))


def elias_encode(
    payload: U8, form: BlockFormat, n: int, *, segments: wire.IntArray | None = None
) -> U8:
    """A payload of fixed length as one of variable length: ends of streams, scales, streams."""
    table = _table(n, segments)
    scales_at = blocks.table_code_bytes(table, form)
    ends, scales, streams = [], [], b""
    for index, size in _blocks_of(table, form):
        scale = payload[scales_at + 4 * index :][:4]
        if not _is_nan(scale):
            codes = payload[index * form.block_bytes :][: form.code_bytes(size)]
            text = encode_block(unpack_codes(codes, size, form.bits), form)
            bits = np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")
            streams += np.packbits(bits, bitorder="little").tobytes()
        ends.append(len(streams))
        scales.append(scale.tobytes())
    streams += bytes(-len(streams) % 4)
    whole = np.array(ends, dtype="<u4").tobytes() + b"".join(scales) + streams
    return np.frombuffer(bytearray(whole), dtype=np.uint8)


def elias_decode(
    payload: U8, form: BlockFormat, n: int, *, segments: wire.IntArray | None = None
) -> U8:
    """The inverse of :func:`elias_encode`; gaps between segments are zeros.

    Raises:
        MalformedError: A block is malformed; names the first.
        ValueError: The payload has a length that none of these segments can have.
    """
    table = _table(n, segments)
    places = _blocks_of(table, form)
    count = len(places)
    if not 8 * count <= payload.size <= longest_bytes(table, form) or payload.size % 4:
        raise ValueError(f"no payload of {count} blocks has {payload.size} bytes")
    ends = payload[: 4 * count].copy().view("<u4").astype(np.int64)
    scales, streams = payload[4 * count : 8 * count], payload[8 * count :]
    scales_at = blocks.table_code_bytes(table, form)
    fixed = np.zeros(blocks.table_bytes(table, form), dtype=np.uint8)
    begin = 0
    for k, (index, size) in enumerate(places):
        end = int(ends[k])
        if not begin <= end <= streams.size or end - begin > stream_bytes(size, form):
            raise MalformedError(k, 7)
        scale = scales[4 * k : 4 * k + 4]
        if _is_nan(scale) != (begin == end):
            raise MalformedError(k, 8)
        if begin < end:
            bits = np.unpackbits(streams[begin:end], bitorder="little")
            codes = decode_block("".join(map(str, bits)), size, form, k)
            packed = pack_codes(codes, form.bits)
            fixed[index * form.block_bytes :][: packed.size] = packed
        fixed[scales_at + 4 * index :][:4] = scale
        begin = end
    if count and (streams.size - begin > 3 or streams[begin:].any()):
        raise MalformedError(count - 1, 6)
    return fixed
