"""All-reduce on two levels beside a flat one: several ranks per host, slow links between the hosts.

    sudo python bench/cluster/hierarchy.py --topology 2x2 --rate 1gbit --rtt-ms 10

Hosts are network namespaces (``netns.py``); the ranks of one talk over its loopback, which is fast.
Every method runs once a round, the slowest rank counts, and ratios are those of a round to gloo's
all-reduce; bytes are those that a host's interface sent.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from links import ClusterError, Network, network_options
from netns import Cluster
from rounds import sent_bytes
from torch.distributed.device_mesh import init_device_mesh

import pydist


def methods_of(numel: int, local: int) -> dict[str, Callable[[], object]]:
    """What is compared; each on a tensor of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // local, local))
    codec, inner = pydist.QSGD(4), pydist.BlockInt(8)
    xs = [torch.randn(numel) for _ in range(5)]
    return {
        "gloo fp32, flat": lambda: dist.all_reduce(xs[0].div_(dist.get_world_size())),
        "QSGD(4), flat": lambda: pydist.all_reduce(xs[1], codec),
        "Raw inside, QSGD(4) across": lambda: pydist.all_reduce(xs[2], codec, group=mesh),
        "BlockInt(8) inside, QSGD(4) across": lambda: pydist.all_reduce(
            xs[3], codec, group=mesh, inner=inner
        ),
        "Raw inside and across": lambda: pydist.all_reduce(xs[4], pydist.Raw(), group=mesh),
    }


def measure(options: argparse.Namespace) -> None:
    """Runs on each rank; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    methods = methods_of(options.numel, options.local)
    times: dict[str, list[float]] = {name: [] for name in methods}
    sent: dict[str, int] = {}
    for turn in range(options.repeats + 1):  # the first makes connections
        for name, run in methods.items():
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            run()
            took = torch.tensor([time.perf_counter() - start])
            dist.barrier()
            sent[name] = sent_bytes() - before
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn:
                times[name].append(float(took))
    if dist.get_rank() == 0:
        base = times["gloo fp32, flat"]
        for name, took in times.items():
            ratio = statistics.median(b / t for b, t in zip(base, took, strict=True))
            print(
                f"{name:36} {1e3 * statistics.median(took):8.1f} ms  {ratio:5.1f}x  "
                f"{sent[name] / 1e6:7.2f} MB a host"
            )
    dist.destroy_process_group()


def main() -> int:
    """Makes the hosts, or is one of their ranks."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], parents=[network_options(hosts=2, local=2)]
    )
    parser.add_argument("--numel", type=int, default=4 * 1024 * 1024)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return 0
    try:
        network = Network.of(options)
        print(network)
        with Cluster(network) as cluster:
            cluster.run([sys.executable, __file__, *sys.argv[1:]], echo=True)
    except ClusterError as error:
        print(f"hierarchy.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
