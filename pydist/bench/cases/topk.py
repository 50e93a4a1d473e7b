"""The largest entries of each block: choosing them, adding them up, choosing again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pydist import ops
from pydist.bench import rivals
from pydist.bench.case import BITS, Case, Maker
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers
from pydist.codecs import TopK

CODECS = (TopK(0.001), TopK(0.01))
HOOKS = CODECS[0]  # what a hook runs, with a residual and over several ranks
RANKS = (2, 8)


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for codec in CODECS:
        for name in maker.dtypes:
            yield select_case(maker, name, codec)
            yield scatter_case(maker, name, codec)
    for name in maker.dtypes:
        yield feedback_case(maker, name, HOOKS)
    for ranks in RANKS:
        yield reduce_case(maker, ranks, HOOKS)


def _name(codec: TopK) -> str:
    return f"TopK({codec.density}), blocks of {codec.block}"


def select_case(maker: Maker, name: str, codec: TopK) -> Case:
    """``topk_select`` beside torch, which selects from the whole tensor and codes nothing."""
    dtype = getattr(torch, name)
    size = codec.topk_format.payload_bytes(maker.numel)
    k = max(1, round(maker.numel * codec.density))
    return Case(
        "topk_select", _name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=lambda: Buffers(x=maker.normal(dtype), out=maker.room(size)),
        run=lambda s: ops.topk_select(s.x, codec, out=s.out),
        rivals=[Rival("torch.topk, not packed", lambda s: rivals.torch_topk(s.x, k))],
    )  # fmt: skip


def scatter_case(maker: Maker, name: str, codec: TopK) -> Case:
    """``topk_scatter`` of one payload into memory that is there."""
    dtype = getattr(torch, name)
    size = codec.topk_format.payload_bytes(maker.numel)
    return Case(
        "topk_scatter", _name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=lambda: Buffers(payloads=_payloads(maker, codec, 1), out=maker.values(dtype)),
        run=lambda s: ops.topk_scatter(s.payloads, codec, maker.numel, out=s.out),
    )  # fmt: skip


def _payloads(maker: Maker, codec: TopK, ranks: int) -> Tensor:
    """What ranks send, uint8 [ranks, bytes]."""
    dtype = torch.float32
    return torch.stack([ops.topk_select(maker.normal(dtype), codec) for _ in range(ranks)])


def feedback_case(maker: Maker, name: str, codec: TopK) -> Case:
    """``topk_feedback_``: what a rank of a hook sends, and its float32 residual."""
    dtype = getattr(torch, name)
    size = codec.topk_format.payload_bytes(maker.numel)
    return Case(
        "topk_feedback_", _name(codec), name, maker.numel,
        maker.numel * (dtype.itemsize + 8) + size,
        make=lambda: Buffers(
            x=maker.normal(dtype), residual=maker.values(torch.float32), out=maker.room(size)
        ),
        run=lambda s: ops.topk_feedback_(s.x, s.residual, codec, out=s.out),
    )  # fmt: skip


def reduce_case(maker: Maker, ranks: int, codec: TopK) -> Case:
    """``topk_reduce``: what an owner makes of the entries of all ranks."""
    size = codec.topk_format.payload_bytes(maker.numel)
    return Case(
        "topk_reduce", f"{_name(codec)}, {ranks} ranks", BITS, maker.numel, (ranks + 1) * size,
        make=lambda: Buffers(payloads=_payloads(maker, codec, ranks), out=maker.room(size)),
        run=lambda s: ops.topk_reduce(s.payloads, codec, maker.numel, mean=True, out=s.out),
    )  # fmt: skip
