"""What ranks do in test_fsdp_lion.py: replicas of a sharded model that vote on each shard."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lion_oracle import Oracle, Param
from ranks_codecs import first_difference
from ranks_collectives import bits
from ranks_ddp_state import raised_by
from ranks_fsdp import Net, local, loss_of, sharded
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from pydist.optim import DistributedLion, OneBitAdam

LR, BETAS, DECAY = 0.01, (0.9, 0.99), 0.1


def mesh_of(ranks: int, inside: int) -> DeviceMesh:
    """Replicas across, shards inside."""
    return init_device_mesh("cpu", (ranks // inside, inside), mesh_dim_names=("across", "inside"))


def made(mesh: DeviceMesh, **options: Any) -> tuple[Net, DistributedLion]:
    """A sharded model and its optimizer; replicas start from different weights."""
    policy = options.pop("policy", None) or MixedPrecisionPolicy()
    net = sharded(Net(), mesh=mesh["inside"], mp_policy=policy)
    with torch.no_grad():
        for p in net.parameters():
            local(p).mul_(1 + mesh.get_local_rank("across"))
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    opt = DistributedLion(
        named, lr=LR, betas=BETAS, weight_decay=DECAY, group=mesh["across"].get_group(), **options
    )
    return net, opt


def parameters(opt: DistributedLion) -> list[Any]:
    """In the order of their ordinals."""
    return list(opt.parameters())


def _gradients(opt: DistributedLion, mesh: DeviceMesh) -> list[list[Any]]:
    """Every replica's gradients of this rank's shards."""
    mine = [
        None if p.grad is None else local(p.grad).float().numpy().flatten() for p in parameters(opt)
    ]
    everyone: list[Any] = [None] * mesh["across"].size()
    dist.all_gather_object(everyone, mine, group=mesh["across"].get_group())
    return everyone


def _state(opt: DistributedLion) -> list[Any]:
    """Values and momenta of this rank's shards."""
    return [local(p).clone() for p in parameters(opt)] + [
        local(opt.state[p]["momentum"]).clone() for p in parameters(opt) if p in opt.state
    ]


def equals_reference(
    rank: int, ranks: int, inside: int, options: dict[str, Any], low: bool
) -> list[bytes]:
    """Each shard is voted on by its replicas; a NaN in one shard skips the step of all shards."""
    mesh = mesh_of(ranks, inside)
    policy = MixedPrecisionPolicy(torch.bfloat16) if low else None
    net, opt = made(mesh, policy=policy, **options)
    values = [local(p).detach().numpy().flatten().copy() for p in parameters(opt)]
    fresh = Net()
    for (name, p), value in zip(
        [(n, p) for n, p in fresh.named_parameters() if p.requires_grad], values, strict=True
    ):
        part = p.detach().chunk(inside)  # the weights of the first replica
        here = mesh.get_local_rank("inside")
        wanted = part[here].flatten() if here < len(part) else torch.empty(0)
        first_difference(torch.from_numpy(value), wanted, name)
    oracle = Oracle(
        [Param(value, "float32", LR, BETAS, DECAY) for value in values],
        mesh["across"].size(), **options,
    )  # fmt: skip
    for step in range(6):
        opt.zero_grad()
        loss_of(net, rank, step, side=step == 3).backward()
        if step == 2 and rank == ranks - 1:
            grad = next(local(p.grad) for p in parameters(opt) if p.grad is not None)
            grad.view(-1)[0] = float("nan")
        before, gradients = _state(opt), _gradients(opt, mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # replicas must not have equal gradients
            opt.step()
        if step == 2:
            oracle.steps += 1
            for old, new in zip(before, _state(opt), strict=True):
                first_difference(new, old, "what a skipped step left")
            continue
        oracle.step(gradients)
        voter = mesh.get_local_rank("across")
        for ordinal, (p, param) in enumerate(zip(parameters(opt), oracle.params, strict=True)):
            what = f"step {step}, {opt.name_of(ordinal)}"
            first_difference(local(p).detach().flatten(), torch.from_numpy(param.value), what)
            if p in opt.state:
                moment = local(opt.state[p]["momentum"]).flatten()
                first_difference(moment, torch.from_numpy(param.momenta[voter]), f"{what}, m")
    assert opt.skipped_steps == 1 and oracle.skipped == 0
    return [bits(p.full_tensor().detach()) for p in parameters(opt)]


def other_shards_are_no_replicas(rank: int, ranks: int) -> tuple[str, str]:
    mesh = mesh_of(ranks, 2)
    net = sharded(Net(), mesh=mesh["inside"])
    return raised_by(lambda: DistributedLion(net.named_parameters(), lr=LR))


def strided_shards_are_no_replicas(rank: int, ranks: int) -> tuple[str, str]:
    """FSDP2 beside tensor parallelism: shards of a kind of their own."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    net = torch.nn.Linear(6, 8, bias=False)
    parallelize_module(net, mesh["tp"], ColwiseParallel())
    fully_shard(net, mesh=mesh["dp"])
    group = mesh["dp"].get_group()
    return raised_by(lambda: DistributedLion(net.named_parameters(), lr=LR, group=group))


def partial_gradients(rank: int, ranks: int) -> None:
    """Tensor parallelism leaves partial sums; what votes is their sum."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("across", "tp"))
    group, start = mesh["across"].get_group(), torch.linspace(-1, 1, 9)
    p = torch.nn.Parameter(distribute_tensor(start.clone(), mesh["tp"], [Replicate()]))
    plain = torch.nn.Parameter(start.clone())
    opt, other = (DistributedLion([("w", q)], lr=LR, group=group) for q in (p, plain))
    for step in range(3):
        partial = torch.randn(9, generator=torch.Generator().manual_seed(10 * step + rank))
        whole = partial.clone()
        dist.all_reduce(whole, group=mesh["tp"].get_group())
        p.grad = DTensor.from_local(partial, mesh["tp"], [Partial()])
        plain.grad = whole
        opt.step()
        other.step()
        first_difference(local(p).detach(), plain.detach(), f"step {step}")


def refused_by_others(rank: int, ranks: int) -> tuple[str, str]:
    net = sharded(Net(), mesh=mesh_of(ranks, 2)["inside"])
    return raised_by(lambda: OneBitAdam(net.named_parameters(), lr=LR, warmup_steps=2))


def one_shard_fails(rank: int, ranks: int) -> tuple[str, str]:
    """Where the voters on one shard disagree, nobody moves, and nobody waits for the others."""
    mesh = mesh_of(ranks, 2)
    net, opt = made(mesh)
    loss_of(net, rank, 0).backward()
    before = _state(opt)
    opt.param_groups[0]["lr"] = LR * (2 if rank == 3 else 1)
    result = raised_by(opt.step)
    for p, old in zip(parameters(opt), before, strict=False):
        assert torch.equal(local(p), old), "moved"
    opt.param_groups[0]["lr"] = LR
    opt.step()
    assert any(
        not torch.equal(local(p), old) for p, old in zip(parameters(opt), before, strict=False)
    )
    return result


def _train(net: Net, opt: DistributedLion, rank: int, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(net, rank, step).backward()
        opt.step()


def resume(rank: int, ranks: int, folder: str) -> None:
    """Every replica saves its own checkpoint: momenta differ between replicas."""
    mesh = mesh_of(ranks, 2)
    inside = mesh["inside"].get_group()
    path = Path(folder) / f"replica{mesh.get_local_rank('across')}"
    net, opt = made(mesh)
    _train(net, opt, rank, range(3))
    model, optimizer = get_state_dict(net, opt)
    names = {key.removesuffix(".momentum") for key in optimizer["state"]}
    assert "stem.weight" in names, names
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=inside)
    _train(net, opt, rank, range(3, 6))

    again, other = made(mesh)
    model, optimizer = get_state_dict(again, other)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=inside)
    set_state_dict(again, other, model_state_dict=model, optim_state_dict=optimizer)
    _train(again, other, rank, range(3, 6))
    for new, old in zip(_state(other), _state(opt), strict=True):
        first_difference(new, old, "after a resume")
    assert np.isfinite(float(loss_of(again, rank, 9)))
