"""Signs, votes and their counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pydist import ops
from pydist.bench import rivals
from pydist.bench.case import BITS, Case, Maker
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers

RANKS = 8


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for name in maker.dtypes:
        yield pack_case(maker, name)
    for name in maker.dtypes:
        yield unpack_case(maker, name)
    yield count_case(maker)
    for ties in ("hash", "zero", "positive"):
        yield majority_case(maker, ties)


def pack_case(maker: Maker, name: str) -> Case:
    """pack_signs."""
    dtype = getattr(torch, name)
    others = rivals.packers(maker.device, name)
    if maker.device == "cpu":
        others.insert(0, Rival("pydist, new memory", lambda s: ops.pack_signs(s.x)))
    return Case(
        "pack_signs", "", name, maker.numel, maker.numel * (dtype.itemsize + 1 / 8),
        make=lambda: Buffers(x=maker.normal(dtype), out=maker.room(maker.numel // 8)),
        run=lambda s: ops.pack_signs(s.x, out=s.out),
        rivals=maker.with_compiled(others, lambda x: rivals.torch_pack(x >= 0), lambda s: (s.x,)),
    )  # fmt: skip


def unpack_case(maker: Maker, name: str) -> Case:
    """unpack_signs."""
    dtype, numel = getattr(torch, name), maker.numel
    others = rivals.unpackers(maker.device, name)
    if maker.device == "cpu":
        run = ops.unpack_signs
        others.insert(0, Rival("pydist, new memory", lambda s: run(s.payload, numel, dtype=dtype)))
    return Case(
        "unpack_signs", "", name, numel, numel * (dtype.itemsize + 1 / 8),
        make=lambda: Buffers(payload=maker.votes(1)[0], out=maker.values(dtype)),
        run=lambda s: ops.unpack_signs(s.payload, numel, out=s.out),
        rivals=maker.with_compiled(
            others, lambda payload: rivals.torch_unpack(payload, dtype), lambda s: (s.payload,)
        ),
    )  # fmt: skip


def _total(payloads: Tensor) -> None:
    rivals.torch_count(payloads)


def count_case(maker: Maker) -> Case:
    """count_votes of eight ranks beside a sum of unpacked bits (which stays a byte an element)."""
    planes = RANKS.bit_length()
    return Case(
        "count_votes", f"{RANKS} payloads", BITS, maker.numel,
        maker.numel * (RANKS + planes) / 8,
        make=lambda: Buffers(payloads=maker.votes(RANKS), out=maker.planes(planes)),
        run=lambda s: ops.count_votes(s.payloads, out=s.out),
        rivals=[Rival("torch sum of bits, unpacked", lambda s: _total(s.payloads))],
    )  # fmt: skip


def majority_case(maker: Maker, ties: str) -> Case:
    """majority_vote of eight ranks; torch's way knows one rule for ties."""
    others = [Rival("torch expression", lambda s: rivals.torch_majority(s.payloads))]
    others = maker.with_compiled(others, rivals.torch_majority, lambda s: (s.payloads,))
    planes = 2 if ties == "zero" else 1
    return Case(
        "majority_vote", f"{RANKS} payloads, ties {ties}", BITS, maker.numel,
        maker.numel * (RANKS + planes) / 8,
        make=lambda: Buffers(payloads=maker.votes(RANKS), out=maker.planes(planes)),
        run=lambda s: ops.majority_vote(s.payloads, ties=ties, out=s.out),
        rivals=others if ties == "positive" else [],
    )  # fmt: skip
