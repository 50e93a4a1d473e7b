"""The kernels of top-k blocks as torch operators; people call them in :mod:`pydist.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydist.kernels import topk_operators as _operators  # noqa: F401  (registers torch.ops.pydist)
from pydist.kernels.block_ops import step_options
from pydist.kernels.topk_kernels import TopKCodec, format_of

__all__ = ["topk_clear_", "topk_feedback_", "topk_reduce", "topk_scatter", "topk_select"]


def _format(codec: TopKCodec) -> dict[str, Any]:
    form = format_of(codec)
    return {"density": form.density, "block": form.block, "values": form.values}


def topk_select(
    x: Tensor,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The entries of largest magnitude of every block of ``x``, exactly, and where they are.

    Equal magnitudes are taken from a place on that depends on (seed, step, parameter, block), so
    that no index is preferred. A block that holds a NaN or an infinity sends NaN.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``TopK``.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload: of every block the values, then the positions.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {
        **_format(codec), "seed": seed, **step_options(step), "flags": flags, "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.topk_select(x, **options)
    torch.ops.pydist.topk_select_out(x, **options, out=out)
    return out


def topk_feedback_(
    x: Tensor,
    residual: Tensor,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Error feedback: selects from ``p = x + residual`` and keeps what was not sent.

    The new residual is ``p``, and where an entry was sent ``p`` minus its value, each rounded on
    its own. A block that holds a NaN or an infinity keeps its residuals.

    Args:
        x: float32, float16 or bfloat16, any shape.
        residual: float32 or bfloat16, as many elements; updated in place.
        codec: A ``TopK``.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload, as of :func:`topk_select`.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {
        **_format(codec), "seed": seed, **step_options(step), "flags": flags, "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.topk_feedback_(x, residual, **options)
    torch.ops.pydist.topk_feedback_out_(x, residual, **options, out=out)
    return out


def topk_scatter(
    payloads: Tensor,
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The entries of all ranks' payloads, added to zeros in rank order in float32.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: The ``TopK`` they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; on CUDA 5 is OR-ed in where a payload is malformed, whose block is NaN.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec is no ``TopK``.
        ValueError: The payloads or ``out`` do not fit ``n``; on the CPU, a payload is malformed.
    """
    options = {**_format(codec), "mean": mean, "flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.topk_scatter(payloads, n, **options, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.topk_scatter_out(payloads, n, **options, out=out)
    return out


def topk_reduce(
    payloads: Tensor,
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    seed: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds the entries of all ranks, as :func:`topk_scatter`, and selects the largest again.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: The ``TopK`` they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite, on CUDA also 4 where a
            payload is malformed, whose block becomes NaN.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: Receives the payload, and is returned.

    Returns:
        uint8 [bytes] payload.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; on the CPU, a payload is malformed.
    """
    options = {
        **_format(codec), "mean": mean, "seed": seed, **step_options(step), "flags": flags,
        "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.topk_reduce(payloads, n, **options)
    torch.ops.pydist.topk_reduce_out(payloads, n, **options, out=out)
    return out


def topk_clear_(
    x: Tensor,
    payload: Tensor,
    codec: TopKCodec,
    *,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Zeros in ``x`` where a payload has entries: the factor masking of deep gradient compression.

    Args:
        x: float32, float16 or bfloat16, any shape; such as a momentum. Changed in place.
        payload: uint8, as of :func:`topk_select` or :func:`topk_feedback_`.
        codec: The ``TopK`` it was encoded with.
        flags: int32[1]; on CUDA 4 is OR-ed in where the payload is malformed, whose block stays.
        segments: int64 [k, 4] on the CPU; default one segment.

    Returns:
        ``x``.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: The payload does not fit ``x``; on the CPU, it is malformed.
    """
    torch.ops.pydist.topk_clear_(x, payload, **_format(codec), flags=flags, segments=segments)
    return x
