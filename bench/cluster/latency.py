"""Calls on few elements between hosts that are far apart: how many round trips they take.

    sudo python bench/cluster/latency.py --hosts 8 --rate 100mbit --rtt-ms 0.2 10 50 100
    sudo python bench/cluster/latency.py --checkouts OLD . --rtt-ms 0 50     # two releases in turn

Methods take turns, several calls one behind the other each time, and so do checkouts, each in
processes of its own on the same links. Shown is the median of the slowest host; "RTT" is what is
left of it without the bytes' own time on the wire, over the round trip.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from links import ClusterError, Network, network_options
from netns import Cluster
from rounds import go_first

CALLS = 8


def methods_of(numel: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """What is compared: bytes of a payload, and the call."""
    import torch
    import torch.distributed as dist

    import pydist

    votes, x, raw = (torch.randn(numel) for _ in range(3))
    sign, levels = pydist.Sign(None), pydist.QSGD(4)
    return {
        "torch fp32": (4.0 * numel, lambda: dist.all_reduce(raw.mul_(0.5))),
        "vote": (numel / 8, lambda: pydist.all_reduce(votes, sign, op="vote")),
        "QSGD(4)": (numel / 2, lambda: pydist.all_reduce(x, levels)),
    }


def measure(options: argparse.Namespace) -> None:
    """Runs on each host: prints the seconds of a call, by method, as JSON."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if options.realtime:
        go_first()
    dist.init_process_group("gloo")
    found: dict[str, list[float]] = {}
    for turn in range(-1, options.repeats):  # the first makes connections
        for name, (_, call) in methods_of(options.numel).items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn >= 0:
                found.setdefault(name, []).append((time.perf_counter() - start) / CALLS)
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(options: argparse.Namespace, rtt_ms: float) -> dict[str, Any]:
    """Measures at one round trip; milliseconds a call, by checkout and method."""
    network = Network(options.hosts, options.rate, rtt_ms)
    rows: dict[str, Any] = {}
    with Cluster(network) as cluster:
        for _ in range(options.rounds):
            for checkout in options.checkouts:
                environment = {"PYTHONPATH": str(checkout.resolve())}
                arguments = ["--numel", str(options.numel), "--repeats", str(options.repeats)]
                arguments += ["--realtime"] if options.realtime else []
                command = [sys.executable, __file__, *arguments]
                reports = [
                    json.loads(done.stdout.splitlines()[-1])
                    for done in cluster.run(command, environment)
                ]
                for name in reports[0]:
                    slowest = [
                        1e3 * max(times)
                        for times in zip(*(report[name] for report in reports), strict=True)
                    ]
                    rows.setdefault(name, {}).setdefault(str(checkout), []).extend(slowest)
    return rows


def show(options: argparse.Namespace, rtt_ms: float, rows: dict[str, Any]) -> None:
    """Prints a line for each method: milliseconds and round trips, by checkout."""
    bytes_of = {"torch fp32": 4.0, "vote": 1 / 8, "QSGD(4)": 1 / 2}
    rate = Network(options.hosts, options.rate).outer.rate
    for name, times in rows.items():
        payload = 2 * (options.hosts - 1) / options.hosts * bytes_of[name] * options.numel
        wire = 8e3 * payload / rate
        line = f"{options.hosts} hosts, {rtt_ms:5g} ms  {name:11} wire {wire:6.2f} ms "
        for found in times.values():
            median = statistics.median(found)
            line += f" {median:8.2f} ms"
            line += f" ({(median - wire) / rtt_ms:5.2f} RTT)" if rtt_ms else ""
        if len(times) > 1:
            first, *_, last = map(statistics.median, times.values())
            line += f"  ratio {last / first:.2f}"
        print(line, flush=True)


def main() -> int:
    """Makes the hosts, or is one of their ranks."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], parents=[network_options(hosts=8)],
        conflict_handler="resolve",
    )  # fmt: skip
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[0.2, 10, 50, 100])
    parser.add_argument("--numel", type=int, default=64 * 1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="turns of the checkouts; default 1")
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--realtime", action="store_true", help="measure ahead of other programs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return 0
    found = {}
    try:
        for rtt_ms in options.rtt_ms:
            found[f"{rtt_ms:g}"] = rows = run(options, rtt_ms)
            show(options, rtt_ms, rows)
    except ClusterError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        command = "python bench/" + " ".join(["cluster/latency.py", *sys.argv[1:]])
        record = {"command": command, "hosts": options.hosts, "rate": options.rate, "ms": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
