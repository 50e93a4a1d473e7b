"""What is timed: every kernel, the bytes it must move, and its rivals.

A case makes a set of buffers; its kernel and its rivals run on that set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pydist import blocks, ops, ternary, wire
from pydist.bench import rivals
from pydist.bench.rivals import APPLY, LION, Rival
from pydist.bench.timing import Buffers
from pydist.codecs import QSGD, BlockInt, Ternary, TopK

RANKS = 8
BLOCK_CODECS = (
    BlockInt(4, block=512),
    BlockInt(8, block=512),
    BlockInt(3, block=128),  # codes that cross bytes, and many scales
    QSGD(4, block=512),
)
TOPK_CODECS = (TopK(0.001), TopK(0.01))
ELIAS_CODECS = (QSGD(2, 512, "l2"), QSGD(4, 512, "l2"), QSGD(4, 512), QSGD(8, 512, "l2"))
BITS = "bits"  # in place of a dtype: the kernel sees payloads alone
COMPILED = "torch.compile"  # begins the name of a rival that is compiled first, for seconds


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input.

    Attributes:
        kernel: Its name in ``pydist.ops``.
        variant: What distinguishes cases of one kernel.
        dtype: dtype of the gradient, parameter or result; ``"bits"`` where there is none.
        numel: Elements.
        bytes: Least bytes a call must move (time is at least bytes over bandwidth).
        make: A fresh set of buffers.
        run: The kernel, on such a set.
        rivals: What stands beside it.
    """

    kernel: str
    variant: str
    dtype: str
    numel: int
    bytes: float
    make: Callable[[], Buffers]
    run: Callable[[Buffers], Tensor | None]
    rivals: list[Rival] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel

    @property
    def compiled(self) -> list[str]:
        """Names of the rivals under torch.compile."""
        return [rival.name for rival in self.rivals if rival.name.startswith(COMPILED)]


@dataclass(frozen=True)
class Maker:
    """Makes the cases of one size.

    Attributes:
        numel: Elements, a multiple of 32.
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: Names of the dtypes to cover.
        compiled: Whether torch.compile is a rival.
    """

    numel: int
    device: str
    dtypes: tuple[str, ...]
    compiled: bool = False

    def cases(self) -> Iterator[Case]:
        """All cases, kernel by kernel."""
        for name in self.dtypes:
            yield pack_case(self, name)
        for name in self.dtypes:
            yield unpack_case(self, name)
        yield count_case(self)
        for ties in ("hash", "zero", "positive"):
            yield majority_case(self, ties)
        for name in self.dtypes:
            for momentum in ("float32", "bfloat16"):
                yield lion_pack_case(self, name, momentum)
        for name in self.dtypes:
            for ranks in (None, RANKS):
                yield lion_apply_case(self, name, ranks)
        for make in (quantize_case, dequantize_case):
            for codec in BLOCK_CODECS:
                for name in self.dtypes:
                    yield make(self, name, codec)
        for codec in ELIAS_CODECS:
            yield from elias_cases(self, codec)
        for ternary_make in (ternary_scale_case, ternary_pack_case, ternary_unpack_case):
            for name in self.dtypes:
                yield ternary_make(self, name)
        yield ternary_sum_case(self)
        for name in self.dtypes:
            yield ternary_values_case(self, name)
        for topk in TOPK_CODECS:
            for name in self.dtypes:
                yield topk_select_case(self, name, topk)
                yield topk_scatter_case(self, name, topk)
        for name in self.dtypes:
            yield sum_case(self, name)

    def normal(self, dtype: torch.dtype) -> Tensor:
        """Normal numbers of the case's length."""
        return torch.randn(self.numel, device=self.device).to(dtype)

    def payloads(self, ranks: int) -> Tensor:
        """Random votes, uint8 [ranks, bytes]."""
        shape = (ranks, self.numel // 8)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def room(self, planes: int) -> Tensor:
        """Memory for a result, uint8 [planes, bytes], written once so that its pages are there."""
        return torch.zeros(planes, self.numel // 8, dtype=torch.uint8, device=self.device)

    def with_compiled(
        self,
        others: list[Rival],
        function: Callable[..., Tensor | None],
        arguments: Callable[[Buffers], tuple[Tensor, ...]],
        what: str = "",
    ) -> list[Rival]:
        """The rivals, and a function under torch.compile where it is asked for."""
        if not self.compiled:
            return others
        lazy = _Compiled(function)
        name = f"{COMPILED}{what}"
        return [*others, Rival(name, lambda s: lazy.function(*arguments(s)))]


class _Compiled:
    """Compiles at the first call."""

    def __init__(self, function: Callable[..., Tensor | None]) -> None:
        self._plain = function

    @cached_property
    def function(self) -> Callable[..., Tensor | None]:
        return rivals.compiled(self._plain)


# ---------------------------------------------------------------- the kernels


def pack_case(maker: Maker, name: str) -> Case:
    """pack_signs."""
    dtype = getattr(torch, name)
    others = rivals.packers(maker.device, name)
    if maker.device == "cpu":
        others.insert(0, Rival("pydist, new memory", lambda s: ops.pack_signs(s.x)))
    return Case(
        "pack_signs", "", name, maker.numel, maker.numel * (dtype.itemsize + 1 / 8),
        make=lambda: Buffers(x=maker.normal(dtype), out=maker.room(1)[0]),
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

    def make() -> Buffers:
        out = torch.zeros(numel, dtype=dtype, device=maker.device)
        return Buffers(payload=maker.payloads(1)[0], out=out)

    return Case(
        "unpack_signs", "", name, numel, numel * (dtype.itemsize + 1 / 8),
        make=make,
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
        make=lambda: Buffers(payloads=maker.payloads(RANKS), out=maker.room(planes)),
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
        make=lambda: Buffers(payloads=maker.payloads(RANKS), out=maker.room(planes)),
        run=lambda s: ops.majority_vote(s.payloads, ties=ties, out=s.out),
        rivals=others if ties == "positive" else [],
    )  # fmt: skip


def lion_pack_case(maker: Maker, name: str, momentum: str) -> Case:
    """lion_pack_ beside torch, which leaves a float a sign, or packs it too when compiled."""
    dtype, kept = getattr(torch, name), getattr(torch, momentum)
    others = [Rival("torch, not packed", lambda s: rivals.torch_lion_vote(s.grad, s.momentum))]
    return Case(
        "lion_pack_", f"{momentum} momentum", name, maker.numel,
        maker.numel * (dtype.itemsize + 2 * kept.itemsize + 1 / 8),
        make=lambda: Buffers(
            grad=maker.normal(dtype), momentum=maker.normal(kept), out=maker.room(1)[0]
        ),
        run=lambda s: ops.lion_pack_(s.grad, s.momentum, out=s.out, **LION),
        rivals=maker.with_compiled(
            others, rivals.torch_lion_pack, lambda s: (s.grad, s.momentum, s.out), ", packed"
        ),
    )  # fmt: skip


def lion_apply_case(maker: Maker, name: str, ranks: int | None) -> Case:
    """lion_apply_ beside torch, which reads a float a vote; counts are 0 … ranks."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        planes = maker.payloads(ranks or 1)
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


def _codec_name(codec: BlockInt | QSGD) -> str:
    return f"{type(codec).__name__}({codec.bits}), blocks of {codec.block}"


def _payload_bytes(maker: Maker, codec: BlockInt | QSGD) -> int:
    return blocks.table_bytes(wire.one_segment(maker.numel), codec.block_format)


def quantize_case(maker: Maker, name: str, codec: BlockInt | QSGD) -> Case:
    """``quantize`` beside torch, which leaves a byte an element."""
    dtype = getattr(torch, name)
    size = _payload_bytes(maker, codec)

    def make() -> Buffers:
        out = torch.zeros(size, dtype=torch.uint8, device=maker.device)
        return Buffers(x=maker.normal(dtype), out=out)

    def plain(s: Buffers) -> None:
        rivals.torch_quantize(s.x, codec.bits, codec.block)

    return Case(
        "quantize", _codec_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.quantize(s.x, codec, out=s.out),
        rivals=[Rival("torch to nearest, not packed", plain)],
    )  # fmt: skip


def dequantize_case(maker: Maker, name: str, codec: BlockInt | QSGD) -> Case:
    """``dequantize`` into memory that is there."""
    dtype = getattr(torch, name)
    size = _payload_bytes(maker, codec)

    def make() -> Buffers:
        out = torch.zeros(maker.numel, dtype=dtype, device=maker.device)
        return Buffers(payload=ops.quantize(maker.normal(dtype), codec), out=out)

    return Case(
        "dequantize", _codec_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.dequantize(s.payload, codec, maker.numel, out=s.out),
    )  # fmt: skip


def _coded_bytes(maker: Maker, codec: QSGD) -> float:
    """Bytes of the Elias codes of normal numbers, from a sample on the CPU."""
    numel = min(maker.numel, 2**18)
    fixed = ops.quantize(torch.randn(numel), codec)
    return ops.elias_encode(fixed, codec, numel).numel() * maker.numel / numel


def elias_cases(maker: Maker, codec: QSGD) -> Iterator[Case]:
    """Codes of normal numbers as Elias streams, and back; what is read and written is codes alone.

    Beside each stands what it is added to: quantizing, or dequantizing.
    """
    numel = maker.numel
    size = _payload_bytes(maker, codec) + _coded_bytes(maker, codec)
    name = f"{_codec_name(codec)}, {codec.norm} norm"

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
        "elias_encode", name, BITS, numel, size, make=make,
        run=lambda s: ops.elias_encode(s.payload, codec, numel),
        rivals=[Rival("pydist, quantize float32", quantize)],
    )  # fmt: skip
    yield Case(
        "elias_decode", name, BITS, numel, size, make=make,
        run=lambda s: ops.elias_decode(s.coded, codec, numel),
        rivals=[Rival("pydist, dequantize to float32", dequantize)],
    )  # fmt: skip


def ternary_scale_case(maker: Maker, name: str) -> Case:
    """``ternary_scale`` beside torch's deviation and maximum."""
    dtype = getattr(torch, name)
    return Case(
        "ternary_scale", "", name, maker.numel, maker.numel * dtype.itemsize,
        make=lambda: Buffers(x=maker.normal(dtype)),
        run=lambda s: ops.ternary_scale(s.x, Ternary()),
        rivals=[Rival("torch std and amax", lambda s: rivals.torch_scaler(s.x))],
    )  # fmt: skip


def ternary_pack_case(maker: Maker, name: str) -> Case:
    """``ternary_pack`` beside torch, which leaves a byte an element."""
    dtype, size = getattr(torch, name), ternary.payload_bytes(maker.numel)

    def make() -> Buffers:
        x = maker.normal(dtype)
        out = torch.zeros(size, dtype=torch.uint8, device=maker.device)
        return Buffers(x=x, scalers=ops.ternary_scale(x, Ternary()), out=out)

    return Case(
        "ternary_pack", "", name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.ternary_pack(s.x, s.scalers, out=s.out),
        rivals=[
            Rival("torch, not packed", lambda s: rivals.torch_ternary(s.x, float(s.scalers)))
        ],
    )  # fmt: skip


def _trits(maker: Maker, ranks: int) -> Tensor:
    """Random payloads, uint8 [ranks, bytes]."""
    shape = (ranks, ternary.payload_bytes(maker.numel))
    return torch.randint(0, 243, shape, dtype=torch.uint8, device=maker.device)


def ternary_unpack_case(maker: Maker, name: str) -> Case:
    """``ternary_unpack`` of one payload into memory that is there."""
    dtype, size = getattr(torch, name), ternary.payload_bytes(maker.numel)

    def make() -> Buffers:
        out = torch.zeros(maker.numel, dtype=dtype, device=maker.device)
        scalers = torch.ones(1, device=maker.device)
        return Buffers(payload=_trits(maker, 1)[0], scalers=scalers, out=out)

    return Case(
        "ternary_unpack", "", name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.ternary_unpack(s.payload, s.scalers, maker.numel, out=s.out),
    )  # fmt: skip


def _sums(maker: Maker) -> int:
    return ternary.units_for(maker.numel) * ternary.sum_unit_bytes(RANKS)


def ternary_sum_case(maker: Maker) -> Case:
    """``ternary_sum`` of eight ranks."""
    size = RANKS * ternary.payload_bytes(maker.numel) + _sums(maker)

    def make() -> Buffers:
        out = torch.zeros(_sums(maker), dtype=torch.uint8, device=maker.device)
        return Buffers(payloads=_trits(maker, RANKS), out=out)

    return Case(
        "ternary_sum", f"{RANKS} payloads", BITS, maker.numel, size,
        make=make,
        run=lambda s: ops.ternary_sum(s.payloads, maker.numel, out=s.out),
    )  # fmt: skip


def ternary_values_case(maker: Maker, name: str) -> Case:
    """``ternary_unpack_sums`` of eight ranks, to means."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        out = torch.zeros(maker.numel, dtype=dtype, device=maker.device)
        sums = ops.ternary_sum(_trits(maker, RANKS), maker.numel)
        return Buffers(sums=sums, scalers=torch.ones(1, device=maker.device), out=out)

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


def _topk_name(codec: TopK) -> str:
    return f"TopK({codec.density}), blocks of {codec.block}"


def topk_select_case(maker: Maker, name: str, codec: TopK) -> Case:
    """``topk_select`` beside torch, which selects from the whole tensor and codes nothing."""
    dtype = getattr(torch, name)
    size = codec.topk_format.payload_bytes(maker.numel)

    def make() -> Buffers:
        out = torch.zeros(size, dtype=torch.uint8, device=maker.device)
        return Buffers(x=maker.normal(dtype), out=out)

    k = max(1, round(maker.numel * codec.density))
    return Case(
        "topk_select", _topk_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.topk_select(s.x, codec, out=s.out),
        rivals=[Rival("torch.topk, not packed", lambda s: rivals.torch_topk(s.x, k))],
    )  # fmt: skip


def topk_scatter_case(maker: Maker, name: str, codec: TopK) -> Case:
    """``topk_scatter`` of one payload into memory that is there."""
    dtype = getattr(torch, name)
    size = codec.topk_format.payload_bytes(maker.numel)

    def make() -> Buffers:
        out = torch.zeros(maker.numel, dtype=dtype, device=maker.device)
        return Buffers(payloads=ops.topk_select(maker.normal(dtype), codec)[None], out=out)

    return Case(
        "topk_scatter", _topk_name(codec), name, maker.numel, maker.numel * dtype.itemsize + size,
        make=make,
        run=lambda s: ops.topk_scatter(s.payloads, codec, maker.numel, out=s.out),
    )  # fmt: skip


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
