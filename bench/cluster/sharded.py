"""Training steps of a sharded model between hosts behind slow links: FSDP2, and HSDP.

    sudo python bench/cluster/sharded.py --hosts 4 --rate 1gbit           # FSDP2, a rank per host
    sudo python bench/cluster/sharded.py --topology 2x2 --rate 100mbit    # HSDP, sharded in hosts

Hosts are network namespaces (``netns.py``); the ranks of one talk over its loopback, which is fast.
All methods make the same step in turns, with a model of their own: forward, backward, update. The
slowest rank counts; bytes are those that a host's interface sent, beside the prediction.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import ClusterError, Network, network_options
from netns import Cluster
from rounds import Method, Report, count_bytes, go_first, interleave, ring_bytes, show, summarise
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import WIDTHS, model_of

import pydist
from pydist.bench.machine import machine

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


def measure(options: argparse.Namespace) -> None:
    """Runs on each rank, and writes what it found."""
    torch.set_num_threads(1)
    if options.realtime:
        go_first()
    dist.init_process_group("gloo")
    shape = (1, options.hosts) if options.local == 1 else (options.hosts, options.local)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("across", "inside"))
    methods = {
        name: make(method, mesh, options.batch)
        for name, method in methods_of(options.local).items()
        if not options.methods or name in options.methods
    }
    times = interleave(methods, options.repeats)
    report: Report = {
        name: {
            "times": times[name], "check": method.check(), "predicted": method.predicted,
            "sent": count_bytes(method),
        }
        for name, method in methods.items()
    }  # fmt: skip
    Path(options.folder, f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def launch(options: argparse.Namespace, folder: str) -> Report:
    """Makes the hosts and sums up what their ranks found."""
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--folder", folder]
    network = Network.of(options)
    with Cluster(network) as cluster:
        cluster.run(command, environment, timeout=options.timeout)
        drops = sum(count["drops"] for count in cluster.counters())
    reports = [
        json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(network.ranks)
    ]
    rows = summarise(reports, options.local)
    show(rows, f"step of {'FSDP2' if options.local == 1 else 'HSDP'}, {network}")
    return {"methods": rows, "packets_dropped": drops}


def main() -> int:
    """Makes the hosts, or is one of their ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[network_options()],
    )
    parser.add_argument("--batch", type=int, default=8, help="samples a rank and step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--methods", nargs="*", default=[], help="default: all")
    parser.add_argument("--realtime", action="store_true", help="ahead of other processes")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats must be at least 2")
    if unknown := set(options.methods) - set(methods_of(options.local)):
        parser.error(
            f"--methods: unknown {sorted(unknown)}, have {list(methods_of(options.local))}"
        )
    if options.folder:
        measure(options)
        return 0
    record: Report = {
        "command": shlex.join(["python", "bench/cluster/sharded.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    try:
        record |= Network.of(options).record()
        with tempfile.TemporaryDirectory() as folder:
            record |= launch(options, folder)
    except ClusterError as error:
        print(f"sharded.py: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
