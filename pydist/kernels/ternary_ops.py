"""The ternary kernels as torch operators; people call them in :mod:`pydist.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.kernels import ternary_operators as _operators  # noqa: F401  (registers torch.ops.pydist)
from pydist.kernels.block_ops import step_options
from pydist.kernels.ternary_kernels import TernaryCodec, clip_of

__all__ = [
    "ternary_pack",
    "ternary_scale",
    "ternary_sum",
    "ternary_unpack",
    "ternary_unpack_sums",
]


def ternary_scale(
    x: Tensor,
    codec: TernaryCodec,
    *,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The scaler of every segment: its largest magnitude, after clipping.

    ``clip`` deviations is the limit, the deviation being the root of the mean square of the
    segment. A segment with a NaN or an infinity has the scaler NaN; scalers below 2**-110 are 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``Ternary``.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with ``block=160``); default one
            segment.
        out: float32 [k]; receives the scalers, and is returned.

    Returns:
        float32 [k], one a segment. What all ranks share is the largest over ranks.

    Raises:
        TypeError: A dtype is not supported, or the codec is not ternary.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {"clip": clip_of(codec), "flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.ternary_scale(x, **options)
    torch.ops.pydist.ternary_scale_out(x, **options, out=out)
    return out


def ternary_pack(
    x: Tensor,
    scalers: Tensor,
    *,
    shared: Tensor | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | Tensor = 0,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rounds values at random to 0 or ± the shared scaler, and packs five into a byte.

    An element is ± the scaler with probability ``min(|x|, own) / shared`` (to 2**-16), where own
    is this rank's scaler. The draw is a function of (seed, rank, step, parameter, element). What
    is not finite becomes 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        scalers: float32 [k], this rank's own (:func:`ternary_scale`); magnitudes are held to them.
        shared: float32 [k], the largest over all ranks; default ``scalers``.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws, or a tensor int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments` with ``block=160``); default one
            segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload: 32 bytes for every 160 elements.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {
        "shared": shared, "seed": seed, "rank": rank, **step_options(step), "flags": flags,
        "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.ternary_pack(x, scalers, **options)
    torch.ops.pydist.ternary_pack_out(x, scalers, **options, out=out)
    return out


def ternary_sum(
    payloads: Tensor,
    n: int,
    *,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The exact sums of all ranks' trits, ``ceil(log2(2 * ranks + 1))`` bits each.

    Args:
        payloads: uint8 [ranks, bytes], packed with one shared scaler.
        n: Elements.
        flags: int32[1]; on CUDA 4 is OR-ed in where a byte is malformed.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: Receives the sums, and is returned.

    Returns:
        uint8 bit planes of whole units of 160 elements.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: The payloads do not fit ``n``, or, on the CPU, a byte of them is above 242.
    """
    options = {"flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.ternary_sum(payloads, n, **options)
    torch.ops.pydist.ternary_sum_out(payloads, n, **options, out=out)
    return out


def ternary_unpack(
    payloads: Tensor,
    scalers: Tensor,
    n: int,
    *,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The values of a payload, or the sum of those of all ranks.

    An element is ``scaler * (sum / divisor)``, where the divisor is the number of ranks for a mean
    and 1 otherwise.

    Args:
        payloads: uint8 [bytes], or [ranks, bytes] packed with one shared scaler.
        scalers: float32 [k], the shared ones.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite in float32, and on CUDA 4 where a
            byte is malformed.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The payloads or ``out`` do not fit ``n``, or, on the CPU, a byte of them is
            above 242.
    """
    if payloads.dim() == 1:
        payloads = payloads.unsqueeze(0)
    options = {"mean": mean, "flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.ternary_unpack(payloads, scalers, n, **options, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.ternary_unpack_out(payloads, scalers, n, **options, out=out)
    return out


def ternary_unpack_sums(
    sums: Tensor,
    scalers: Tensor,
    n: int,
    *,
    ranks: int,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The values of sums, as :func:`ternary_unpack` has them of the payloads.

    Args:
        sums: uint8, as of :func:`ternary_sum`.
        scalers: float32 [k], the shared ones.
        n: Elements.
        ranks: How many ranks were summed.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite in float32, and on CUDA 4 where a
            sum is malformed.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The sums or ``out`` do not fit ``n``, or, on the CPU, one is beyond ± ``ranks``.
    """
    options = {"ranks": ranks, "mean": mean, "flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.ternary_unpack_sums(sums, scalers, n, **options, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.ternary_unpack_sums_out(sums, scalers, n, **options, out=out)
    return out
