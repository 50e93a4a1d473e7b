"""The kernels of block formats on arrays; people call them in :mod:`pydist.arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.kernels import block_kernels, checks, elias_arrays
from pydist.kernels import signs as kernels
from pydist.kernels.array_backends import (
    Array,
    CuPy,
    NumPy,
    backend_of,
    contiguous,
    flags_view,
    in_place,
    result_view,
    step_of,
    values_of,
)
from pydist.kernels.block_kernels import BlockCodec, EncodeOptions, format_of
from pydist.kernels.checks import View
from pydist.kernels.elias_kernels import check_fixed, check_no_out, without_entropy

__all__ = [
    "dequantize",
    "quantize",
    "quantize_feedback_",
    "reduce_quantized",
    "sum_quantized",
]


def _payload(
    backend: NumPy | CuPy,
    out: Array | None,
    table: wire.IntArray,
    form: BlockFormat,
    *inputs: View,
) -> tuple[Array, View]:
    """Memory for the payload of a segment table: the caller's, or new."""
    if out is None:
        out = backend.module.empty(blocks.table_bytes(table, form), dtype=np.uint8)
    return out, result_view(backend, out, blocks.has_gaps(table, form), *inputs)


def quantize(
    x: Array,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Codes of ``x``, and a scale a block; see :func:`pydist.ops.quantize`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws.
        rank: This rank.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_no_out(codec, out)
    step, step_at = step_of(step)
    form, options = format_of(codec), EncodeOptions(zero_bit, seed, rank, phase, step)
    backend = backend_of(("x", x), ("flags", flags), ("out", out), ("step", step_at))
    x = contiguous(backend, x)
    view = backend.view("x", x)
    table = block_kernels.check_table(kernels.as_table(segments), view.size, "x", form)
    out, out_view = _payload(backend, out, table, form, view)
    block_kernels.quantize(
        backend.target(threads), view, out_view, form, options,
        flags=flags_view(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    return elias_arrays.coded(out, codec, view.size, segments, threads)


def quantize_feedback_(
    x: Array,
    residual: Array,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Quantizes ``x + residual``, keeps what was lost; see :func:`pydist.ops.quantize_feedback_`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        residual: float32 or bfloat16, as many elements; updated in place.
        codec: A scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws.
        rank: This rank.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_no_out(codec, out)
    step, step_at = step_of(step)
    form, options = format_of(codec), EncodeOptions(zero_bit, seed, rank, phase, step)
    backend = backend_of(
        ("x", x), ("residual", residual), ("flags", flags), ("out", out), ("step", step_at)
    )
    x = contiguous(backend, x)
    dense, write_back = in_place(backend, "residual", residual)
    if out is not None and dense is not residual and np.may_share_memory(out, residual):
        raise ValueError("out and residual overlap in memory")
    view, kept = backend.view("x", x), backend.view("residual", dense)
    table = block_kernels.check_table(kernels.as_table(segments), view.size, "x", form)
    out, out_view = _payload(backend, out, table, form, view, kept)
    block_kernels.quantize_feedback(
        backend.target(threads), view, kept, kept, out_view, form, options,
        flags=flags_view(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    write_back()
    return elias_arrays.coded(out, codec, view.size, segments, threads)


def sum_quantized(
    payloads: Array,
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: Any = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The sum of what all ranks' payloads decode to; see :func:`pydist.ops.sum_quantized`.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: What they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec has no blocks.
        ValueError: The payloads or ``out`` do not fit ``n``.
    """
    form = format_of(codec)
    check_fixed(codec)
    checks.check_n(n)
    backend = backend_of(("payloads", payloads), ("out", out))
    out = values_of(backend, n, dtype, out)
    payloads = contiguous(backend, payloads)
    view = result_view(backend, out)
    checks.check_size(view, n, "n")
    block_kernels.dequantize(
        backend.target(threads), backend.view("payloads", payloads), view, form,
        mean=mean, segments=kernels.as_table(segments),
    )  # fmt: skip
    return out


def dequantize(
    payload: Array,
    codec: BlockCodec,
    n: int,
    *,
    dtype: Any = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """What a payload decodes to; see :func:`pydist.ops.dequantize`.

    Args:
        payload: uint8, as of :func:`quantize`.
        codec: What it was encoded with.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec has no blocks.
        ValueError: The payload or ``out`` does not fit ``n``.
    """
    backend_of(("payload", payload), ("out", out))
    checks.check_one_payload(tuple(payload.shape))
    payload = elias_arrays.fixed(payload, codec, n, segments, threads)
    codec = without_entropy(codec)
    return sum_quantized(
        payload[None], codec, n, dtype=dtype, segments=segments, out=out, threads=threads
    )


def reduce_quantized(
    payloads: Array,
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 1,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Adds what all ranks sent, and quantizes it; see :func:`pydist.ops.reduce_quantized`.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: What they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws.
        rank: The owner's rank.
        phase: 1, so that an owner does not draw as it did for its own contribution.
        step: Step of the draws, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_fixed(codec)
    step, step_at = step_of(step)
    form, options = format_of(codec), EncodeOptions(zero_bit, seed, rank, phase, step)
    checks.check_n(n)
    backend = backend_of(("payloads", payloads), ("flags", flags), ("out", out), ("step", step_at))
    payloads = contiguous(backend, payloads)
    view = backend.view("payloads", payloads)
    checks.check_payloads(view)
    table = block_kernels.check_table(kernels.as_table(segments), n, "n", form)
    out, out_view = _payload(backend, out, table, form, view)
    block_kernels.reduce_quantized(
        backend.target(threads), view, n, out_view, form, options,
        mean=mean, flags=flags_view(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    return out
