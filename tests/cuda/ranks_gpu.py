"""What ranks do in test_gpu_ranks.py, beside the cases of other files."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import VOTES, check, inputs
from ranks_gpu_collectives import group_of
from ranks_lion import model

import pydist
from pydist.optim import DistributedLion


def lion_equals_cpu(rank: int, ranks: int, device: str, on_device: bool) -> None:
    """One optimizer on the CPU and one on the device take the same steps, bit by bit."""
    with group_of(ranks, False) as plain, group_of(ranks, on_device) as group:
        compare_lion(rank, device, plain, group)


def compare_lion(rank: int, device: str, plain: Any, group: Any) -> None:
    """Over one group on the CPU, over the other on the device."""
    here, there = model(), model().to(device)
    options = {"lr": 0.01, "weight_decay": 0.1, "aggregate": "average"}
    opt = DistributedLion(here.named_parameters(), group=plain, **options)
    other = DistributedLion(there.named_parameters(), group=group, **options)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.to(device)
        opt.step()
        other.step()
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(p, q.cpu())
            assert torch.equal(opt.state[p]["momentum"], other.state[q]["momentum"].cpu())


def over_nccl(rank: int, ranks: int) -> str:
    """Votes over a group of NCCL, all ranks on device 0; what NCCL says where it refuses."""
    torch.cuda.set_device(0)
    group = dist.new_group(backend="nccl")
    try:
        dist.all_reduce(torch.ones(1, device="cuda"), group=group)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for op in ("vote", "mean", "sum"):
        for algorithm in ("auto", "two_phase", "all_gather"):
            for n in (0, 33, 100_003):
                tensors = inputs(ranks, n, torch.float32, seed=n)
                x = tensors[rank].cuda()
                pydist.all_reduce(x, VOTES, op=op, algorithm=algorithm, group=group, step=n)
                check(x, tensors, f"{op}, {algorithm}, {n}", op=op, step=n)
    tensors = inputs(ranks, 1001, torch.float32, seed=5)
    mine = [tensors[rank].cuda() for _ in range(8)]
    works = [
        pydist.all_reduce(x, VOTES, op="vote", group=group, step=i, async_op=True)
        for i, x in enumerate(mine)
    ]
    for i, work in reversed(list(enumerate(works))):
        work.wait()
        check(mine[i], tensors, f"in flight, {i}", op="vote", step=i)
    return ""
