"""The ternary kernels on arrays; people call them in :mod:`pydist.arrays`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pydist.formats import ternary
from pydist.formats.wire import IntArray
from pydist.kernels import checks, ternary_kernels
from pydist.kernels import signs as kernels
from pydist.kernels.array_backends import (
    Array,
    CuPy,
    NumPy,
    backend_of,
    contiguous,
    flags_view,
    result_view,
    step_of,
    values_of,
)
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.checks import View
from pydist.kernels.ternary_kernels import TernaryCodec, clip_of

__all__ = [
    "ternary_pack",
    "ternary_scale",
    "ternary_sum",
    "ternary_unpack",
    "ternary_unpack_sums",
]


def _room(
    backend: NumPy | CuPy, out: Array | None, size: int, table: IntArray, *inputs: View
) -> tuple[Array, View]:
    """Memory for ``size`` bytes of units of a segment table: the caller's, or new."""
    if out is None:
        out = backend.module.empty(size, dtype=np.uint8)
    return out, result_view(backend, out, ternary.has_gaps(table), *inputs)


def _decode(
    kernel: Callable[..., None],
    name: str,
    data: Array,
    scalers: Array,
    n: int,
    dtype: Any,
    flags: Array | None,
    segments: Any,
    out: Array | None,
    threads: int | None,
    **options: Any,
) -> Array:
    """What both decoders do with payloads, or sums."""
    checks.check_n(n)
    backend = backend_of((name, data), ("scalers", scalers), ("flags", flags), ("out", out))
    out = values_of(backend, n, dtype, out)
    data, scalers = contiguous(backend, data), contiguous(backend, scalers)
    view = result_view(backend, out)
    checks.check_size(view, n, "n")
    kernel(
        backend.target(threads), backend.view(name, data), backend.view("scalers", scalers), view,
        flags=flags_view(backend, flags), segments=kernels.as_table(segments), **options,
    )  # fmt: skip
    return out


def ternary_scale(
    x: Array,
    codec: TernaryCodec,
    *,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The scaler of every segment; see :func:`pydist.ops.ternary_scale`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``Ternary``.
        flags: int32[1]; 1 is OR-ed in where ``x`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: float32 [k]; receives the scalers, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        float32 [k] of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is not ternary.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    clip = clip_of(codec)
    backend = backend_of(("x", x), ("flags", flags), ("out", out))
    x = contiguous(backend, x)
    view = backend.view("x", x)
    table = ternary_kernels.check_table(kernels.as_table(segments), view.size, "x")
    if out is None:
        out = backend.module.empty(len(table), dtype=np.float32)
    size = ternary.scratch_bytes(ternary.rows_of(table))
    scratch = backend.module.empty(size, dtype=np.uint8)
    ternary_kernels.scale(
        backend.target(threads), view, result_view(backend, out),
        backend.view("scratch", scratch), clip,
        flags=flags_view(backend, flags), segments=table,
    )  # fmt: skip
    return out


def ternary_pack(
    x: Array,
    scalers: Array,
    *,
    shared: Array | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Values at random as 0 or ± the scaler; see :func:`pydist.ops.ternary_pack`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        scalers: float32 [k], this rank's own.
        shared: float32 [k], the largest over all ranks; default ``scalers``.
        seed: Seed of the draws.
        rank: This rank.
        step: Step of the draws, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = step_of(step)
    backend = backend_of(
        ("x", x), ("scalers", scalers), ("shared", shared), ("flags", flags), ("out", out),
        ("step", step_at),
    )  # fmt: skip
    x, scalers = contiguous(backend, x), contiguous(backend, scalers)
    shared = None if shared is None else contiguous(backend, shared)
    view = backend.view("x", x)
    table = ternary_kernels.check_table(kernels.as_table(segments), view.size, "x")
    out, out_view = _room(backend, out, ternary.table_bytes(table), table, view)
    ternary_kernels.pack(
        backend.target(threads), view, backend.view("scalers", scalers),
        None if shared is None else backend.view("shared", shared), out_view,
        EncodeOptions(seed=seed, rank=rank, step=step),
        flags=flags_view(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    return out


def ternary_sum(
    payloads: Array,
    n: int,
    *,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The exact sums of all ranks' trits; see :func:`pydist.ops.ternary_sum`.

    Args:
        payloads: uint8 [ranks, bytes], packed with one shared scaler.
        n: Elements.
        flags: int32[1]; on CUDA 4 is OR-ed in where a byte is malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: Receives the sums, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 bit planes of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The payloads do not fit ``n``, or, on the CPU, a byte of them is above 242.
    """
    checks.check_n(n)
    backend = backend_of(("payloads", payloads), ("flags", flags), ("out", out))
    payloads = contiguous(backend, payloads)
    view = backend.view("payloads", payloads)
    ranks, _ = checks.check_payloads(view)
    table = ternary_kernels.check_table(kernels.as_table(segments), n, "n")
    size = ternary.table_units(table) * ternary.sum_unit_bytes(ranks)
    out, out_view = _room(backend, out, size, table, view)
    ternary_kernels.sum_payloads(
        backend.target(threads), view, n, out_view,
        flags=flags_view(backend, flags), segments=table,
    )  # fmt: skip
    return out


def ternary_unpack(
    payloads: Array,
    scalers: Array,
    n: int,
    *,
    mean: bool = False,
    dtype: Any = None,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The sum of what payloads hold; see :func:`pydist.ops.ternary_unpack`.

    Args:
        payloads: uint8 [bytes], or [ranks, bytes].
        scalers: float32 [k], the shared ones.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite, on CUDA 4 where a byte is
            malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The payloads or ``out`` do not fit ``n``, or, on the CPU, a byte is above 242.
    """
    backend_of(("payloads", payloads))
    payloads = payloads[None] if payloads.ndim == 1 else payloads
    kernel = ternary_kernels.unpack
    return _decode(
        kernel, "payloads", payloads, scalers, n, dtype, flags, segments, out, threads, mean=mean
    )


def ternary_unpack_sums(
    sums: Array,
    scalers: Array,
    n: int,
    *,
    ranks: int,
    mean: bool = False,
    dtype: Any = None,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The values of sums; see :func:`pydist.ops.ternary_unpack_sums`.

    Args:
        sums: uint8, as of :func:`ternary_sum`.
        scalers: float32 [k], the shared ones.
        n: Elements.
        ranks: How many ranks were summed.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite, on CUDA 4 where a sum is
            malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The sums or ``out`` do not fit ``n``, or, on the CPU, one is beyond ± ``ranks``.
    """
    kernel, options = ternary_kernels.unpack_sums, {"ranks": ranks, "mean": mean}
    return _decode(
        kernel, "sums", sums, scalers, n, dtype, flags, segments, out, threads, **options
    )
