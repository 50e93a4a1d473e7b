"""What ranks do in test_stand_in.py: the hook on a stand-in device beside the one on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import stand_in
import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp import CODECS, chunks_of
from ranks_gpu_hooks import RESUMED, Given, Trained, compared, gradients
from ranks_hierarchy import levels
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map

import pydist
from pydist.collectives.grid import grid
from pydist.transport.communicator import communicator


class Bucket:
    """DDP's bucket, on the device."""

    def __init__(self, bucket: Any) -> None:
        self._bucket = bucket

    def buffer(self) -> Tensor:
        return stand_in.OnDevice(self._bucket.buffer())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)


class OnStandIn(Trained):
    """The model's own gradients are on the CPU; its buckets say that they are on the device."""

    def __init__(self, *made: Any) -> None:
        self._made = made
        self.device, group, codec, dtype, options = made
        self.net = Given(dtype)
        self.ddp = DDP(self.net, bucket_cap_mb=0.004, process_group=group)
        usual = {"min_numel": 100, "seed": 7}
        self.state = pydist.ddp.CompressionState(
            codec, group=group, named_parameters=self.ddp, **usual | options
        )
        self.buckets = 0
        self.ddp.register_comm_hook(self.state, self._hook)

    def _hook(self, state, bucket):  # type: ignore[no-untyped-def]
        self.buckets += 1
        future = state._bind(stand_in.DEVICE).reduce_bucket(Bucket(bucket))
        return future.then(lambda done: bucket.buffer())

    def resumed(self) -> OnStandIn:
        """A new model that takes up the state."""
        again = OnStandIn(*self._made)
        again.state.load_state_dict(tree_map(_on_host, self.state.state_dict()))
        return again

    def step(self, given: list[Tensor]) -> list[bytes]:
        for p in self.net.parameters():
            p.grad = None
        self.ddp(given).backward()
        return [bits(p.grad) for p in self.net.parameters()]


def _on_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, stand_in.OnDevice) else x


def groups_of(ranks: int, device_side: bool) -> tuple[Any, Any]:
    """A group for the CPU and one for the device, whose messages stay there like NCCL's."""
    plain, other = (dist.new_group(list(range(ranks)), backend="gloo") for _ in range(2))
    communicator(other, "cuda").device_side = device_side
    return plain, other


def levels_of(ranks: int, local: int, device_side: bool) -> tuple[Any, Any]:
    """The same of two levels."""
    plain, other = levels(ranks, local), levels(ranks, local)
    for comm in grid(other, "cuda")._stages:
        comm.device_side = device_side
    return plain, other


def equals_cpu(
    rank: int, ranks: int, device_side: bool, cases: list[tuple[Any, ...]]
) -> list[list[bytes]]:
    """Gradients and what is kept, step by step."""
    results: list[list[bytes]] = []
    for name, dtype, options, chunk in cases:
        made = CODECS[name], getattr(torch, dtype), options
        plain, other = groups_of(ranks, device_side)
        with warnings.catch_warnings(), chunks_of(chunk), stand_in.device():
            warnings.simplefilter("ignore")
            here, there = Trained("cpu", plain, *made), OnStandIn("cuda:0", other, *made)
            found, there = compared(here, there, rank, ranks, f"{name} {dtype} {options}")
            results += found
            assert there.state.stats()["non_finite_steps"] == 1 - (RESUMED > 2)
    return results


def levels_equal_cpu(
    rank: int, ranks: int, local: int, device_side: bool, cases: list[tuple[Any, ...]]
) -> list[list[bytes]]:
    """The same on two levels."""
    results: list[list[bytes]] = []
    for name, dtype, options, chunk in cases:
        plain, other = levels_of(ranks, local, device_side)
        made = None, CODECS[name], getattr(torch, dtype)
        with warnings.catch_warnings(), chunks_of(chunk), stand_in.device():
            warnings.simplefilter("ignore")
            here = Trained("cpu", *made, options | {"mesh": plain})
            there = OnStandIn("cuda:0", *made, options | {"mesh": other})
            results += compared(here, there, rank, ranks, f"{name} {dtype} {options}")[0]
    return results


def counted(
    rank: int, ranks: int, device_side: bool, cases: list[tuple[str, Any, dict[str, Any]]]
) -> dict[str, tuple[int, dict[str, int], dict[str, int], dict[str, int]]]:
    """What a step does in its steady state, by name.

    Returns:
        Buckets, operations by name, waits by thread, lines that wait.
    """
    result = {}
    for name, codec, options in cases:
        _, other = groups_of(ranks, device_side)
        with warnings.catch_warnings(), stand_in.device() as counts:
            warnings.simplefilter("ignore")
            made = OnStandIn("cuda:0", other, codec, torch.float32, options)
            for step in range(10, 14):
                made.step(gradients(rank, step, False, torch.float32))
            made.buckets = 0
            with counts.counting():
                made.step(gradients(rank, 20, False, torch.float32))
            result[name] = (
                made.buckets, dict(counts.operations), dict(counts.waits), dict(counts.lines)
            )  # fmt: skip
    return result


def collectives(
    rank: int, ranks: int, device_side: bool, codecs: list[str], dtypes: list[str], local: int = 0
) -> list[list[bytes]]:
    """All collectives of some codecs, on two levels where nodes have ranks: the CPU's bits."""
    results = []
    for number, name in enumerate(codecs):
        codec = CODECS[name]
        dtype = getattr(torch, dtypes[number % len(dtypes)])
        made = levels_of(ranks, local, device_side) if local else groups_of(ranks, device_side)
        plain, other = made
        generator = torch.Generator().manual_seed(10 * number + rank)
        whole = torch.randn(ranks * 1001, generator=generator).to(dtype)
        with chunks_of(700), stand_in.device():
            found = []
            for group, put in ((plain, lambda x: x), (other, stand_in.OnDevice)):
                both, part = put(whole.clone()), put(whole[:1001].clone())
                gathered, share = put(whole.new_empty(ranks * 1001)), put(whole.new_empty(1001))
                pydist.all_gather(gathered, part, codec, group=group, seed=5)
                pydist.reduce_scatter(share, both, codec, group=group, seed=5)
                pydist.all_reduce(both, codec, group=group, seed=5)
                found.append([bits(x.cpu()) for x in (both, share, gathered)])
            assert found[1] == found[0], f"{name} {dtype}"
            results.append(found[0])
    return results
