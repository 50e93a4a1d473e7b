"""Elias codes: they wait for a length or a verdict of the device, so no graph captures them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pydist import ops
from pydist.bench.case import BITS, Case, Maker
from pydist.bench.cases.blocks import codec_name, payload_bytes
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers
from pydist.codecs import QSGD

CODECS = (QSGD(2, 512, "l2"), QSGD(4, 512, "l2"), QSGD(4, 512), QSGD(8, 512, "l2"))


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for codec in CODECS:
        yield from codec_cases(maker, codec)


def _coded_bytes(maker: Maker, codec: QSGD) -> float:
    """Bytes of the Elias codes of normal numbers, from a sample on the CPU."""
    numel = min(maker.numel, 2**18)
    fixed = ops.quantize(torch.randn(numel, dtype=torch.float32, device="cpu"), codec)
    return ops.elias_encode(fixed, codec, numel).numel() * maker.numel / numel


def codec_cases(maker: Maker, codec: QSGD) -> Iterator[Case]:
    """Codes of normal numbers as Elias streams, and back; what is read and written is codes alone.

    Beside each stands what it is added to: quantizing, or dequantizing.
    """
    numel = maker.numel
    size = payload_bytes(maker, codec) + _coded_bytes(maker, codec)
    name = f"{codec_name(codec)}, {codec.norm} norm"

    def make() -> Buffers:
        x = maker.normal(torch.float32)
        payload = ops.quantize(x, codec)
        return Buffers(
            x=x, out=torch.zeros_like(x), payload=payload, room=torch.zeros_like(payload),
            coded=ops.elias_encode(payload, codec, numel),
        )  # fmt: skip

    def quantize(s: Buffers) -> None:
        ops.quantize(s.x, codec, out=s.room)

    def dequantize(s: Buffers) -> None:
        ops.dequantize(s.payload, codec, numel, out=s.out)

    yield Case(
        "elias_encode", name, BITS, numel, size, make=make, reads_back=True,
        run=lambda s: ops.elias_encode(s.payload, codec, numel),
        rivals=[Rival("pydist, quantize float32", quantize)],
    )  # fmt: skip
    yield Case(
        "elias_decode", name, BITS, numel, size, make=make, reads_back=True,
        run=lambda s: ops.elias_decode(s.coded, codec, numel),
        rivals=[Rival("pydist, dequantize to float32", dequantize)],
    )  # fmt: skip
