"""What ``kernels.py`` times: every kernel, the bytes it must move, and what people use today.

A case makes a set of buffers; its kernel and its rivals run on that set. A rival that answers with
a tensor must give the kernel's own answer, which ``kernels.py`` checks before it times anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timing import Buffers
from torch import Tensor

from pydist import ops

RANKS = 8
LION = {"beta1": 0.9, "beta2": 0.99}
APPLY = {"lr": 1e-4, "weight_decay": 0.1}
BITS = "bits"  # in place of a dtype: the kernel sees payloads alone


@dataclass(frozen=True)
class Rival:
    """Another way to the same end.

    Attributes:
        name: For the table.
        run: Does it once; a tensor that it returns must equal the kernel's.
        threaded: Whether torch's number of threads changes anything.
    """

    name: str
    run: Callable[[Buffers], Tensor | None]
    threaded: bool = True


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input.

    Attributes:
        kernel: Its name in ``pydist.ops``.
        variant: What distinguishes cases of one kernel.
        dtype: dtype of the gradient, parameter or result; ``"bits"`` where there is none.
        bytes: Least bytes a call must move (time is at least bytes over bandwidth).
        make: A fresh set of buffers.
        run: The kernel, on such a set.
        rivals: What stands beside it.
    """

    kernel: str
    variant: str
    dtype: str
    bytes: float
    make: Callable[[], Buffers]
    run: Callable[[Buffers], Tensor | None]
    rivals: list[Rival] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel


@dataclass(frozen=True)
class Maker:
    """Makes the cases of one size.

    Attributes:
        numel: Elements, a multiple of 32.
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: Names of the dtypes to cover.
    """

    numel: int
    device: str
    dtypes: tuple[str, ...]

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


# ---------------------------------------------------------------- plain torch and NumPy


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def torch_pack(votes: Tensor) -> Tensor:
    """Bits of a bool tensor, eight a byte, the first in the lowest bit."""
    bits = votes.view(-1, 8).to(torch.uint8)
    return (bits << _shifts(votes.device)).sum(-1, dtype=torch.uint8)


def torch_bits(payloads: Tensor) -> Tensor:
    """0 or 1 an element, uint8 [..., 8 * bytes]."""
    return ((payloads.unsqueeze(-1) >> _shifts(payloads.device)) & 1).flatten(-2)


def torch_majority(payloads: Tensor) -> Tensor:
    """Unpack all, add, compare, pack; ties are +1."""
    counts = torch_bits(payloads).sum(0, dtype=torch.uint8)
    return torch_pack(2 * counts >= len(payloads)).unsqueeze(0)


def torch_lion_vote(grad: Tensor, momentum: Tensor) -> None:
    """Direction, sign and new momentum; the sign stays a float an element."""
    momentum.lerp(grad.to(momentum.dtype), 1 - LION["beta1"]).sign_()
    momentum.lerp_(grad.to(momentum.dtype), 1 - LION["beta2"])


def torch_lion_apply(param: Tensor, vote: Tensor) -> None:
    """Decay and update from a vote that is a float an element already."""
    param.mul_(1 - APPLY["lr"] * APPLY["weight_decay"]).add_(vote, alpha=-APPLY["lr"])


def numpy_pack(x: Tensor) -> Tensor:
    """numpy.packbits on a CPU tensor."""
    import numpy as np

    return torch.from_numpy(np.packbits(x.numpy() >= 0, bitorder="little"))


def numpy_unpack(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """numpy.unpackbits, made ±1."""
    import numpy as np

    values = np.unpackbits(payload.numpy(), bitorder="little").astype(str(dtype)[6:])
    values *= 2
    values -= 1
    return torch.from_numpy(values)


def _numpy_has(maker: Maker, name: str) -> bool:
    return maker.device == "cpu" and name != "bfloat16"


# ---------------------------------------------------------------- the kernels


def pack_case(maker: Maker, name: str) -> Case:
    """pack_signs beside numpy.packbits and the torch expression."""
    dtype = getattr(torch, name)
    rivals = [
        Rival("pydist, new memory", lambda s: ops.pack_signs(s.x)),
        Rival("torch expression", lambda s: torch_pack(s.x >= 0)),
    ]
    if _numpy_has(maker, name):
        rivals.insert(1, Rival("numpy.packbits(x >= 0)", lambda s: numpy_pack(s.x), False))
    return Case(
        "pack_signs", "", name, maker.numel * (dtype.itemsize + 1 / 8),
        make=lambda: Buffers(x=maker.normal(dtype), out=maker.room(1)[0]),
        run=lambda s: ops.pack_signs(s.x, out=s.out),
        rivals=rivals,
    )  # fmt: skip


def unpack_case(maker: Maker, name: str) -> Case:
    """unpack_signs beside numpy.unpackbits and the torch expression."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        out = torch.zeros(maker.numel, dtype=dtype, device=maker.device)
        return Buffers(payload=maker.payloads(1)[0], out=out)

    def run(s: Buffers) -> Tensor:
        return ops.unpack_signs(s.payload, maker.numel, out=s.out)

    rivals = [
        Rival(
            "pydist, new memory", lambda s: ops.unpack_signs(s.payload, maker.numel, dtype=dtype)
        ),
        Rival("torch expression", lambda s: torch_bits(s.payload).to(dtype).mul_(2).sub_(1)),
    ]
    if _numpy_has(maker, name):
        rivals.append(Rival("numpy.unpackbits", lambda s: numpy_unpack(s.payload, dtype), False))
    return Case("unpack_signs", "", name, maker.numel * (dtype.itemsize + 1 / 8), make, run, rivals)


def count_case(maker: Maker) -> Case:
    """count_votes of eight ranks beside a sum of unpacked bits (which stays a byte an element)."""

    def total(s: Buffers) -> None:
        torch_bits(s.payloads).sum(0, dtype=torch.uint8)

    planes = RANKS.bit_length()
    return Case(
        "count_votes", f"{RANKS} payloads", BITS, maker.numel * (RANKS + planes) / 8,
        make=lambda: Buffers(payloads=maker.payloads(RANKS), out=maker.room(planes)),
        run=lambda s: ops.count_votes(s.payloads, out=s.out),
        rivals=[Rival("torch sum of bits, unpacked", total)],
    )  # fmt: skip


def majority_case(maker: Maker, ties: str) -> Case:
    """majority_vote of eight ranks; torch's way knows one rule for ties."""
    rivals = [Rival("torch expression", lambda s: torch_majority(s.payloads))]
    planes = 2 if ties == "zero" else 1
    return Case(
        "majority_vote", f"{RANKS} payloads, ties {ties}", BITS,
        maker.numel * (RANKS + planes) / 8,
        make=lambda: Buffers(payloads=maker.payloads(RANKS), out=maker.room(planes)),
        run=lambda s: ops.majority_vote(s.payloads, ties=ties, out=s.out),
        rivals=rivals if ties == "positive" else [],
    )  # fmt: skip


def lion_pack_case(maker: Maker, name: str, momentum: str) -> Case:
    """lion_pack_ beside torch, which leaves a float a sign."""
    dtype, kept = getattr(torch, name), getattr(torch, momentum)
    return Case(
        "lion_pack_", f"{momentum} momentum", name,
        maker.numel * (dtype.itemsize + 2 * kept.itemsize + 1 / 8),
        make=lambda: Buffers(
            grad=maker.normal(dtype), momentum=maker.normal(kept), out=maker.room(1)[0]
        ),
        run=lambda s: ops.lion_pack_(s.grad, s.momentum, out=s.out, **LION),
        rivals=[Rival("torch, not packed", lambda s: torch_lion_vote(s.grad, s.momentum))],
    )  # fmt: skip


def lion_apply_case(maker: Maker, name: str, ranks: int | None) -> Case:
    """lion_apply_ beside torch, which reads a float a vote; counts are 0 … ranks."""
    dtype = getattr(torch, name)

    def make() -> Buffers:
        planes = maker.payloads(ranks or 1)
        if ranks:
            planes = ops.count_votes(planes)
        return Buffers(param=maker.normal(dtype), planes=planes, vote=maker.normal(dtype).sign_())

    planes = ranks.bit_length() if ranks else 1
    return Case(
        "lion_apply_", f"counts of {ranks} ranks" if ranks else "sign plane", name,
        maker.numel * (2 * dtype.itemsize + planes / 8),
        make=make,
        run=lambda s: ops.lion_apply_(s.param, s.planes, ranks=ranks, **APPLY),
        rivals=[Rival("torch, votes unpacked", lambda s: torch_lion_apply(s.param, s.vote))],
    )  # fmt: skip
