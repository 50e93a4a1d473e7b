"""Formats that share a scale among the elements of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydist import _C
from pydist.formats.blocks import BlockFormat
from pydist.kernels import elias
from pydist.kernels.arguments import explained
from pydist.kernels.block_formats import (
    BlockCodec,
    EncodeOptions,
    Placed,
    check_stride,
    decode_args,
    format_of,
)
from pydist.kernels.call import Call
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ArrayInfo,
    check_dtype,
    check_one_payload,
    check_payloads,
    check_state,
)
from pydist.kernels.elias import entropy_coded, fixed_format_of, without_entropy
from pydist.kernels.register import CodecFields, Shape, kernel
from pydist.kernels.signs import DType, Segments

if TYPE_CHECKING:
    from pydist.kernels.register import A

_CODEC = CodecFields(BlockFormat, format_of)
_FIXED = CodecFields(BlockFormat, fixed_format_of)


def _of_x(given: Mapping[str, Any]) -> tuple[Shape, str]:
    form = given["codec"]
    n = None if given["segments"] is not None else form.payload_bytes(given["x"].numel())
    return (n,), "uint8"


def _of_n(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["n"],), "float32"


def _as_one_payload(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["payloads"].shape[1],), "uint8"


def _encode_args(
    call: Call,
    placed: Placed,
    form: BlockFormat,
    out: ArrayInfo,
    step: Any,
    options: tuple[int, int, int, int],
) -> _C.EncodeArgs:
    """Where codes and scales go in ``out``, and the checked options (all but the step)."""
    known, step_at = call.step(step, out)
    size = placed.code_bytes(form)
    native = EncodeOptions(*options, known).native
    return native(form, out.address, out.address + size, size, step_at)


def _decode_args(
    placed: Placed, form: BlockFormat, payloads: ArrayInfo, mean: bool
) -> _C.DecodeArgs:
    ranks, stride = payloads.shape
    scales = payloads.address + placed.code_bytes(form)
    return decode_args(form, payloads.address, scales, stride, ranks, ranks if mean else 1)


@entropy_coded
@kernel(result=_of_x, writes=("flags",), codec=_CODEC)
def quantize(
    x: A,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Codes of ``x``, and a scale per block.

    A block that holds a NaN or an infinity decodes to NaN. Stochastic rounding is a function of
    (seed, rank, phase, step, parameter, element).

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws, or int64[1] on the device of ``x`` that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload: the codes of all blocks, then their scales (float32); with
        ``entropy="elias"`` of variable length (:func:`pydist.ops.elias_encode`), and ``out`` must
        be ``None``.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    form = format_of(codec)
    call = Call("x", x, threads)
    values = call.input("x", x)
    check_dtype(values, FLOAT_NAMES)
    placed = Placed(form, segments, values.size, "x", values)
    payload = call.result(out, "uint8", (placed.payload_bytes(form),), values, gaps=placed.gaps)
    _, raised = call.flags(flags, values, payload)
    args = _encode_args(call, placed, form, payload, step, (zero_bit, seed, rank, phase))
    call.launch("quantize", placed.rows, FLOATS[values.dtype], args, raised, unit=form.block)
    return payload.array


@entropy_coded
@kernel(result=_of_x, writes=("residual", "flags"), codec=_CODEC)
def quantize_feedback_(
    x: A,
    residual: A,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Error feedback in one pass: quantizes ``x + residual`` and keeps what was lost.

    With ``p = x + residual``, the new residual is ``p`` minus what the payload decodes to, each
    rounded on its own. A block that holds a NaN or an infinity keeps its residuals.

    Args:
        x: float32, float16 or bfloat16, any shape.
        residual: float32 or bfloat16, as many elements; updated in place.
        codec: A scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws, or int64[1] on the device of ``x`` that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload, as of :func:`quantize`.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    form = format_of(codec)
    call = Call("x", x, threads)
    values = call.input("x", x)
    if out is not None:
        call.check_apart("out", out, "residual", residual)
    kept = call.update("residual", residual)
    check_state(values, kept, kept)
    placed = Placed(form, segments, values.size, "x", values, kept)
    payload = call.result(
        out, "uint8", (placed.payload_bytes(form),), values, kept, gaps=placed.gaps
    )
    _, raised = call.flags(flags, values, kept, payload)
    args = _encode_args(call, placed, form, payload, step, (zero_bit, seed, rank, phase))
    call.launch(
        "quantize_feedback", placed.rows, FLOATS[values.dtype], FLOATS[kept.dtype], args, raised,
        unit=form.block,
    )  # fmt: skip
    return payload.array


@kernel(result=_of_n, codec=_FIXED)
def sum_quantized(
    payloads: A | Sequence[A],
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: DType = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """What the payloads of all ranks decode to, added in rank order in float32.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        codec: What they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec has no blocks.
        ValueError: The payloads or ``out`` do not fit ``n``.
    """
    form = fixed_format_of(codec)
    call = Call("payloads", payloads, threads)
    source = call.input("payloads", payloads)
    check_payloads(source)
    values = call.values(out, dtype, n, source)
    placed = Placed(form, segments, n, "n", values)
    check_stride(source, placed.payload_bytes(form), n)
    args = _decode_args(placed, form, source, mean)
    call.launch("dequantize", placed.rows, FLOATS[values.dtype], args, unit=form.block)
    return values.array


@explained
def dequantize(
    payload: A,
    codec: BlockCodec,
    n: int,
    *,
    dtype: DType = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """What a payload decodes to.

    Args:
        payload: uint8, as of :func:`quantize`.
        codec: What it was encoded with.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec has no blocks.
        ValueError: The payload or ``out`` does not fit ``n``.
    """
    check_one_payload(tuple(payload.shape))
    if elias.entropy_of(codec):
        payload = elias.elias_decode(payload, codec, n, segments=segments, threads=threads)
    return sum_quantized(
        payload[None], without_entropy(codec), n,
        dtype=dtype, segments=segments, out=out, threads=threads,
    )  # fmt: skip


@kernel(result=_as_one_payload, writes=("flags",), codec=_FIXED)
def reduce_quantized(
    payloads: A | Sequence[A],
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 1,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Decodes the payloads of all ranks, adds them in rank order, and quantizes the result again.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        codec: What they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: The owner's rank.
        phase: 1, so that an owner does not draw as it did for its own contribution.
        step: Step of the draws, or int64[1] on the device of ``payloads`` that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 [bytes] payload.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    form = fixed_format_of(codec)
    call = Call("payloads", payloads, threads)
    source = call.input("payloads", payloads)
    _, size = check_payloads(source)
    placed = Placed(form, segments, n, "n")
    check_stride(source, placed.payload_bytes(form), n)
    payload = call.result(out, "uint8", (size,), source, gaps=placed.gaps)
    _, raised = call.flags(flags, source, payload)
    args = _encode_args(call, placed, form, payload, step, (zero_bit, seed, rank, phase))
    call.launch(
        "reduce_quantized", placed.rows, _decode_args(placed, form, source, mean), args, raised,
        unit=form.block,
    )  # fmt: skip
    return payload.array
