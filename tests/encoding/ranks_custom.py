"""What ranks do in test_custom_codecs.py: codecs that are written in Python."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ranks_collectives import bits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist
from pydist import BlockInt, ops
from pydist.transport import exchange

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "custom_codec"))

from natural import Natural

TWIN = BlockInt(4, block=32)


@dataclass(frozen=True)
class Same(pydist.Codec):
    """Blocks as the kernels make them: equal to its twin wherever it goes."""

    block = TWIN.block
    contracts = True

    def payload_bytes(self, n: int) -> int:
        return TWIN.block_format.payload_bytes(n)

    def encode(self, x: Tensor) -> Tensor:
        return ops.quantize(x, TWIN)

    def decode(self, payload: Tensor, n: int) -> Tensor:
        return ops.dequantize(payload, TWIN, n)


@dataclass(frozen=True)
class Scaled(pydist.Codec):
    """NumPy: of each block a scale, then signed bytes."""

    block: int = 96

    def payload_bytes(self, n: int) -> int:
        return n + 4 * -(-n // self.block)

    def encode(self, x: Tensor) -> Any:
        parts = []
        for values in np.split(x.numpy(), range(self.block, x.numel(), self.block)):
            scale = (np.abs(values).max(initial=0) / np.float32(127)).astype("<f4")
            codes = np.rint(values / scale) if scale > 0 else np.zeros_like(values)
            parts += [
                np.atleast_1d(scale.astype("<f4")).view(np.uint8),
                codes.astype(np.int8).view(np.uint8),
            ]
        return np.concatenate(parts) if x.numel() else np.empty(0, np.uint8)

    def decode(self, payload: Tensor, n: int) -> Any:
        data, values = payload.numpy(), []
        for begin in range(0, n, self.block):
            at, size = begin + 4 * (begin // self.block), min(self.block, n - begin)
            scale = data[at : at + 4].copy().view("<f4")
            values.append(data[at + 4 : at + 4 + size].view(np.int8).astype(np.float32) * scale)
        return np.concatenate(values) if n else np.empty(0, np.float32)


CODECS = {
    "same": Same(),
    "natural": Natural(),
    "nearest": Natural(stochastic=False),
    "scaled": Scaled(),
}


def some(rank: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(n, generator=generator).to(dtype)


def equals_simulate(rank: int, ranks: int, name: str, n: int, dtype: torch.dtype) -> list[bytes]:
    """All three collectives give what ``pydist.simulate`` says, in several chunks."""
    codec, found = CODECS[name], []
    every = [some(r, n, dtype) for r in range(ranks)]
    with mock.patch.object(exchange, "CHUNK_BYTES", 4096):
        for algorithm in ("two_phase", "all_gather"):
            x = every[rank].clone()
            pydist.all_reduce(x, codec, seed=3, step=5, algorithm=algorithm)
            assert bits(x) == bits(pydist.simulate.all_reduce(every, codec, seed=3, step=5))
            found.append(bits(x))
        whole = [some(r, n * ranks, dtype, 1) for r in range(ranks)]
        share = torch.empty(n, dtype=dtype)
        pydist.reduce_scatter(share, whole[rank].clone(), codec, op="sum", seed=3, step=6)
        wanted = pydist.simulate.reduce_scatter(whole, codec, op="sum", seed=3, step=6)
        assert bits(share) == bits(wanted[rank])
        gathered = torch.empty(ranks * n, dtype=dtype)
        pydist.all_gather(gathered, every[rank].clone(), codec, seed=3, step=7)
        wanted_all = pydist.simulate.all_gather(every, codec, seed=3, step=7)
        assert bits(gathered) == bits(wanted_all.view(-1))
        found.append(bits(gathered))
    return found


def _net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 11, bias=False))


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x = some(rank, 4 * 13, torch.float32, 10 + step).view(4, 13)
    net(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _trained_ddp(rank: int, codec: pydist.Codec, options: dict[str, Any]) -> bytes:
    net = DDP(_net(), bucket_cap_mb=0.001)
    state = pydist.ddp.compress(net, codec, warmup_steps=0, min_numel=1, seed=2, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step in range(4):
        _step(net, optimizer, rank, step)
    saved = copy.deepcopy(state.state_dict())
    state.load_state_dict(saved)
    _step(net, optimizer, rank, 4)
    assert state.stats()["wire_bytes"] > 0
    return b"".join(bits(p.detach()) for p in net.parameters())


def ddp_equals_twin(rank: int, ranks: int, options: dict[str, Any]) -> bytes:
    """DDP trains bit-identically with the codec and with its twin of kernels."""
    same, twin = (_trained_ddp(rank, codec, options) for codec in (Same(), TWIN))
    assert same == twin
    return same


def ddp_trains(rank: int, ranks: int, name: str) -> bytes:
    """And with any other, all ranks stay alike."""
    return _trained_ddp(rank, CODECS[name], {})


def _trained_fsdp(rank: int, codec: pydist.Codec, options: dict[str, Any]) -> bytes:
    net = _net()
    fully_shard(net)
    pydist.fsdp.compress(net, **dict.fromkeys(options.pop("what"), codec), **options, min_numel=1)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step in range(4):
        _step(net, optimizer, rank, step)
    return b"".join(bits(p.full_tensor().detach()) for p in net.parameters())


def fsdp_equals_twin(
    rank: int, ranks: int, what: tuple[str, ...], options: dict[str, Any]
) -> bytes:
    """FSDP2 trains bit-identically with the codec and with its twin, gradients and weights."""
    same, twin = (_trained_fsdp(rank, codec, {"what": what, **options}) for codec in (Same(), TWIN))
    assert same == twin
    return same


def optimizer_equals_twin(rank: int, ranks: int) -> bytes:
    """1-bit Adam's compressed momenta, with error feedback on both sides."""
    results = []
    for codec in (Same(), TWIN):
        net = _net()
        optimizer = pydist.optim.OneBitAdam(net.parameters(), 0.01, warmup_steps=2, codec=codec)
        for step in range(5):
            _step(net, optimizer, rank, step)
        results.append(b"".join(bits(p.detach()) for p in net.parameters()))
    assert results[0] == results[1]
    return results[0]


def not_finite(rank: int, ranks: int) -> list[bool]:
    """NaN on one rank is NaN on all."""
    x = some(rank, 3000, torch.float32)
    if rank == ranks - 1:
        x[7] = float("inf")
    pydist.all_reduce(x, Natural())
    return [bool(x.isnan().all())]


@dataclass(frozen=True)
class Longer(Same):
    """Lies about its sizes on one rank."""

    liar: int = -1

    def encode(self, x: Tensor) -> Tensor:
        payload = super().encode(x)
        return payload[:-4] if dist.get_rank() == self.liar else payload


def lies(rank: int, ranks: int) -> str:
    """A payload of a wrong size is an error on every rank, and nothing hangs."""
    group = dist.new_group()  # which breaks
    try:
        pydist.all_reduce(some(rank, 3000, torch.float32), Longer(liar=1), group=group)
    except (ValueError, pydist.PydistError) as error:
        return str(error)
    return ""


def disagrees(rank: int, ranks: int) -> str:
    """Ranks with other codecs learn so before anything is sent."""
    x = some(rank, 100, torch.float32)
    try:
        pydist.all_reduce(x, Natural(stochastic=rank == 0))
    except pydist.MismatchError as error:
        assert torch.equal(x, some(rank, 100, torch.float32))
        return str(error)
    return ""


def shards_without_elements(rank: int, ranks: int, codec: pydist.Codec) -> bytes:
    """Chunks whose last shards are empty; and DDP with residuals of such shares."""
    with mock.patch.object(exchange, "CHUNK_BYTES", 5 * 32):
        x = some(rank, 4 * 5 * 3 + 1, torch.float32)
        pydist.all_reduce(x, codec, algorithm="two_phase")
    return bits(x) + _trained_ddp(rank, codec, {"error_feedback": True})


def other_blocks(rank: int, ranks: int) -> str:
    """What a codec's repr does not say is compared, too."""
    with mock.patch.object(Same, "block", 96 if rank else 32):
        try:
            pydist.all_reduce(some(rank, 300, torch.float32), Same())
        except pydist.MismatchError as error:
            return str(error)
    return ""
