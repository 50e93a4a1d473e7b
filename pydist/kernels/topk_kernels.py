"""The kernels of top-k blocks behind both doors: checks, then the call, as in ``kernels``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pydist import _C
from pydist.formats import blocks, wire
from pydist.formats.topk import VALUES, TopKFormat, malformed, table_bytes
from pydist.formats.wire import IntArray
from pydist.kernels import block_kernels
from pydist.kernels.arguments import shown
from pydist.kernels.checks import (
    FLOATS,
    ITEMSIZE,
    View,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_n,
    check_out,
    check_payloads,
    check_seed,
    check_state,
)
from pydist.kernels.signs import Target, address_of, launch, step_of

SLOT_FLOATS = 2**22
"""CUDA: sums of several ranks are made in 16 MiB of scratch, a block in each slot of it."""


class TopKCodec(Protocol):
    """A codec that sends the largest entries: ``TopK``."""

    @property
    def topk_format(self) -> TopKFormat:
        """What the kernels are told."""


def format_of(codec: TopKCodec) -> TopKFormat:
    """The format of a codec; raises TypeError where it is none."""
    form = getattr(codec, "topk_format", None)
    if isinstance(form, TopKFormat):
        return form
    raise TypeError(f"codec must be a TopK, got {shown(codec)}")


@functools.lru_cache(maxsize=256)
def native_format(form: TopKFormat) -> _C.TopKFormat:
    """The format as the compiled module takes it."""
    return _C.TopKFormat(form.block, form.low_bits, VALUES[form.values], form.share)


@dataclass(frozen=True)
class Payloads:
    """Where the payloads of all ranks are: those of rank r are r · stride bytes further on.

    Attributes:
        address: First byte of rank 0's.
        stride: Bytes from one rank's to the next.
        ranks: How many.
        form: Their format.
        table: Which elements they hold.
    """

    address: int
    stride: int
    ranks: int
    form: TopKFormat
    table: IntArray

    def native(self, *, divisor: int = 1, clear: bool = False) -> _C.TopKDecode:
        """As the compiled module takes them."""
        return _C.TopKDecode(
            native_format(self.form), self.address, self.stride, self.ranks, divisor, clear
        )

    def malformed(self) -> str:
        """What is wrong with payloads in host memory that a kernel has refused."""
        size = table_bytes(self.table, self.form)
        rows = [
            np.frombuffer(ctypes.string_at(self.address + r * self.stride, size), dtype=np.uint8)
            for r in range(self.ranks)
        ]
        n = int(self.table[:, 1].sum())
        return str(malformed(np.stack(rows), self.form, n, segments=self.table))


def run_decoder(
    target: Target,
    kernel: str,
    rows: IntArray,
    *args: object,
    payloads: Payloads,
    flags: int,
    sums: bool,
) -> None:
    """Calls a kernel that reads payloads.

    Args:
        target: Where it runs.
        kernel: ``topk_scatter`` or ``topk_reduce``.
        rows: What it works on.
        *args: What follows the rows, up to the flags.
        payloads: What it reads.
        flags: Address of the flags, or 0. On CUDA malformed payloads raise
            ``wire.FLAG_MALFORMED`` in them, and what they were to become is NaN.
        sums: It adds up several ranks (on CUDA in scratch).

    Raises:
        ValueError: A payload is malformed; on the CPU.
    """
    if not len(rows):
        return
    block = payloads.form.block
    if target.stream is not None:
        room, slots, _owner = 0, 0, None
        if sums:
            work = int(-(-rows[:, wire.N] // block).sum())
            slots = min(max(work, 1), max(SLOT_FLOATS // block, 1))
            assert target.scratch is not None
            room, _owner = target.scratch(4 * block * slots)
        launch(target, kernel, rows, *args, flags, room, slots, unit=block)
        return
    raised = np.zeros(1, dtype=np.int32)
    launch(target, kernel, rows, *args, raised.__array_interface__["data"][0], unit=block)
    if raised[0] & wire.FLAG_MALFORMED:
        raise ValueError(f"malformed top-k payload: {payloads.malformed()}")
    if flags:
        ctypes.c_int32.from_address(flags).value |= int(raised[0])


def _encode_args(
    target: Target, out: View, form: TopKFormat, seed: int, step: int | View
) -> _C.TopKEncode:
    check_seed(seed)
    known, step_at = step_of(target, step, out)
    return _C.TopKEncode(native_format(form), out.address, out.size, seed, known % 2**32, step_at)


def _payloads(
    payloads: View, n: int, form: TopKFormat, segments: IntArray | None
) -> tuple[Payloads, IntArray]:
    """The checked payloads of ``n`` elements, and their rows without addresses."""
    ranks, stride = check_payloads(payloads)
    check_n(n)
    table = block_kernels.check_table(segments, n, "n", form)
    needed = table_bytes(table, form)
    if stride != needed:
        raise ValueError(f"{payloads.name} must have {needed} bytes for n={n}, got {stride}")
    return Payloads(payloads.address, stride, ranks, form, table), blocks.rows_of(table, form)


def select(
    target: Target,
    x: View,
    out: View,
    form: TopKFormat,
    *,
    seed: int,
    step: int | View,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the largest entries of ``x`` into the payload ``out``."""
    check_dtype(x, tuple(FLOATS))
    check_flags(flags, x, out)
    check_device(x, flags)
    table = block_kernels.check_table(segments, x.size, x.name, form)
    check_out(out, "uint8", (table_bytes(table, form),), x)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    args = _encode_args(target, out, form, seed, step)
    launch(target, "topk_select", rows, FLOATS[x.dtype], args, address_of(flags), unit=form.block)


def feedback(
    target: Target,
    x: View,
    residual: View,
    residual_out: View,
    out: View,
    form: TopKFormat,
    *,
    seed: int,
    step: int | View,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Selects from ``x + residual`` and writes what was not sent into ``residual_out``."""
    check_state(x, residual, residual_out, out, flags)
    table = block_kernels.check_table(segments, x.size, x.name, form)
    check_out(out, "uint8", (table_bytes(table, form),), x, residual, residual_out)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    width = ITEMSIZE[residual.dtype]
    wire.dense_addresses(rows, wire.MOMENTUM, residual.address, width)
    wire.dense_addresses(rows, wire.MOMENTUM_OUT, residual_out.address, width)
    launch(
        target, "topk_feedback", rows, FLOATS[x.dtype], FLOATS[residual.dtype],
        _encode_args(target, out, form, seed, step), address_of(flags), unit=form.block,
    )  # fmt: skip


def reduce(
    target: Target,
    payloads: View,
    n: int,
    out: View,
    form: TopKFormat,
    *,
    mean: bool,
    seed: int,
    step: int | View,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Sums what the ranks sent and writes the largest entries of the sum, or the mean."""
    source, rows = _payloads(payloads, n, form, segments)
    check_flags(flags, payloads, out)
    check_device(payloads, flags)
    check_out(out, "uint8", (source.stride,), payloads)
    run_decoder(
        target, "topk_reduce", rows, source.native(divisor=source.ranks if mean else 1),
        _encode_args(target, out, form, seed, step),
        payloads=source, flags=address_of(flags), sums=True,
    )  # fmt: skip


def scatter(
    target: Target,
    payloads: View,
    out: View,
    form: TopKFormat,
    *,
    mean: bool,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the sum, or the mean, of what the ranks sent into ``out``."""
    check_dtype(out, tuple(FLOATS))
    check_flags(flags, payloads, out)
    check_device(payloads, out, flags)
    check_disjoint(out, payloads)
    source, rows = _payloads(payloads, out.size, form, segments)
    wire.dense_addresses(rows, wire.X, out.address, ITEMSIZE[out.dtype])
    args = source.native(divisor=source.ranks if mean else 1)
    run_decoder(
        target, "topk_scatter", rows, FLOATS[out.dtype], args,
        payloads=source, flags=address_of(flags), sums=source.ranks > 1,
    )  # fmt: skip


def clear(
    target: Target,
    x: View,
    payload: View,
    form: TopKFormat,
    *,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes zeros into ``x`` where the payload, uint8 [1, bytes], has entries."""
    check_dtype(x, tuple(FLOATS))
    check_flags(flags, payload, x)
    check_device(x, payload, flags)
    check_disjoint(x, payload)
    source, rows = _payloads(payload, x.size, form, segments)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    run_decoder(
        target, "topk_scatter", rows, FLOATS[x.dtype], source.native(clear=True),
        payloads=source, flags=address_of(flags), sums=False,
    )  # fmt: skip
