"""The kernels of block formats as torch operators; people call them in :mod:`pydist.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydist.kernels import block_operators as _operators  # noqa: F401  (registers torch.ops.pydist)
from pydist.kernels import checks, elias_ops
from pydist.kernels.block_kernels import BlockCodec, format_of
from pydist.kernels.elias_kernels import check_fixed, check_no_out, without_entropy

__all__ = [
    "dequantize",
    "quantize",
    "quantize_feedback_",
    "reduce_quantized",
    "sum_quantized",
]


def _format(codec: BlockCodec) -> dict[str, Any]:
    form = format_of(codec)
    return {
        "scheme": form.scheme, "bits": form.bits, "block": form.block, "norm": form.norm,
        "stochastic": form.stochastic,
    }  # fmt: skip


def step_options(step: int | Tensor) -> dict[str, int | Tensor]:
    """A step as operators take it: a number, or the tensor that holds it."""
    return {"step_tensor": step} if isinstance(step, Tensor) else {"step": step}


def quantize(
    x: Tensor,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Codes of ``x``, and a scale a block.

    A block that holds a NaN or an infinity decodes to NaN. Stochastic rounding is a function of
    (seed, rank, phase, step, parameter, element).

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A scaled ``Sign``, a ``QSGD``, a ``BlockInt`` or a ``BlockFloat``.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced.
        step: Step of the draws, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload: the codes of all blocks, then their scales (float32); with
        ``entropy="elias"`` of variable length (:func:`elias_encode`), and ``out`` must be ``None``.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_no_out(codec, out)
    options = {
        **_format(codec), "zero_bit": zero_bit, "seed": seed, "rank": rank, "phase": phase,
        **step_options(step), "flags": flags, "segments": segments,
    }  # fmt: skip
    if out is None:
        payload = torch.ops.pydist.quantize(x, **options)
        return elias_ops.coded(payload, codec, x.numel(), segments)
    torch.ops.pydist.quantize_out(x, **options, out=out)
    return out


def quantize_feedback_(
    x: Tensor,
    residual: Tensor,
    codec: BlockCodec,
    *,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
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
        step: Step of the draws, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload, as of :func:`quantize`.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_no_out(codec, out)
    options = {
        **_format(codec), "zero_bit": zero_bit, "seed": seed, "rank": rank, "phase": phase,
        **step_options(step), "flags": flags, "segments": segments,
    }  # fmt: skip
    if out is None:
        payload = torch.ops.pydist.quantize_feedback_(x, residual, **options)
        return elias_ops.coded(payload, codec, x.numel(), segments)
    torch.ops.pydist.quantize_feedback_out_(x, residual, **options, out=out)
    return out


def sum_quantized(
    payloads: Tensor,
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the payloads of all ranks decode to, added in rank order in float32.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: What they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec has no blocks.
        ValueError: The payloads or ``out`` do not fit ``n``.
    """
    check_fixed(codec)
    options = {**_format(codec), "mean": mean, "segments": segments}
    if out is None:
        return torch.ops.pydist.sum_quantized(payloads, n, **options, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.sum_quantized_out(payloads, n, **options, out=out)
    return out


def dequantize(
    payload: Tensor,
    codec: BlockCodec,
    n: int,
    *,
    dtype: torch.dtype | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What a payload decodes to.

    Args:
        payload: uint8, as of :func:`quantize`.
        codec: What it was encoded with.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec has no blocks.
        ValueError: The payload or ``out`` does not fit ``n``.
    """
    checks.check_one_payload(tuple(payload.shape))
    payload, codec = elias_ops.fixed(payload, codec, n, segments), without_entropy(codec)
    return sum_quantized(payload.unsqueeze(0), codec, n, dtype=dtype, segments=segments, out=out)


def reduce_quantized(
    payloads: Tensor,
    codec: BlockCodec,
    n: int,
    *,
    mean: bool = False,
    zero_bit: int = 1,
    seed: int = 0,
    rank: int = 0,
    phase: int = 1,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decodes the payloads of all ranks, adds them in rank order, and quantizes the result again.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: What they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        zero_bit: Bit of a zero; for signs.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: The owner's rank.
        phase: 1, so that an owner does not draw as it did for its own contribution.
        step: Step of the draws, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: Receives the payload, and is returned.

    Returns:
        uint8 [bytes] payload.

    Raises:
        TypeError: A dtype is not supported, or the codec has no blocks.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    check_fixed(codec)
    options = {
        **_format(codec), "mean": mean, "zero_bit": zero_bit, "seed": seed, "rank": rank,
        "phase": phase, **step_options(step), "flags": flags, "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.reduce_quantized(payloads, n, **options)
    torch.ops.pydist.reduce_quantized_out(payloads, n, **options, out=out)
    return out
