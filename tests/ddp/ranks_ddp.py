"""What ranks do in test_ddp.py: the DDP hook against tests/oracles/feedback_oracle.py."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from feedback_oracle import Kind, Oracle
from ranks_collectives import bits
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist
from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK
from pydist.ddp.state import CompressionState
from pydist.training.options import Options
from pydist.transport import exchange

CODECS: dict[str, Any] = {
    "sign_l1": Sign("l1", block=64), "sign_l2": Sign("l2"), "votes": Sign(None),
    "qsgd2": QSGD(2, block=32), "qsgd3": QSGD(3, block=96), "qsgd4": QSGD(4),
    "qsgd4_l2": QSGD(4, norm="l2"), "qsgd8": QSGD(8, block=128), "int2": BlockInt(2),
    "int5": BlockInt(5, block=32), "int4_random": BlockInt(4, rounding="stochastic"),
    "int8": BlockInt(8), "e4m3": BlockFloat(block=32), "e5m2": BlockFloat("e5m2"),
    "raw16": Raw("bfloat16"),
    "topk": TopK(0.05, block=64), "topk16": TopK(0.3, block=96, values="float16"),
    "topk_long": TopK(0.01, values="bfloat16"),
    "mixed": {"first.*": Sign("l1", block=96), "*.weight": BlockInt(4), "scale": Raw("float16")},
    "sparse": {"first.*": TopK(0.1, block=32), "left.*": QSGD(4), "*": TopK(0.02, block=128)},
    "elias": QSGD(4, block=64, entropy="elias"),
    "coded": {"first.*": QSGD(3, block=32, entropy="elias"), "turned": TopK(0.1, block=32),
    "left.*": QSGD(8, norm="l2", entropy="elias"), "right.*": Sign(None), "*": Ternary()},
    "ternary": Ternary(), "trits": {"first.*": TopK(0.1, block=32), "turned": Sign("l1"),
    "left.*": Ternary(clip=None), "*": Ternary()},
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_sync": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "view": {"gradient_as_bucket_view": True},
    "many": {"bucket_cap_mb": 0.0001},
    "huge": {},
}
MIN_NUMEL = 200
SEED = 7


class Net(torch.nn.Module):
    """Parameters of many sizes and memory orders, some of them used by some ranks only."""

    def __init__(self, huge: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(12, 30)
        self.left = torch.nn.Linear(30, 17)
        self.right = torch.nn.Linear(30, 17, bias=False)
        self.never = torch.nn.Linear(15, 20)
        self.turned = torch.nn.Parameter(0.1 * torch.randn(9, 17).t())
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.empty = torch.nn.Parameter(torch.zeros(0))
        self.frozen = torch.nn.Parameter(torch.ones(300), requires_grad=False)
        self.huge = torch.nn.Parameter(0.1 * torch.randn(12, 2500)) if huge else None

    def forward(self, x: Tensor, side: str, all_used: bool) -> Tensor:
        y = torch.tanh(self.first(x))
        if all_used:
            y = self.left(y) + self.right(y)
            y = y + 0.01 * (self.never.weight.sum() + self.never.bias.sum()) + self.empty.sum()
        else:
            y = self.left(y) if side == "left" else self.right(y)
        y = (y @ self.turned) * self.scale
        if self.huge is not None:
            y = y + torch.tanh(x @ self.huge).mean(1, keepdim=True)
        return y


def loss_of(net: Any, mode: str, rank: int, step: int, turn: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + turn)
    x = torch.randn(4, 12, generator=generator).to(dtype)
    side = "left" if step % 4 == 0 or (step % 4 != 1 and rank % 2 == 0) else "right"
    return net(x, side, mode not in ("unused",)).square().mean()


def backward(net: Any, mode: str, rank: int, step: int, dtype: torch.dtype) -> None:
    """One rank's backward of one step; accumulated over three turns where ``mode`` says so."""
    turns = 3 if mode == "no_sync" else 1
    for turn in range(turns):
        last = turn == turns - 1 or not isinstance(net, DDP)
        with nullcontext() if last else net.no_sync():
            loss_of(net, mode, rank, step, turn, dtype).backward()


def memory_order(p: Tensor, x: Tensor | None) -> Any:
    """A gradient as float32 in the parameter's memory order, as a bucket holds it."""
    if x is None:
        return np.zeros(p.numel(), dtype=np.float32)
    dense = torch.empty_like(p).copy_(x)
    return dense.as_strided((p.numel(),), (1,)).detach().float().numpy().copy()


def local_gradients(
    net: torch.nn.Module, mode: str, ranks: int, step: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Every rank's gradients, from one bare model."""
    result = []
    for rank in range(ranks):
        net.zero_grad()
        backward(net, mode, rank, step, dtype)
        result.append(
            {n: memory_order(p, p.grad) for n, p in net.named_parameters() if p.requires_grad}
        )
    net.zero_grad()
    return result


def kinds_of(
    net: torch.nn.Module, options: Options, dtype: torch.dtype, stage: int = 0
) -> dict[str, Kind]:
    kinds = {}
    for ordinal, (name, p) in enumerate(net.named_parameters()):
        if p.requires_grad:
            choice = options.choose(name, p, dtype, stage)
            kinds[name] = Kind(ordinal, p.numel(), choice.codec, choice.feedback)
    return kinds


def kept(state: CompressionState) -> dict[str, Any]:
    """This rank's residuals as plain values."""
    names = state.parameters.names
    worker = {names[i]: x.float().numpy().copy() for i, x in state.residuals.worker.items()}
    owner = {
        names[i]: (share.first, share.values.float().numpy().copy())
        for i, share in state.residuals.owner.items()
    }
    momenta = {names[i]: x.float().numpy().copy() for i, x in state.momenta.held.items()}
    return {"worker": worker, "owner": owner, "momenta": momenta}


def check_residuals(oracle: Oracle, everyone: list[dict[str, Any]], where: str) -> None:
    """Compares all ranks' residuals; what no step has touched may not be there yet."""
    for rank, mine in enumerate(everyone):
        for name, wanted in oracle.worker[rank].items():
            got = mine["worker"].get(name, np.zeros_like(wanted))
            assert np.array_equal(got, wanted), f"{where}: rank {rank}'s residual of {name}"
        for name, wanted in oracle.momenta[rank].items():
            got = mine["momenta"].get(name, np.zeros_like(wanted))
            assert np.array_equal(got, wanted), f"{where}: rank {rank}'s momentum of {name}"
        for name, (first, values) in mine["owner"].items():
            wanted = oracle.owner[name][first : first + values.size]
            assert np.array_equal(values, wanted), f"{where}: rank {rank} as owner of {name}"
    for name, wanted in oracle.owner.items():  # every element has an owner
        held = np.zeros(wanted.size, dtype=bool)
        for mine in everyone:
            if name in mine["owner"]:
                first, values = mine["owner"][name]
                held[first : first + values.size] = True
        assert held.all() or not wanted.any(), f"{where}: nobody owns a part of {name}"


@contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    usual = exchange.CHUNK_BYTES
    exchange.CHUNK_BYTES = size or usual
    try:
        yield
    finally:
        exchange.CHUNK_BYTES = usual


def trained(
    rank: int, ranks: int, codec: Any, dtype_name: str, mode: str, options: dict[str, Any],
    chunk: int | None, failures: list[str], steps: int = 3,
) -> list[bytes]:  # fmt: skip
    """Trains; rank 0 compares gradients and everyone's residuals with the oracle.

    Adds to ``failures`` what differs.
    """
    where = f"{codec} {dtype_name} {mode} {options}, {ranks} ranks"
    dtype = getattr(torch, dtype_name)
    net = Net(huge=mode == "huge").to(dtype)
    bare = copy.deepcopy(net)
    with warnings.catch_warnings(), chunks_of(chunk):
        warnings.simplefilter("ignore")  # DDP's advice on unused parameters
        ddp = DDP(net, **MODES[mode])
        usual = {"min_numel": MIN_NUMEL, "seed": SEED}
        state = pydist.ddp.compress(ddp, codec, **usual | options)
        kinds = kinds_of(net, state.options, dtype)
        storage = str(state.options.residual_dtype)[6:]
        mean, norm = state.options.op == "mean", state.options.clip_norm
        oracle = Oracle(
            kinds, ranks, seed=SEED, dtype=dtype_name, storage=storage,
            owner=state.options.owner_feedback, mean=mean, momentum=state.options.momentum,
            limit=math.inf if norm is None else norm * ranks ** (0.5 if mean else -0.5),
        )  # fmt: skip
        for step in range(steps):
            oracle.change(kinds_of(net, state.options, dtype, state.options.stage(step)))
            net.zero_grad()
            backward(ddp, mode, rank, step, dtype)
            state.stats()  # looks at what became of the step
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, kept(state))
            try:
                if rank == 0:
                    wanted = oracle.step(local_gradients(bare, mode, ranks, step, dtype), step)
                    check_gradients(net, wanted, f"{where}, step {step}")
                    check_residuals(oracle, everyone, f"{where}, step {step}")
            except AssertionError as error:  # raised later: the others would wait for this rank
                failures.append(str(error))
            with torch.no_grad():
                for p, q in zip(net.parameters(), bare.parameters(), strict=True):
                    if p.grad is not None:
                        p -= 0.01 * p.grad
                    q.copy_(p)
    return [bits(p) for p in net.parameters()]


def check_gradients(net: torch.nn.Module, wanted: dict[str, Any], where: str) -> None:
    for name, p in net.named_parameters():
        if p.grad is not None and p.requires_grad:
            got = memory_order(p, p.grad)
            assert np.isfinite(got).all(), f"{where}: {name} is not finite"
            assert np.array_equal(got, wanted[name]), (
                f"{where}: {name}: {first_of(got, wanted[name])}"
            )


def first_of(got: Any, wanted: Any) -> str:
    i = int(np.flatnonzero(got != wanted)[0])
    return f"element {i} is {got[i]}, expected {wanted[i]}"


def conforms(rank: int, ranks: int, cases: list[tuple[Any, ...]]) -> list[list[bytes]]:
    """One after the other: (name of the codec, or itself, dtype, mode, options, chunk, steps)."""
    failures: list[str] = []
    results = [
        trained(
            rank,
            ranks,
            CODECS[codec] if isinstance(codec, str) else codec,
            dtype,
            mode,
            options,
            chunk,
            failures,
            *steps,
        )
        for codec, dtype, mode, options, chunk, *steps in cases
    ]
    assert not failures, "\n".join(failures)
    return results
