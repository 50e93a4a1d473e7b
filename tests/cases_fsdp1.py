"""What ranks do in tests/test_fsdp.py: FSDP1 with a communication hook."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases_codecs import expected_all_reduce, expected_reduce_scatter, first_difference
from cases_collectives import bits
from cases_fsdp import SMALL, Net, Oracle, loss_of
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from pydist import Raw, fsdp
from pydist.fsdp import private_flat as private
from pydist.reference import round_to

CPU = torch.device("cpu")


def wrapped(net: Net, strategy: str, **options: Any) -> FSDP:
    """Every block a unit, and the rest."""
    options = {"device_id": CPU, "use_orig_params": True, **options}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    net.frozen.requires_grad_(options["use_orig_params"])  # else a unit's parameters are alike
    for i, block in enumerate(net.blocks):
        net.blocks[i] = FSDP(block, **options)
    return FSDP(net, **options)


def gradients_of(module: FSDP) -> list[Tensor | None]:
    """This rank's part of every unit's gradient."""
    return [None if p.grad is None else p.grad for p in module.parameters()]


def equals_plain(rank: int, ranks: int, strategy: str, kind: str, how: str) -> list[bytes]:
    """With a codec that loses nothing, training is that of plain FSDP1, to the bit."""
    whole = ranks > 2
    options: dict[str, Any] = {
        "bfloat16": {"mixed_precision": MixedPrecision(torch.bfloat16, torch.float32)},
        "bfloat16_reduce": {"mixed_precision": MixedPrecision(torch.bfloat16, torch.bfloat16)},
        "flat": {"use_orig_params": False},
    }.get(kind, {})
    plain, ours = (wrapped(Net(whole=whole), strategy, **options) for _ in range(2))
    if how == "hook":
        state: Any = fsdp.CompressionState(Raw())
        ours.register_comm_hook(state, fsdp.compression_hook)
    else:
        state = fsdp.compress(ours, Raw(), min_numel=0)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (plain, ours)]
    for step in range(3):
        for net, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            for turn in range(2 if kind == "accumulate" else 1):
                with net.no_sync() if kind == "accumulate" and not turn else nullcontext():
                    loss_of(net, rank, 10 * step + turn, whole=whole).backward()
            if not whole:
                optimizer.step()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            where = f"{strategy}, {kind}, step {step}, {name}"
            first_difference(q, p, where)
            assert (p.grad is None) == (q.grad is None), where
            if p.grad is not None and q.grad is not None:
                first_difference(q.grad, p.grad, where)
    calls = state.stats()["gradients"]["calls"]
    assert calls == 9, calls
    if how == "compress":
        fsdp.restore(ours)
        loss_of(ours, rank, 0, whole=whole).backward()
        assert state.stats()["gradients"]["calls"] == calls
    with FSDP.summon_full_params(ours):
        return [bits(p) for p in ours.parameters()]
