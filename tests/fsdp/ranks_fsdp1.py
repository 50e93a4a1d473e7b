"""What ranks do in test_fsdp.py: FSDP1 with a communication hook."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks_codecs import expected_all_reduce, expected_reduce_scatter, first_difference
from ranks_collectives import bits
from ranks_fsdp import SMALL, Net, Oracle, chunks_of, loss_of
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from pydist import Raw, fsdp
from pydist.fsdp import private_flat as private
from pydist.reference.signs import round_to

CPU = torch.device("cpu")


def wrapped(net: Net, strategy: str, **options: Any) -> FSDP:
    """Every block a unit, and the rest."""
    options = {"device_id": CPU, "use_orig_params": True, **options}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if not options["use_orig_params"]:  # a unit's parameters are then all trained, or none
        net.frozen.requires_grad_(True)
    for i, block in enumerate(net.blocks):
        net.blocks[i] = FSDP(block, **options)
    return FSDP(net, **options)


def gradients_of(module: FSDP) -> list[Tensor | None]:
    """This rank's part of every unit's gradient."""
    return [None if p.grad is None else p.grad for p in module.parameters()]


def equals_plain(rank: int, ranks: int, strategy: str, kind: str, how: str) -> list[bytes]:
    """With a codec that loses nothing, training is that of plain FSDP1, bit for bit."""
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


def _held(unit: FSDP, name: str, row: int, ranks: int) -> list[tuple[str, int, list[Any]]]:
    """Names, sizes and by rank the cuts (row's begin and end, parameter's first) of parameters."""
    flat: Any = unit._handle.flat_param  # type: ignore[union-attr]
    prefix = name.replace("_fsdp_wrapped_module.", "")
    numels = dict(zip(flat._fqns, flat._numels, strict=True))
    starts, at, names = {}, 0, iter(flat._fqns)
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            starts[next(names)] = at
        at += numel
    held = []
    for one, numel in numels.items():
        cuts = []
        for rank in range(ranks):
            begin = max(starts[one], rank * row)
            end = min(starts[one] + numel, (rank + 1) * row)
            cuts.append((begin - rank * row, max(0, end - begin)))
        full = f"{prefix}.{one}" if prefix else one
        held.append((full.replace("_fsdp_wrapped_module.", ""), numel, cuts))
    return held


@chunks_of(1500)
def equals_reference(rank: int, ranks: int, codec: Any, feedback: bool) -> list[bytes]:
    """Every unit's reduction is what the specification says, parameter by parameter."""
    net = wrapped(Net(), "FULL_SHARD")
    state = fsdp.compress(net, codec, seed=9, min_numel=SMALL, error_feedback=feedback)
    log: list[Any] = []

    def recorded(unit: Any, grad: Tensor, output: Tensor) -> None:
        step, given = state.step, grad.clone()
        fsdp.compression_hook(unit, grad, output)
        log.append((unit, given, output.clone(), step))

    names = {}
    for name, unit in private.units_of(net):
        unit._comm_hook = recorded
        names[id(unit._comm_hook_state)] = (name, unit)
    ordinals = {name: i for i, name in enumerate(state.parameters.names)}
    oracle = Oracle(ranks, ordinals, codec, 9, feedback)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        for unit, x, out, number in log:
            inputs: list[Any] = [None] * ranks
            dist.all_gather_object(inputs, x)
            wanted = np.zeros(out.numel(), dtype=np.float32)
            name, module = names[id(unit)]
            for one, numel, cuts in _held(module, name, out.numel(), ranks):
                most = max(n for _, n in cuts)
                shards = [
                    [a.view(ranks, -1)[row, max(at, 0) : max(at, 0) + n].numpy() for a in inputs]
                    for row, (at, n) in enumerate(cuts)
                ]
                oracle.share_scalers(one, shards)
                for row, ((begin, n), parts) in enumerate(zip(cuts, shards, strict=True)):
                    total = oracle._sum(
                        one, parts, oracle.first(most, row), numel, step=number, mean=True,
                        small=SMALL, dtype="float32",
                    )  # fmt: skip
                    if row == rank and n:
                        wanted[begin : begin + n] = total
            got = torch.from_numpy(round_to(wanted, "float32"))
            first_difference(out, got, f"{codec}, step {step}, {name!r}")
        assert len(log) == 3
        log.clear()
        optimizer.step()
    if feedback:
        check_residuals(state, oracle, rank)
    with FSDP.summon_full_params(net):
        return [bits(p) for p in net.parameters()]


def check_residuals(state: Any, oracle: Oracle, rank: int) -> None:
    """A rank's residuals, parameter by parameter, are the oracle's shards side by side."""
    assert oracle.residuals is not None
    saved = state.state_dict()["parameters"]
    assert saved and set(saved) == {name for name, _, _ in oracle.residuals}
    for name, entry in saved.items():
        shards = {f: x for (n, f, r), x in oracle.residuals.items() if (n, r) == (name, rank)}
        wanted = np.concatenate([shards[first] for first in sorted(shards)])
        first_difference(
            entry["residual"].reshape(-1), torch.from_numpy(wanted), f"residual of {name}"
        )


def hook_equals_flat(rank: int, ranks: int, codec: Any, strategy: str) -> list[bytes]:
    """With one state for all units a gradient is one tensor, as in pydist's own collectives."""
    net = wrapped(Net(), strategy)
    state = fsdp.CompressionState(codec, seed=4)
    log: list[Any] = []

    def recorded(state: Any, grad: Tensor, output: Tensor | None = None) -> None:
        step, given = state.step, grad.clone()
        fsdp.compression_hook(state, grad, output)
        log.append((given, grad.clone() if output is None else output.clone(), step))

    net.register_comm_hook(state, recorded)
    for step in range(2):
        loss_of(net, rank, step).backward()
    assert len(log) == 6 and [entry[2] for entry in log] == list(range(6))
    for x, out, step in log:
        inputs: list[Any] = [None] * ranks
        dist.all_gather_object(inputs, x)
        if strategy == "NO_SHARD":
            wanted = expected_all_reduce(inputs, codec, op="mean", seed=4, step=step)
        else:
            # Every share counts as one of the same parameter; the wider rule needs other draws.
            assert not codec.block_format.stochastic
            whole = expected_reduce_scatter(inputs, codec, op="mean", seed=4, step=step)
            wanted = whole.view(ranks, -1)[rank]
        first_difference(out, wanted, f"{codec}, {strategy}, step {step}")
    return [] if strategy != "NO_SHARD" else [bits(out) for _, out, _ in log]
