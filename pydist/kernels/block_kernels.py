"""The kernels of block formats behind both doors: checks, then the call, as in ``kernels``."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Protocol

from pydist import _C
from pydist.formats import blocks, wire
from pydist.formats.blocks import NORMS, SCHEMES, Blocked, BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.checks import (
    FLOATS,
    ITEMSIZE,
    View,
    check_bit,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_n,
    check_out,
    check_payloads,
    check_rank,
    check_seed,
    check_state,
)
from pydist.kernels.signs import Target, address_of, launch, step_of


class BlockCodec(Protocol):
    """A codec with blocks: a scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``."""

    @property
    def block_format(self) -> BlockFormat | None:
        """What the kernels are told; ``None`` for bare signs."""


def format_of(codec: BlockCodec) -> BlockFormat:
    """The format of a codec with blocks; raises TypeError where it is none."""
    form = getattr(codec, "block_format", None)
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


def check_table(table: IntArray | None, n: int, name: str, form: Blocked) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    if table is None:
        return wire.one_segment(n)
    blocks.check_segments(table, form)
    total = int(table[:, 1].sum())
    if total != n:
        raise ValueError(f"segments cover {total} elements, {name} has {n}")
    return table


def payload_table(table: IntArray | None, n: int, payloads: View, form: BlockFormat) -> IntArray:
    """The segment table of payloads of ``n`` elements, checked against their length."""
    check_n(n)
    table = check_table(table, n, "n", form)
    needed = blocks.table_bytes(table, form)
    if payloads.shape[1] != needed:
        raise ValueError(
            f"{payloads.name} must have {needed} bytes for n={n}, got {payloads.shape[1]}"
        )
    return table


def _encode_args(
    target: Target,
    out: View,
    table: IntArray,
    form: BlockFormat,
    options: EncodeOptions,
    step: View | None,
) -> _C.EncodeArgs:
    size = blocks.table_code_bytes(table, form)
    known, step_at = step_of(target, options.step if step is None else step, out)
    options = replace(options, step=known)
    return options.native(form, out.address, out.address + size, size, step_at)


def _decode_args(payloads: View, table: IntArray, form: BlockFormat, mean: bool) -> _C.DecodeArgs:
    ranks, stride = payloads.shape
    scales = payloads.address + blocks.table_code_bytes(table, form)
    divisor = ranks if mean else 1
    return _C.DecodeArgs(native_format(form), payloads.address, scales, stride, ranks, divisor)


def quantize(
    target: Target,
    x: View,
    out: View,
    form: BlockFormat,
    options: EncodeOptions,
    *,
    flags: View | None,
    segments: IntArray | None,
    step: View | None = None,
) -> None:
    """Writes codes and scales of ``x`` into the payload ``out``."""
    check_dtype(x, tuple(FLOATS))
    check_flags(flags, x, out)
    check_device(x, flags)
    table = check_table(segments, x.size, x.name, form)
    check_out(out, "uint8", (blocks.table_bytes(table, form),), x)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    args = _encode_args(target, out, table, form, options, step)
    launch(target, "quantize", rows, FLOATS[x.dtype], args, address_of(flags), unit=form.block)


def quantize_feedback(
    target: Target,
    x: View,
    residual: View,
    residual_out: View,
    out: View,
    form: BlockFormat,
    options: EncodeOptions,
    *,
    flags: View | None,
    segments: IntArray | None,
    step: View | None = None,
) -> None:
    """Quantizes ``x + residual`` and writes what was lost into ``residual_out``."""
    check_state(x, residual, residual_out, out, flags)
    table = check_table(segments, x.size, x.name, form)
    check_out(out, "uint8", (blocks.table_bytes(table, form),), x, residual, residual_out)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    width = ITEMSIZE[residual.dtype]
    wire.dense_addresses(rows, wire.MOMENTUM, residual.address, width)
    wire.dense_addresses(rows, wire.MOMENTUM_OUT, residual_out.address, width)
    launch(
        target, "quantize_feedback", rows, FLOATS[x.dtype], FLOATS[residual.dtype],
        _encode_args(target, out, table, form, options, step), address_of(flags), unit=form.block,
    )  # fmt: skip


def reduce_quantized(
    target: Target,
    payloads: View,
    n: int,
    out: View,
    form: BlockFormat,
    options: EncodeOptions,
    *,
    mean: bool,
    flags: View | None,
    segments: IntArray | None,
    step: View | None = None,
) -> None:
    """Sums what the ranks sent and quantizes the sum, or the mean, into ``out``."""
    _, size = check_payloads(payloads)
    table = payload_table(segments, n, payloads, form)
    check_flags(flags, payloads, out)
    check_device(payloads, flags)
    check_out(out, "uint8", (size,), payloads)
    rows = blocks.rows_of(table, form)
    launch(
        target, "reduce_quantized", rows, _decode_args(payloads, table, form, mean),
        _encode_args(target, out, table, form, options, step), address_of(flags), unit=form.block,
    )  # fmt: skip


def dequantize(
    target: Target,
    payloads: View,
    out: View,
    form: BlockFormat,
    *,
    mean: bool,
    segments: IntArray | None,
) -> None:
    """Writes the sum, or the mean, of what the ranks sent into ``out``."""
    check_dtype(out, tuple(FLOATS))
    check_payloads(payloads)
    check_device(payloads, out)
    check_disjoint(out, payloads)
    table = payload_table(segments, out.size, payloads, form)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, out.address, ITEMSIZE[out.dtype])
    args = _decode_args(payloads, table, form, mean)
    launch(target, "dequantize", rows, FLOATS[out.dtype], args, unit=form.block)
