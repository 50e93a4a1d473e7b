"""What the commands of this folder share: options, processes on the hosts, the record in JSON."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from links import ClusterError, Network, network_options
from netns import Cluster
from rounds import Method, Report, count_bytes, go_first, interleave


def common_options(hosts: int = 4, local: int = 1) -> argparse.ArgumentParser:
    """Options of every benchmark, for ``parents=``; the arguments are the default topology."""
    common = argparse.ArgumentParser(add_help=False, parents=[network_options(hosts, local)])
    common.add_argument("--json", metavar="FILE", help="write all figures here")
    common.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS")
    common.add_argument(
        "--realtime", action="store_true", help="let the ranks go before other programs"
    )
    return common


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not too small."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def launch(cluster: Cluster, script: str, options: argparse.Namespace) -> list[Report]:
    """Run ``script worker`` for every rank; returns what each of them found.

    The last line that a worker prints is its findings as JSON.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(script).resolve()), "worker", json.dumps(vars(options))]
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        # The addresses have no names, and torch would warn of that once a connection.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    finished = cluster.run(command, env, timeout=options.timeout)
    if finished[0].stderr:
        print(finished[0].stderr.rstrip(), file=sys.stderr)
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


def work(settings: str, make: Callable[[argparse.Namespace], Mapping[str, Method]]) -> int:
    """Entry of a worker: measure methods in turns, print the findings as JSON.

    Args:
        settings: What :func:`launch` passed on.
        make: Makes the methods, once the process group is there; a collective call.
    """
    import torch
    import torch.distributed as dist

    options = argparse.Namespace(**json.loads(settings))
    if options.realtime:
        go_first()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    methods = make(options)
    times = interleave(methods, options.repeats)
    report: Report = {
        name: {"times": times[name], "check": method.check(), "predicted": method.predicted}
        for name, method in methods.items()
    }
    for name, method in methods.items():
        report[name]["sent"] = count_bytes(method)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(report))
    return 0


def measured(
    script: str, options: argparse.Namespace, arguments: Sequence[str],
    measure: Callable[[argparse.Namespace], Report],
) -> int:  # fmt: skip
    """Run a benchmark and write its record; returns the exit status.

    Args:
        script: Its file.
        options: The options of the command line.
        arguments: The command line.
        measure: Returns what is to be written beside command, machine and network.
    """
    from pydist.bench.machine import machine

    name = Path(script).name
    record: Report = {
        "command": shlex.join(["python", f"bench/cluster/{name}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    try:
        record |= Network.of(options).record()
        record |= measure(options)
    except ClusterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0
