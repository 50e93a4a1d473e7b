"""What ranks do in test_fsdp.py: bytes, checkpoints, errors of sharded training."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ranks_codecs import first_difference
from ranks_collectives import bits
from ranks_faults import raised_by, still_works
from ranks_fsdp import SMALL, Net, columns, held_by, local, loss_of, shard_sizes, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from pydist import QSGD, BlockInt, Sign, Ternary, TopK, fsdp
from pydist.fsdp import private
from pydist.fsdp.sharded import CompressedReduceScatter

BITS = {QSGD(4, block=64): (64, 32 + 4), BlockInt(8, block=32): (32, 32 + 4)}


def units_of(net: Net) -> list[Any]:
    groups = [private.groups_of(module)[0] for module in (net, *net.blocks)]
    return [group._reduce_scatter_comm.unit for group in groups]


def train(net: nn.Module, optimizer: Any, rank: int, steps: range, **options: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, rank, step, **options).backward()
        optimizer.step()


def _row_bytes(held: list[tuple[str, Any, int]], codec: Any, ranks: int) -> int:
    """Bytes of a message without its header."""
    block, block_bytes = BITS[codec]
    blocks, raw = [0] * ranks, [0] * ranks
    for _, shape, dim in held:
        for rank, n in enumerate(shard_sizes(shape, dim, ranks)[1]):
            if shape.numel() < SMALL:
                raw[rank] += 4 * n
            else:
                blocks[rank] += math.ceil(n / block)
    return max(blocks) * block_bytes + max(raw)


def bytes_as_predicted(rank: int, ranks: int) -> list[int]:
    """What stats() says, what was counted at the wire, and what the formula says are the same."""
    net = sharded(Net())
    gradients, parameters = BITS
    state = fsdp.compress(net, gradients, parameters, min_numel=SMALL)
    comm = state.communicator
    before = sum(comm.traffic.bytes_sent.values())
    train(net, torch.optim.SGD(net.parameters(), lr=0.01), rank, range(2))
    sent = sum(comm.traffic.bytes_sent.values()) - before
    stats = state.stats()
    wanted = {"gradients": 0, "parameters": 0}
    given = {name for name, p in net.named_parameters() if p.grad is not None}
    per_call = 3 * 16 * (ranks - 1)  # agreement, header and confirmation
    for unit in units_of(net):
        row = _row_bytes(held_by(unit, net, given), gradients, ranks)
        wanted["gradients"] += 2 * ((ranks - 1) * row + per_call)
        row = _row_bytes(held_by(unit, net), parameters, ranks)
        # The root keeps its weights between forward and backward.
        wanted["parameters"] += (2 if not unit.name else 4) * ((ranks - 1) * row + per_call)
    for direction, size in wanted.items():
        assert stats[direction]["wire_bytes"] == size, (direction, stats, wanted)
    assert sent == sum(wanted.values()), (sent, wanted)
    whole = sum((ranks - 1) * -(-p.shape[0] // ranks) * p[0].numel() * 4 for p in net.parameters())
    assert stats["parameters"]["raw_bytes"] > 2 * whole
    assert stats["gradients"]["ratio"] > 3 and stats["parameters"]["ratio"] > 2, stats
    return [sent]


def equal_weights(rank: int, ranks: int) -> list[bytes]:
    """All ranks compute with the same decoded weights; the shards keep what was lost."""
    net = sharded(Net())
    fsdp.compress(net, parameters=BlockInt(4, block=32))
    seen: list[Tensor] = []
    for block in net.blocks:
        block[1].register_forward_hook(lambda module, *_: seen.append(module.weight.clone()))
    train(net, torch.optim.SGD(net.parameters(), lr=0.01), rank, range(2))
    exact = dict(Net().named_parameters())["blocks.0.1.weight"]
    error = (seen[0] - exact).abs().max()
    assert 0 < error < exact.abs().max() / 7, error
    assert len({round(float(x), 6) for x in seen[2][0, :32]}) <= 15
    kept = dict(net.named_parameters())["blocks.0.1.weight"].full_tensor()
    assert len({float(x) for x in kept[0]}) > 15
    return [bits(x) for x in seen]


def not_finite(rank: int, ranks: int, codec: Any, feedback: bool) -> list[bytes]:
    """A NaN on one rank makes every unit's gradient NaN on all, and enters no residual."""
    net = sharded(Net())
    state = fsdp.compress(net, codec, error_feedback=feedback, min_numel=SMALL)
    loss_of(net, rank, 0).backward()
    net.zero_grad()
    loss = loss_of(net, rank, 1)
    (loss * float("nan") if rank == ranks - 1 else loss).backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            shard = local(p.grad)
            assert shard.isnan().all(), name
    assert state.stats()["gradients"]["non_finite"] == 3
    net.zero_grad()
    loss_of(net, rank, 2).backward()
    assert all(local(p.grad).isfinite().all() for p in net.parameters() if p.grad is not None)
    assert math.isfinite(state.stats()["residual_norm"])
    return [bits(p.grad.full_tensor()) for p in net.parameters() if p.grad is not None]


# --------------------------------------------------------------------------- checkpoints


def _training(seed: int = 5) -> tuple[Net, Any, Any]:
    net = sharded(Net(), shard_placement_fn=columns)
    state = fsdp.compress(
        net, QSGD(3, block=32), BlockInt(8, rounding="stochastic"), error_feedback=True,
        min_numel=SMALL, seed=seed,
    )  # fmt: skip
    return net, torch.optim.SGD(net.parameters(), lr=0.02), state


def resumes(rank: int, ranks: int, directory: str) -> list[bytes]:
    """Training that was saved and loaded goes on bit for bit; both kinds of checkpoint."""
    net, optimizer, state = _training()
    train(net, optimizer, rank, range(3))
    model = {name: p.full_tensor().detach().clone() for name, p in net.named_parameters()}
    saved = state.state_dict()
    assert saved["step"] == 9 and len(saved["parameters"]) > 3
    dcp.save({"residuals": state.sharded(), "model": net.state_dict()}, checkpoint_id=directory)
    train(net, optimizer, rank, range(3, 5))
    wanted = [local(p).clone() for p in net.parameters()]
    for way in ("file", "distributed"):
        fresh, optimizer, other = _training()
        train(fresh, optimizer, rank, range(7, 8))  # state that loading must replace
        if way == "file":
            for name, p in fresh.named_parameters():
                whole = distribute_tensor(model[name], p.device_mesh, p.placements)
                local(p.data).copy_(whole.to_local())
            other.load_state_dict(saved)
        else:
            held = fresh.state_dict()
            dcp.load({"residuals": other.sharded(), "model": held}, checkpoint_id=directory)
        train(fresh, optimizer, rank, range(3, 5))
        for (name, p), q in zip(fresh.named_parameters(), wanted, strict=True):
            first_difference(local(p), q, f"{way}: {name}")
    return []


def residuals_of(rank: int, ranks: int) -> dict[str, Any]:
    """A rank's state after some steps, as NumPy arrays."""
    net, optimizer, state = _training()
    train(net, optimizer, rank, range(2))
    saved = state.state_dict()
    saved["parameters"] = {
        name: entry["residual"].numpy().copy() for name, entry in saved["parameters"].items()
    }
    return saved


def takes_over(rank: int, ranks: int, states: list[dict[str, Any]]) -> None:
    """A world of another size: every rank takes the sum over the old ranks, over their number."""
    net, optimizer, state = _training()
    for one in states:
        one["parameters"] = {
            name: {"residual": torch.from_numpy(x)} for name, x in one["parameters"].items()
        }
    state.load_state_dict(states)
    got = state.state_dict()["parameters"]
    for name, entry in got.items():
        total = sum(one["parameters"][name]["residual"] for one in states)
        first_difference(entry["residual"], total / len(states), name)
    train(net, optimizer, rank, range(1))
    alone = raised_by(lambda: state.load_state_dict(states[0]))
    assert alone[0] == "ValueError" and f"give the states of all {len(states)}" in alone[1], alone


# --------------------------------------------------------------------------- what goes past


def past_pydist(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    """Calls that cannot be compressed work, and are counted with their reason."""
    net = Net()
    if kind == "dtypes":
        net.frozen.data = net.frozen.data.bfloat16()
    if kind == "double":
        net.double()
    sharded(net, **({"reshard_after_forward": 2} if kind == "smaller_mesh" else {}))
    state = fsdp.compress(net, QSGD(4, block=64), BlockInt(8, block=64), min_numel=SMALL)
    if kind == "unwatched":
        for module in (net, *net.blocks):
            private.unwatch_backward(private.groups_of(module)[0])
    train(net, torch.optim.SGD(net.parameters(), lr=0.01), rank, range(2))
    assert all(local(p).isfinite().all() for p in net.parameters())
    stats = state.stats()
    return {name: stats[name]["uncompressed"] for name in ("gradients", "parameters")}


# --------------------------------------------------------------------------- errors


def disagreement(rank: int, ranks: int, how: str) -> tuple[str, str]:
    """Ranks that do not do the same all raise; nothing hangs."""
    net = sharded(Net())
    if how == "codec":
        codec = QSGD(4) if rank else QSGD(8)
        result = raised_by(lambda: fsdp.compress(net, codec))
    else:
        fsdp.compress(net, QSGD(4))
        result = raised_by(lambda: loss_of(net, rank, 0, side=rank == 1).backward())
    still_works(rank, ranks)
    return result


def misuse(rank: int, ranks: int) -> list[tuple[str, str]]:
    """What is wrong on all ranks raises at once."""
    net, plain = sharded(Net()), Net()
    codec = QSGD(4)
    results = [
        raised_by(lambda: fsdp.compress(net)),
        raised_by(lambda: fsdp.compress(net, "QSGD")),  # type: ignore[arg-type]
        raised_by(lambda: fsdp.compress(plain, codec)),
        raised_by(lambda: fsdp.compress(net, Sign(None), error_feedback=True)),
        raised_by(lambda: fsdp.compress(net, parameters=codec, error_feedback=True)),
        raised_by(lambda: fsdp.compress(net, codec, seed=-1)),
        raised_by(lambda: fsdp.restore(net)),
        raised_by(lambda: fsdp.CompressionState(codec, error_feedback=True)),
        raised_by(lambda: fsdp.compress(net, TopK())),
        raised_by(lambda: fsdp.compress(net, Ternary(), error_feedback=True)),
        raised_by(lambda: fsdp.compress(net, parameters=TopK(0.5))),
    ]
    state = fsdp.compress(net, codec, error_feedback=True)
    numel = sum(p.numel() for n, p in Net().named_parameters() if p.numel() >= 1024)
    assert state.residual_bytes == 4 * numel
    results.append(raised_by(lambda: fsdp.compress(net, codec)))
    fsdp.restore(net)
    groups = [private.groups_of(module)[0] for module in (net, *net.blocks)]
    assert not any(isinstance(g._reduce_scatter_comm, CompressedReduceScatter) for g in groups)
    assert not any("post_backward" in vars(g) for g in groups)
    still_works(rank, ranks)
    return results


def several_meshes(rank: int, ranks: int) -> tuple[str, str]:
    """PyTorch takes no custom communication where a module has several parameter groups."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    whole = init_device_mesh("cpu", (ranks,))
    part = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("across", "inside"))["inside"]
    net = nn.Linear(8, 8)
    infos = [FSDPMeshInfo(mesh, 0) for mesh in (whole, part)]
    fully_shard(
        net, mesh=whole,
        shard_placement_fn=lambda p: ShardPlacementResult(Shard(0), infos[p.ndim == 1]),
    )  # fmt: skip
    return raised_by(lambda: fsdp.compress(net, QSGD(4)))
