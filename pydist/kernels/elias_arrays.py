"""Elias-coded payloads on arrays; people call them in :mod:`pydist.arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydist.formats import blocks, elias
from pydist.kernels import elias_kernels
from pydist.kernels import signs as kernels
from pydist.kernels.array_backends import Array, backend_of, contiguous, result_view
from pydist.kernels.block_kernels import BlockCodec
from pydist.kernels.elias_kernels import entropy_of, levels_of

__all__ = ["elias_decode", "elias_encode"]


def elias_encode(
    payload: Array,
    codec: BlockCodec,
    n: int,
    *,
    segments: Any = None,
    threads: int | None = None,
) -> Array:
    """Makes a payload of levels shorter; see :func:`pydist.ops.elias_encode`.

    Args:
        payload: uint8, as of :func:`quantize` without entropy.
        codec: What it was encoded with: a ``QSGD`` or a ``BlockInt``.
        n: Elements.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of variable length, of the same kind of array.

    Raises:
        TypeError: ``payload`` is of another kind or dtype, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or ``n`` is too large for 32-bit places.
    """
    form = levels_of(codec)
    backend = backend_of(("payload", payload))
    table = elias_kernels.table_of(kernels.as_table(segments), n, form)
    payload = contiguous(backend, payload)
    room = backend.module.empty(elias.longest_bytes(table, form), dtype=np.uint8)
    result = backend.module.zeros(1, dtype=np.int64)
    elias_kernels.encode(
        backend.target(threads), backend.view("payload", payload), backend.view("out", room),
        backend.view("result", result), form, table,
    )  # fmt: skip
    return room[: elias.payload_bytes(table, form, int(result[0]))].copy()


def elias_decode(
    payload: Array,
    codec: BlockCodec,
    n: int,
    *,
    segments: Any = None,
    threads: int | None = None,
) -> Array:
    """The inverse of :func:`elias_encode`; see :func:`pydist.ops.elias_decode`.

    Args:
        payload: uint8, as of :func:`elias_encode`; any bytes.
        codec: What it was encoded with.
        n: Elements.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of fixed length, of the same kind of array.

    Raises:
        TypeError: ``payload`` is of another kind or dtype, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or is malformed; names block and reason.
    """
    form = levels_of(codec)
    backend = backend_of(("payload", payload))
    table = elias_kernels.table_of(kernels.as_table(segments), n, form)
    payload = contiguous(backend, payload)
    out = backend.module.empty(blocks.table_bytes(table, form), dtype=np.uint8)
    result = backend.module.zeros(1, dtype=np.int64)
    result[...] = elias.NO_FAULT
    elias_kernels.decode(
        backend.target(threads), backend.view("payload", payload),
        result_view(backend, out, blocks.has_gaps(table, form)), backend.view("result", result),
        form, table,
    )  # fmt: skip
    elias.check_fault(int(result[0]))
    return out


def coded(payload: Array, codec: BlockCodec, n: int, segments: Any, threads: int | None) -> Array:
    """A fixed payload as the codec sends it."""
    if entropy_of(codec) is None:
        return payload
    return elias_encode(payload, codec, n, segments=segments, threads=threads)


def fixed(payload: Array, codec: BlockCodec, n: int, segments: Any, threads: int | None) -> Array:
    """The fixed payload behind what the codec sent."""
    if entropy_of(codec) is None:
        return payload
    return elias_decode(payload, codec, n, segments=segments, threads=threads)
