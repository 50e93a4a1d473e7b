"""Replicas that differ on a rank, run on every rank of test_replicas.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pydist
from pydist import QSGD, MismatchError
from pydist.ddp import CompressionState, compression_hook
from pydist.optim import (
    DistributedLion,
    OneBitAdam,
    OneBitLamb,
    SignSGD,
    Signum,
    ZeroOneAdam,
)

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "lion": lambda p, **more: DistributedLion(p, lr=1e-3, **more),
    "signsgd": lambda p, **more: SignSGD(p, lr=1e-3, **more),
    "signum": lambda p, **more: Signum(p, lr=1e-3, **more),
    "onebit_adam": lambda p, **more: OneBitAdam(p, warmup_steps=2, **more),
    "zero_one_adam": lambda p, **more: ZeroOneAdam(
        p, var_freeze_step=2, local_step_scaler=1, local_step_clipper=4, **more
    ),
    "onebit_lamb": lambda p, **more: OneBitLamb(p, warmup_steps=2, **more),
}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 7))


def flip(p: torch.Tensor, bit: int = 0) -> None:
    """One bit of a parameter, as a failing memory would."""
    with torch.no_grad():
        p.view(-1)[3:4].view(torch.int32).bitwise_xor_(1 << bit)


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except MismatchError as error:
        return str(error)
    return ""


def by_hand(rank: int, ranks: int, who: int) -> list[str]:
    """``pydist.check_replicas`` of a model, of frozen and packed tensors, of pairs."""
    net = make_net()
    net.register_parameter(
        "packed", nn.Parameter(torch.arange(9, dtype=torch.uint8), requires_grad=False)
    )
    net[0].to(memory_format=torch.preserve_format)
    pydist.check_replicas(net)
    found = []
    for name in ("0.weight", "1.bias"):
        if rank == who:
            flip(net.get_parameter(name))
        found.append(refused(lambda: pydist.check_replicas(net)))
        if rank == who:
            flip(net.get_parameter(name))
    if rank == who:
        net.packed.data[2] += 1
    found.append(refused(lambda: pydist.check_replicas(net.named_parameters())))
    pydist.check_replicas([("0.weight", net[0].weight)])
    fewer = list(net.named_parameters())[: 2 if rank == who else 3]
    found.append(refused(lambda: pydist.check_replicas(fewer)))
    return found


def hook(rank: int, ranks: int, who: int, every: int, named: bool) -> tuple[int, str]:
    """The step in which DDP's hook finds it, and what it says."""
    net = make_net()
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.001)
    names = net.named_parameters() if named else None
    state = CompressionState(
        QSGD(8, block=32), min_numel=16, named_parameters=names, replica_check_every=every
    )
    ddp.register_comm_hook(state, compression_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(9):
        if step == 4 and rank == who:
            flip(net[2].weight, bit=20)
        optimizer.zero_grad()
        loss = ddp(torch.randn(5, 40)).square().mean()
        if message := refused(loss.backward):
            return step, message
        optimizer.step()
    return -1, ""


def optimizer(
    rank: int, ranks: int, who: int, kind: str, every: int, attached: bool
) -> tuple[int, str]:
    """The step in which an optimizer finds it, and what it says."""
    net = make_net()
    made = OPTIMIZERS[kind](net.named_parameters(), replica_check_every=every)
    model: nn.Module = net
    if attached:
        model = DistributedDataParallel(net, bucket_cap_mb=0.001)
        made.attach(model)
    torch.manual_seed(rank)
    for step in range(14):
        if step == 4 and rank == who:
            anchor = made.state[net[2].weight].get("anchor")  # of 0/1 Adam, between two syncs
            flip(net[2].weight if anchor is None else anchor, bit=20)
        made.zero_grad()

        def one() -> None:
            model(torch.randn(5, 40)).square().mean().backward()
            made.step()

        if message := refused(one):
            return step, message
    return -1, ""


def wrong_arguments(rank: int, ranks: int) -> list[str]:
    found = []
    makers: list[Callable[[Any], object]] = [
        lambda value: DistributedLion(make_net().parameters(), replica_check_every=value),
        lambda value: CompressionState(QSGD(8), replica_check_every=value),
    ]
    for value in (-1, 1.5, "often"):
        for make in makers:
            try:
                make(value)
            except (TypeError, ValueError) as error:
                found.append(str(error))
    return found
