"""Codes of blocks: what a rank sends, what an owner makes of it, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pydist import ops
from pydist.bench import bitsandbytes, rivals
from pydist.bench.case import BITS, Case, Maker
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers
from pydist.codecs import QSGD, BlockInt
from pydist.formats import blocks, wire

Codec = BlockInt | QSGD
CODECS: tuple[Codec, ...] = (
    BlockInt(4, block=512),
    BlockInt(8, block=512),
    BlockInt(4, block=128),
    BlockInt(8, block=128),
    BlockInt(3, block=128),  # codes that cross bytes, and many scales
    QSGD(4, block=512),
)
FEEDBACK_CODECS: tuple[Codec, ...] = (BlockInt(4, block=512), BlockInt(8, block=128))
REDUCED = BlockInt(4, block=512)
RANKS = (2, 8)


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for make in (quantize_case, dequantize_case):
        for codec in CODECS:
            for name in maker.dtypes:
                yield make(maker, name, codec)
    for codec in FEEDBACK_CODECS:
        for name in maker.dtypes:
            yield feedback_case(maker, name, codec)
    for ranks in RANKS:
        for name in maker.dtypes:
            yield sum_case(maker, name, ranks)
        yield reduce_case(maker, ranks)


def codec_name(codec: Codec) -> str:
    """The codec in a row's variant."""
    return f"{type(codec).__name__}({codec.bits}), blocks of {codec.block}"


def payload_bytes(maker: Maker, codec: Codec) -> int:
    """Bytes of a payload of the case's length."""
    return blocks.table_bytes(wire.one_segment(maker.numel), codec.block_format)


def _payloads(maker: Maker, codec: Codec, ranks: int) -> Tensor:
    """What ranks send, uint8 [ranks, bytes]."""
    dtype = torch.float32
    return torch.stack([ops.quantize(maker.normal(dtype), codec, rank=r) for r in range(ranks)])


def quantize_case(maker: Maker, name: str, codec: Codec) -> Case:
    """``quantize`` beside torch, which leaves a byte an element, and beside other quantizers."""
    dtype = getattr(torch, name)
    size = payload_bytes(maker, codec)

    def plain(s: Buffers) -> None:
        rivals.torch_quantize(s.x, codec.bits, codec.block)

    others = [Rival("torch to nearest, not packed", plain)]
    if isinstance(codec, BlockInt) and maker.device == "cuda":
        others += bitsandbytes.quantizers(maker.numel, name, codec.bits, codec.block)
        others += rivals.quantizers(name, codec.bits, codec.block)
    return Case(
        "quantize", codec_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=lambda: Buffers(x=maker.normal(dtype), out=maker.room(size)),
        run=lambda s: ops.quantize(s.x, codec, out=s.out),
        rivals=others,
    )  # fmt: skip


def dequantize_case(maker: Maker, name: str, codec: Codec) -> Case:
    """``dequantize`` into memory that is there."""
    dtype = getattr(torch, name)
    size = payload_bytes(maker, codec)
    others = []
    if isinstance(codec, BlockInt) and maker.device == "cuda":
        others = bitsandbytes.dequantizers(maker.numel, name, codec.bits, codec.block)
    return Case(
        "dequantize", codec_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=lambda: Buffers(
            payload=ops.quantize(maker.normal(dtype), codec), out=maker.values(dtype)
        ),
        run=lambda s: ops.dequantize(s.payload, codec, maker.numel, out=s.out),
        rivals=others,
    )  # fmt: skip


def feedback_case(maker: Maker, name: str, codec: Codec) -> Case:
    """``quantize_feedback_``: what a rank of a hook sends, and its float32 residual."""
    dtype = getattr(torch, name)
    size = payload_bytes(maker, codec)
    return Case(
        "quantize_feedback_", codec_name(codec), name, maker.numel,
        maker.numel * (dtype.itemsize + 8) + size,
        make=lambda: Buffers(
            x=maker.normal(dtype), residual=maker.values(torch.float32), out=maker.room(size)
        ),
        run=lambda s: ops.quantize_feedback_(s.x, s.residual, codec, out=s.out),
    )  # fmt: skip


def sum_case(maker: Maker, name: str, ranks: int) -> Case:
    """``sum_quantized``: the mean of what several ranks sent."""
    dtype = getattr(torch, name)
    size = payload_bytes(maker, REDUCED)
    return Case(
        "sum_quantized", f"{codec_name(REDUCED)}, {ranks} ranks", name, maker.numel,
        maker.numel * dtype.itemsize + ranks * size,
        make=lambda: Buffers(payloads=_payloads(maker, REDUCED, ranks), out=maker.values(dtype)),
        run=lambda s: ops.sum_quantized(s.payloads, REDUCED, maker.numel, mean=True, out=s.out),
    )  # fmt: skip


def reduce_case(maker: Maker, ranks: int) -> Case:
    """``reduce_quantized``: what an owner makes of the payloads of all ranks."""
    size = payload_bytes(maker, REDUCED)
    return Case(
        "reduce_quantized", f"{codec_name(REDUCED)}, {ranks} ranks", BITS, maker.numel,
        (ranks + 1) * size,
        make=lambda: Buffers(payloads=_payloads(maker, REDUCED, ranks), out=maker.room(size)),
        run=lambda s: ops.reduce_quantized(s.payloads, REDUCED, maker.numel, mean=True, out=s.out),
    )  # fmt: skip
