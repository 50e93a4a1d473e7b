"""Elias-coded payloads as torch operators; people call them in :mod:`pydist.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.kernels import elias_operators as _operators  # noqa: F401  (registers torch.ops.pydist)
from pydist.kernels.block_kernels import BlockCodec
from pydist.kernels.elias_kernels import entropy_of, levels_of

__all__ = ["elias_decode", "elias_encode"]


def elias_encode(
    payload: Tensor, codec: BlockCodec, n: int, *, segments: Tensor | None = None
) -> Tensor:
    """Makes a payload of levels shorter, and loses nothing: the paper's Elias coding.

    Each block becomes the shortest of three streams (QSGD, arXiv 1610.02132, section 3): gaps and
    levels of what is not zero, all levels, or the codes as they are. On CUDA this waits for the
    device once, to learn the length.

    Args:
        payload: uint8, as of :func:`quantize` without entropy.
        codec: What it was encoded with: a ``QSGD`` or a ``BlockInt``.
        n: Elements.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.

    Returns:
        uint8 payload of variable length, a multiple of 4.

    Raises:
        TypeError: ``payload`` is not uint8, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or ``n`` is too large for 32-bit places.
    """
    form = levels_of(codec)
    return torch.ops.pydist.elias_encode(
        payload, n, bits=form.bits, block=form.block, segments=segments
    )


def elias_decode(
    payload: Tensor, codec: BlockCodec, n: int, *, segments: Tensor | None = None
) -> Tensor:
    """The inverse of :func:`elias_encode`.

    On CUDA this waits for the device once, to learn whether the payload is well-formed.

    Args:
        payload: uint8, as of :func:`elias_encode`; any bytes.
        codec: What it was encoded with.
        n: Elements.
        segments: int64 [k, 4] on the CPU; default one segment of ``n``.

    Returns:
        uint8 payload, as of :func:`quantize` without entropy.

    Raises:
        TypeError: ``payload`` is not uint8, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or is malformed; names block and reason.
    """
    form = levels_of(codec)
    return torch.ops.pydist.elias_decode(
        payload, n, bits=form.bits, block=form.block, segments=segments
    )


def coded(payload: Tensor, codec: BlockCodec, n: int, segments: Tensor | None) -> Tensor:
    """A fixed payload as the codec sends it."""
    if entropy_of(codec) is None:
        return payload
    return elias_encode(payload, codec, n, segments=segments)


def fixed(payload: Tensor, codec: BlockCodec, n: int, segments: Tensor | None) -> Tensor:
    """The fixed payload behind what the codec sent."""
    if entropy_of(codec) is None:
        return payload
    return elias_decode(payload, codec, n, segments=segments)
