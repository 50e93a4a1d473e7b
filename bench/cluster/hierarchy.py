"""All-reduce on two levels beside a flat one: several ranks per host, slow links between the hosts.

    sudo python bench/cluster/hierarchy.py --topology 2x2 --rate 1gbit --rtt-ms 10

Hosts are network namespaces (``netns.py``); the ranks of one talk over its loopback, which is fast.
All methods run in turns and the slowest rank counts; bytes are those that a host's interface sent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from command import at_least, common_options, launch, measured, work
from links import Network
from netns import Cluster
from rounds import Method, Report, ring_bytes, show, summarise
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import pydist


def methods_of(options: argparse.Namespace) -> dict[str, Method]:
    """What is compared; each on a tensor of its own."""
    mesh = init_device_mesh("cpu", (options.hosts, options.local))
    codec, inner = pydist.QSGD(4), pydist.BlockInt(8)
    generator = torch.Generator().manual_seed(dist.get_rank())
    start = torch.randn(options.numel, generator=generator)

    def method(reduce: Callable[[Tensor], object], predicted: float | None = None) -> Method:
        x = start.clone()
        return Method(
            call=lambda: reduce(x),
            reset=lambda: x.copy_(start),
            predicted=predicted,
            check=lambda: float(x.double().sum()),
        )

    def across(payload: float) -> float:
        return ring_bytes(options.hosts, payload)

    quantized = codec.payload_bytes(options.numel)
    return {
        "gloo fp32, flat": method(
            dist.all_reduce, ring_bytes(dist.get_world_size(), 4 * options.numel)
        ),
        "QSGD(4), flat": method(lambda x: pydist.all_reduce(x, codec)),
        "Raw inside, QSGD(4) across": method(
            lambda x: pydist.all_reduce(x, codec, group=mesh), across(quantized)
        ),
        "BlockInt(8) inside, QSGD(4) across": method(
            lambda x: pydist.all_reduce(x, codec, group=mesh, inner=inner), across(quantized)
        ),
        "Raw inside and across": method(
            lambda x: pydist.all_reduce(x, pydist.Raw(), group=mesh), across(4 * options.numel)
        ),
    }


def run(options: argparse.Namespace) -> Report:
    """Make the hosts, sum up and show what their ranks found."""
    network = Network.of(options)
    with Cluster(network) as cluster:
        rows = summarise(launch(cluster, __file__, options), options.local)
        drops = sum(count["drops"] for count in cluster.counters())
    show(rows, f"all-reduce of {options.numel:,}, {network}")
    return {"methods": rows, "packets_dropped": drops}


def main(arguments: Sequence[str]) -> int:
    """Makes the hosts, or is one of their ranks; returns the exit status."""
    if arguments[:1] == ["worker"]:
        return work(arguments[1], methods_of)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], parents=[common_options(hosts=2, local=2)]
    )
    parser.add_argument("--numel", type=at_least(1), default=4 * 1024 * 1024)
    parser.add_argument("--repeats", type=at_least(2), default=10)
    return measured(__file__, parser.parse_args(arguments), arguments, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
