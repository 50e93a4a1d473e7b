"""Lion's vote and its update."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pydist import ops
from pydist.bench import rivals
from pydist.bench.case import Case, Maker
from pydist.bench.rivals import APPLY, LION, Rival
from pydist.bench.timing import Buffers

RANKS = 8


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for name in maker.dtypes:
        for momentum in ("float32", "bfloat16"):
            yield pack_case(maker, name, momentum)
    for name in maker.dtypes:
        for ranks in (None, RANKS):
            yield apply_case(maker, name, ranks)


def pack_case(maker: Maker, name: str, momentum: str) -> Case:
    """lion_pack_ beside torch, which leaves a float a sign, or packs it too when compiled."""
    dtype, kept = getattr(torch, name), getattr(torch, momentum)
    others = [Rival("torch, not packed", lambda s: rivals.torch_lion_vote(s.grad, s.momentum))]
    return Case(
        "lion_pack_", f"{momentum} momentum", name, maker.numel,
        maker.numel * (dtype.itemsize + 2 * kept.itemsize + 1 / 8),
        make=lambda: Buffers(
            grad=maker.normal(dtype), momentum=maker.normal(kept), out=maker.room(maker.numel // 8)
        ),
        run=lambda s: ops.lion_pack_(s.grad, s.momentum, out=s.out, **LION),
        rivals=maker.with_compiled(
            others, rivals.torch_lion_pack, lambda s: (s.grad, s.momentum, s.out), ", packed"
        ),
    )  # fmt: skip


def apply_case(maker: Maker, name: str, ranks: int | None) -> Case:
    """lion_apply_ beside torch, which reads a float a vote; counts are 0 … ranks."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        planes = maker.votes(ranks or 1)
        if ranks:
            planes = ops.count_votes(planes)
        return Buffers(param=maker.normal(dtype), planes=planes, vote=maker.normal(dtype).sign_())

    others = [Rival("torch, votes unpacked", lambda s: rivals.torch_lion_apply(s.param, s.vote))]
    if not ranks:
        others = maker.with_compiled(
            others, rivals.torch_unpack_apply, lambda s: (s.param, s.planes[0]), ", packed votes"
        )
    planes = ranks.bit_length() if ranks else 1
    return Case(
        "lion_apply_", f"counts of {ranks} ranks" if ranks else "sign plane", name, maker.numel,
        maker.numel * (2 * dtype.itemsize + planes / 8),
        make=make,
        run=lambda s: ops.lion_apply_(s.param, s.planes, ranks=ranks, **APPLY),
        rivals=others,
    )  # fmt: skip
