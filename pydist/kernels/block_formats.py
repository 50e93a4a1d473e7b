"""What kernels of formats with blocks share: codecs, formats, segment tables, rows, scalars."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from pydist import _C
from pydist.formats import blocks, wire
from pydist.formats.blocks import NORMS, SCHEMES, Blocked, BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.checks import ITEMSIZE, ArrayInfo, check_bit, check_n, check_rank, check_seed
from pydist.kernels.launch import Rows, as_table, one_row


class BlockCodec(Protocol):
    """A codec with blocks: a scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``."""

    @property
    def block_format(self) -> BlockFormat | None:
        """What the kernels are told; ``None`` for bare signs."""


def format_of(codec: BlockCodec | BlockFormat) -> BlockFormat:
    """The format of a codec with blocks; raises TypeError where it is none."""
    form = codec if isinstance(codec, BlockFormat) else getattr(codec, "block_format", None)
    if isinstance(form, BlockFormat):
        return form
    raise TypeError(
        f"codec must be a scaled Sign, a QSGD, a BlockInt or a BlockFloat, got {shown(codec)}"
    )


@functools.lru_cache(maxsize=256)
def native_format(form: BlockFormat) -> _C.BlockFormat:
    """The format as the compiled module takes it."""
    return _C.BlockFormat(
        SCHEMES[form.scheme], form.bits, form.block, NORMS[form.norm], form.stochastic
    )


@dataclass(frozen=True)
class EncodeOptions:
    """Scalars of an encoder.

    Attributes:
        zero_bit: What zero encodes as; for signs.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        rank: The rank that encodes, so that ranks draw differently.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws.
    """

    zero_bit: int = 1
    seed: int = 0
    rank: int = 0
    phase: int = 0
    step: int = 0

    def native(
        self, form: BlockFormat, codes: int, scales: int, code_bytes: int, step_at: int = 0
    ) -> _C.EncodeArgs:
        """The checked options, and where codes and scales go, as the compiled module takes them."""
        check_bit("zero_bit", self.zero_bit)
        check_seed(self.seed)
        check_rank(self.rank)
        if not 0 <= wire.as_int("phase", self.phase) < 4:
            raise ValueError(f"phase must be in [0, 4), got {self.phase}")
        return _C.EncodeArgs(
            native_format(form), codes, scales, code_bytes, self.zero_bit, self.seed,
            self.rank << 2 | self.phase, self.step % 2**32, step_at,
        )  # fmt: skip


def decode_args(
    form: BlockFormat, codes: int, scales: int, stride: int, ranks: int, divisor: int
) -> _C.DecodeArgs:
    """Where payloads of blocks are, as the compiled module takes it.

    Args:
        form: Their format.
        codes: Address of the first rank's codes.
        scales: Address of the first rank's scales.
        stride: Bytes from one rank's payload to the next.
        ranks: How many there are.
        divisor: What sums are divided by.
    """
    return _C.DecodeArgs(native_format(form), codes, scales, stride, ranks, divisor)


def check_table(table: IntArray | None, n: int, name: str, form: Blocked) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    if table is None:
        return wire.one_segment(n)
    blocks.check_segments(table, form)
    total = int(table[:, 1].sum())
    if total != n:
        raise ValueError(f"segments cover {total} elements, {name} has {n}")
    return table


class Placed:
    """The elements of an array, or ``n`` elements without one, in the blocks of a payload.

    Args:
        form: The format.
        segments: int64 [k, 4], or ``None`` for one segment.
        n: Elements.
        name: What has as many, for messages.
        x: The array that lies densely in memory; ``None`` for rows without addresses.
        state: Its residual, if it has one.

    Attributes:
        rows: Rows for the kernel.
        table: The checked segment table; ``None`` for one segment of a bare array.
        gaps: Blocks before the end of the payload belong to no segment.
    """

    __slots__ = ("gaps", "n", "rows", "table")

    def __init__(
        self,
        form: Blocked,
        segments: Any,
        n: int,
        name: str,
        x: ArrayInfo | None = None,
        state: ArrayInfo | None = None,
    ) -> None:
        check_n(n)
        self.n = n
        self.table: IntArray | None = None
        self.gaps = False
        self.rows: Rows
        if segments is None:
            at = 0 if state is None else state.address
            self.rows = one_row(0 if x is None else x.address, n, at, at)
            return
        self.table = check_table(as_table(segments), n, name, form)
        self.gaps = blocks.has_gaps(self.table, form)
        self.rows = blocks.rows_of(self.table, form)
        if x is not None:
            wire.dense_addresses(self.rows, wire.X, x.address, ITEMSIZE[x.dtype])
        if state is not None:
            width = ITEMSIZE[state.dtype]
            wire.dense_addresses(self.rows, wire.MOMENTUM, state.address, width)
            wire.dense_addresses(self.rows, wire.MOMENTUM_OUT, state.address, width)

    def payload_bytes(self, form: BlockFormat) -> int:
        """Bytes of the payload."""
        if self.table is None:
            return form.payload_bytes(self.n)
        return blocks.table_bytes(self.table, form)

    def code_bytes(self, form: BlockFormat) -> int:
        """Bytes of the codes in it; the scales follow."""
        if self.table is None:
            return form.code_bytes(self.n)
        return blocks.table_code_bytes(self.table, form)


def check_stride(payloads: ArrayInfo, needed: int, n: int) -> None:
    """Raises ValueError unless the rows of a payload matrix have the length of ``n`` elements."""
    if payloads.shape[1] != needed:
        raise ValueError(
            f"{payloads.name} must have {needed} bytes for n={n}, got {payloads.shape[1]}"
        )
