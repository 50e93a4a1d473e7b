"""Values that are sent as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pydist import ops
from pydist.bench.case import Case, Maker
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for name in maker.dtypes:
        yield sum_case(maker, name)


def sum_case(maker: Maker, name: str) -> Case:
    """``sum_values`` of two ranks, beside torch's sum, which rounds after every addition."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        values = torch.stack([maker.normal(dtype), maker.normal(dtype)])
        return Buffers(values=values, out=torch.zeros_like(values[0]))

    return Case(
        "sum_values", "2 ranks", name, maker.numel, 3 * maker.numel * dtype.itemsize,
        make=make,
        run=lambda s: ops.sum_values(s.values, out=s.out),
        rivals=[Rival("torch.add", lambda s: torch.add(s.values[0], s.values[1], out=s.out))],
    )  # fmt: skip
