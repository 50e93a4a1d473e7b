"""Training steps of a sharded model between hosts behind slow links: FSDP2, and HSDP.

    sudo python bench/cluster/sharded.py --hosts 4 --rate 1gbit           # FSDP2, a rank per host
    sudo python bench/cluster/sharded.py --topology 2x2 --rate 100mbit    # HSDP, sharded in hosts

Hosts are network namespaces (``netns.py``); the ranks of one talk over its loopback, which is fast.
All methods make the same step in turns, with a model of their own: forward, backward, update. The
slowest rank counts; bytes are those that a host's interface sent, beside the prediction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from command import at_least, common_options, launch, measured, work
from links import Network
from netns import Cluster
from rounds import Method, Report, ring_bytes, show, summarise
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import WIDTHS, model_of

import pydist

Codec = Any
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
FP32 = MixedPrecisionPolicy()


@dataclass(frozen=True)
class Sharded:
    """How one method trains.

    Attributes:
        policy: FSDP2's dtypes.
        gradients: Codec of the reduce-scatter; ``None``: as FSDP2 sends them.
        weights: Codec of the all-gather, likewise.
        across: Codec between replicas, or ``"votes"``; ``None``: FSDP2's own all-reduce.
    """

    policy: MixedPrecisionPolicy
    gradients: Codec = None
    weights: Codec = None
    across: Codec = None

    def bytes_a_value(self, codec: Codec) -> float:
        """Bytes that a value takes in a long message."""
        if codec is None:
            return 2.0 if self.policy.param_dtype else 4.0
        form = codec.block_format
        return float(form.payload_bytes(1 << 20)) / (1 << 20)

    def predicted(self, hosts: int, local: int, parameters: int) -> float:
        """Payload bytes a host sends in a step.

        With a rank per host: every weight is gathered twice, in forward and in backward, and every
        gradient reduced and scattered. With more, shards travel inside a host, and only what
        replicas exchange leaves it.
        """
        if local == 1:
            share = (hosts - 1) / hosts * parameters
            weights, gradients = map(self.bytes_a_value, (self.weights, self.gradients))
            return share * (2 * weights + gradients)
        each = 1 / 8 if self.across == "votes" else self.bytes_a_value(self.across)
        return ring_bytes(hosts, parameters * each)


def methods_of(local: int) -> dict[str, Sharded]:
    """What is compared."""
    qsgd, integers = pydist.QSGD, pydist.BlockInt
    if local == 1:
        return {
            "FSDP2 fp32": Sharded(FP32),
            "FSDP2 bf16": Sharded(BF16),
            "8 bits": Sharded(BF16, qsgd(8), integers(8)),
            "4 bits, weights 8": Sharded(BF16, qsgd(4), integers(8)),
            "4 bits": Sharded(BF16, qsgd(4), integers(4)),
            "1 bit, weights 4": Sharded(BF16, pydist.Sign("l1"), integers(4)),
        }
    return {
        "HSDP fp32": Sharded(FP32),
        "HSDP bf16": Sharded(BF16),
        "QSGD(8) across": Sharded(FP32, across=qsgd(8)),
        "QSGD(4) across": Sharded(FP32, across=qsgd(4)),
        "votes across": Sharded(FP32, across="votes"),
    }


def make(method: Sharded, mesh: DeviceMesh, batch: int) -> Method:
    """A model, its optimizer and its step."""
    replicas = mesh["across"].size()
    plain = method.across is None and replicas > 1
    shards = mesh if plain else mesh["inside"]
    net = model_of()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=shards, mp_policy=method.policy)
    fully_shard(net, mesh=shards, mp_policy=method.policy)
    group = mesh["across"].get_group()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    if method.across == "votes":
        optimizer = pydist.optim.DistributedLion(net.named_parameters(), lr=1e-4, group=group)
    elif method.across is not None:
        pydist.fsdp.compress(net, across=method.across, across_group=group)
    if method.gradients is not None:
        pydist.fsdp.compress(net, gradients=method.gradients, parameters=method.weights)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    inputs = torch.randn(batch, WIDTHS[0], generator=generator)
    targets = torch.randint(WIDTHS[-1], (batch,), generator=generator)
    same = torch.ones(1, WIDTHS[0])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs).float(), targets).backward()
        optimizer.step()

    def check() -> float:
        with torch.no_grad():
            return float(net(same).double().sum())

    parameters = sum(p.numel() for p in net.parameters())
    hosts, local = (replicas, mesh["inside"].size()) if replicas > 1 else (dist.get_world_size(), 1)
    predicted = method.predicted(hosts, local, parameters)
    return Method(call=step, reset=lambda: None, predicted=predicted, check=check)


def all_methods(options: argparse.Namespace) -> dict[str, Method]:
    """What was asked for, on the mesh of all ranks."""
    shape = (1, options.hosts) if options.local == 1 else (options.hosts, options.local)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("across", "inside"))
    return {
        name: make(method, mesh, options.batch)
        for name, method in methods_of(options.local).items()
        if not options.methods or name in options.methods
    }


def run(options: argparse.Namespace) -> Report:
    """Make the hosts, sum up and show what their ranks found."""
    network = Network.of(options)
    with Cluster(network) as cluster:
        rows = summarise(launch(cluster, __file__, options), options.local)
        drops = sum(count["drops"] for count in cluster.counters())
    show(rows, f"step of {'FSDP2' if options.local == 1 else 'HSDP'}, {network}")
    return {"methods": rows, "packets_dropped": drops}


def main(arguments: Sequence[str]) -> int:
    """Makes the hosts, or is one of their ranks; returns the exit status."""
    if arguments[:1] == ["worker"]:
        return work(arguments[1], all_methods)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options()],
    )
    parser.add_argument("--batch", type=at_least(1), default=8, help="samples a rank and step")
    parser.add_argument("--repeats", type=at_least(2), default=10)
    parser.add_argument("--methods", nargs="*", default=[], help="default: all")
    options = parser.parse_args(arguments)
    if unknown := set(options.methods) - set(methods_of(options.local)):
        parser.error(
            f"--methods: unknown {sorted(unknown)}, have {list(methods_of(options.local))}"
        )
    return measured(__file__, options, arguments, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
