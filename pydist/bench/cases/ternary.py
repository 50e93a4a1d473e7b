"""Ternary values: their scale, their codes, and the sums of several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pydist import ops
from pydist.bench import rivals
from pydist.bench.case import BITS, Case, Maker
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers
from pydist.codecs import Ternary
from pydist.formats import ternary

RANKS = 8


def cases(maker: Maker) -> Iterator[Case]:
    """All of them."""
    for make in (scale_case, pack_case, unpack_case):
        for name in maker.dtypes:
            yield make(maker, name)
    yield sum_case(maker)
    for name in maker.dtypes:
        yield sums_case(maker, name)


def scale_case(maker: Maker, name: str) -> Case:
    """``ternary_scale`` beside torch's deviation and maximum."""
    dtype = getattr(torch, name)
    return Case(
        "ternary_scale", "", name, maker.numel, maker.numel * dtype.itemsize,
        make=lambda: Buffers(x=maker.normal(dtype)),
        run=lambda s: ops.ternary_scale(s.x, Ternary()),
        rivals=[Rival("torch std and amax", lambda s: rivals.torch_scaler(s.x))],
    )  # fmt: skip


def pack_case(maker: Maker, name: str) -> Case:
    """``ternary_pack`` beside torch, which leaves a byte an element."""
    dtype, size = getattr(torch, name), ternary.payload_bytes(maker.numel)

    def make() -> Buffers:
        x = maker.normal(dtype)
        return Buffers(x=x, scalers=ops.ternary_scale(x, Ternary()), out=maker.room(size))

    return Case(
        "ternary_pack", "", name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.ternary_pack(s.x, s.scalers, out=s.out),
        rivals=[Rival("torch, not packed", lambda s: rivals.torch_ternary(s.x, s.scalers))],
    )  # fmt: skip


def _codes(maker: Maker, ranks: int) -> Tensor:
    """Random payloads, uint8 [ranks, bytes]."""
    shape = (ranks, ternary.payload_bytes(maker.numel))
    return torch.randint(0, 243, shape, dtype=torch.uint8, device=maker.device)


def unpack_case(maker: Maker, name: str) -> Case:
    """``ternary_unpack`` of one payload into memory that is there."""
    dtype, size = getattr(torch, name), ternary.payload_bytes(maker.numel)

    def make() -> Buffers:
        scalers = torch.ones(1, dtype=torch.float32, device=maker.device)
        return Buffers(payload=_codes(maker, 1)[0], scalers=scalers, out=maker.values(dtype))

    return Case(
        "ternary_unpack", "", name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.ternary_unpack(s.payload, s.scalers, maker.numel, out=s.out),
    )  # fmt: skip


def _sums(maker: Maker) -> int:
    return ternary.units_for(maker.numel) * ternary.sum_unit_bytes(RANKS)


def sum_case(maker: Maker) -> Case:
    """``ternary_sum`` of eight ranks."""
    size = RANKS * ternary.payload_bytes(maker.numel) + _sums(maker)
    return Case(
        "ternary_sum", f"{RANKS} payloads", BITS, maker.numel, size,
        make=lambda: Buffers(payloads=_codes(maker, RANKS), out=maker.room(_sums(maker))),
        run=lambda s: ops.ternary_sum(s.payloads, maker.numel, out=s.out),
    )  # fmt: skip


def sums_case(maker: Maker, name: str) -> Case:
    """``ternary_unpack_sums`` of eight ranks, to means."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        sums = ops.ternary_sum(_codes(maker, RANKS), maker.numel)
        scalers = torch.ones(1, dtype=torch.float32, device=maker.device)
        return Buffers(sums=sums, scalers=scalers, out=maker.values(dtype))

    def run(s: Buffers) -> Tensor:
        return ops.ternary_unpack_sums(
            s.sums, s.scalers, maker.numel, ranks=RANKS, mean=True, out=s.out
        )

    return Case(
        "ternary_unpack_sums", f"{RANKS} ranks", name, maker.numel,
        maker.numel * dtype.itemsize + _sums(maker),
        make=make,
        run=run,
    )  # fmt: skip
