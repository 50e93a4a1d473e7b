"""The kernels of top-k blocks on arrays; people call them in :mod:`pydist.arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydist.formats import blocks
from pydist.formats.topk import TopKFormat, table_bytes
from pydist.kernels import block_kernels, checks, topk_kernels
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
from pydist.kernels.checks import View
from pydist.kernels.topk_kernels import TopKCodec, format_of

__all__ = ["topk_clear_", "topk_feedback_", "topk_reduce", "topk_scatter", "topk_select"]


def _payload(
    backend: NumPy | CuPy,
    out: Array | None,
    n: int,
    name: str,
    segments: Any,
    form: TopKFormat,
    *inputs: View,
) -> tuple[Array, View]:
    """Memory for the payload of ``n`` elements: the caller's, or new."""
    table = block_kernels.check_table(kernels.as_table(segments), n, name, form)
    if out is None:
        out = backend.module.empty(table_bytes(table, form), dtype=np.uint8)
    return out, result_view(backend, out, blocks.has_gaps(table, form), *inputs)


def _step(backend: NumPy | CuPy, step: int, step_at: Array | None) -> int | View:
    return step if step_at is None else backend.view("step", step_at)


def topk_select(
    x: Array,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The largest entries of every block of ``x``; see :func:`pydist.ops.topk_select`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``TopK``.
        seed: Seed of the order of ties.
        step: Step of the order of ties, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = step_of(step)
    form = format_of(codec)
    backend = backend_of(("x", x), ("flags", flags), ("out", out), ("step", step_at))
    x = contiguous(backend, x)
    view = backend.view("x", x)
    out, out_view = _payload(backend, out, view.size, "x", segments, form, view)
    topk_kernels.select(
        backend.target(threads), view, out_view, form,
        seed=seed, step=_step(backend, step, step_at), flags=flags_view(backend, flags),
        segments=kernels.as_table(segments),
    )  # fmt: skip
    return out


def topk_feedback_(
    x: Array,
    residual: Array,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Selects from ``x + residual``, keeps the rest; see :func:`pydist.ops.topk_feedback_`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        residual: float32 or bfloat16, as many elements; updated in place.
        codec: A ``TopK``.
        seed: Seed of the order of ties.
        step: Step of the order of ties, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = step_of(step)
    form = format_of(codec)
    backend = backend_of(
        ("x", x), ("residual", residual), ("flags", flags), ("out", out), ("step", step_at)
    )
    x = contiguous(backend, x)
    dense, write_back = in_place(backend, "residual", residual)
    if out is not None and dense is not residual and np.may_share_memory(out, residual):
        raise ValueError("out and residual overlap in memory")
    view, kept = backend.view("x", x), backend.view("residual", dense)
    out, out_view = _payload(backend, out, view.size, "x", segments, form, view, kept)
    topk_kernels.feedback(
        backend.target(threads), view, kept, kept, out_view, form,
        seed=seed, step=_step(backend, step, step_at), flags=flags_view(backend, flags),
        segments=kernels.as_table(segments),
    )  # fmt: skip
    write_back()
    return out


def topk_scatter(
    payloads: Array,
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: Any = None,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The sum of all ranks' entries; see :func:`pydist.ops.topk_scatter`.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: The ``TopK`` they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; on CUDA 5 is OR-ed in where a payload is malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is no ``TopK``.
        ValueError: The payloads or ``out`` do not fit ``n``; on the CPU, a payload is malformed.
    """
    form = format_of(codec)
    checks.check_n(n)
    backend = backend_of(("payloads", payloads), ("flags", flags), ("out", out))
    out = values_of(backend, n, dtype, out)
    payloads = contiguous(backend, payloads)
    view = result_view(backend, out)
    checks.check_size(view, n, "n")
    topk_kernels.scatter(
        backend.target(threads), backend.view("payloads", payloads), view, form,
        mean=mean, flags=flags_view(backend, flags), segments=kernels.as_table(segments),
    )  # fmt: skip
    return out


def topk_reduce(
    payloads: Array,
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    seed: int = 0,
    step: int | Array = 0,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Adds the entries of all ranks, selects again; see :func:`pydist.ops.topk_reduce`.

    Args:
        payloads: uint8 [ranks, bytes].
        codec: The ``TopK`` they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        seed: Seed of the order of ties.
        step: Step of the order of ties, or an array int64[1] that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite, on CUDA also 4 where a
            payload is malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; on the CPU, a payload is malformed.
    """
    step, step_at = step_of(step)
    form = format_of(codec)
    checks.check_n(n)
    backend = backend_of(("payloads", payloads), ("flags", flags), ("out", out), ("step", step_at))
    payloads = contiguous(backend, payloads)
    view = backend.view("payloads", payloads)
    checks.check_payloads(view)
    out, out_view = _payload(backend, out, n, "n", segments, form, view)
    topk_kernels.reduce(
        backend.target(threads), view, n, out_view, form,
        mean=mean, seed=seed, step=_step(backend, step, step_at),
        flags=flags_view(backend, flags), segments=kernels.as_table(segments),
    )  # fmt: skip
    return out


def topk_clear_(
    x: Array,
    payload: Array,
    codec: TopKCodec,
    *,
    flags: Array | None = None,
    segments: Any = None,
    threads: int | None = None,
) -> Array:
    """Zeros in ``x`` where a payload has entries; see :func:`pydist.ops.topk_clear_`.

    Args:
        x: float32, float16 or bfloat16, any shape; changed in place.
        payload: uint8, as of :func:`topk_select` or :func:`topk_feedback_`.
        codec: The ``TopK`` it was encoded with.
        flags: int32[1]; on CUDA 4 is OR-ed in where the payload is malformed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        threads: CPU threads; default all cores.

    Returns:
        ``x``.

    Raises:
        TypeError: An array is of another kind or dtype, or the codec is no ``TopK``.
        ValueError: The payload does not fit ``x``; on the CPU, it is malformed.
    """
    form = format_of(codec)
    backend = backend_of(("x", x), ("payload", payload), ("flags", flags))
    checks.check_one_payload(tuple(payload.shape))
    dense, write_back = in_place(backend, "x", x)
    payloads = contiguous(backend, payload)[None]
    topk_kernels.clear(
        backend.target(threads), backend.view("x", dense), backend.view("payload", payloads), form,
        flags=flags_view(backend, flags), segments=kernels.as_table(segments),
    )  # fmt: skip
    write_back()
    return x
