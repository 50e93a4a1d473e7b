"""Your own training script on several emulated hosts behind links of a given speed.

    sudo python -m bench.cluster run --topology 4x2 --rate 100mbit --rtt-ms 50 -- python train.py

The command runs once per rank, with the variables that torchrun sets, so a script that calls
``init_process_group("gloo")`` runs as it is. What rank 0 prints is shown as it goes; at the end,
seconds and the bytes that every host sent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from links import ClusterError, Network, network_options
from netns import Cluster


def run(options: argparse.Namespace) -> None:
    """Runs the command, and prints what went over the links."""
    program, *arguments = options.command
    found = sys.executable if program == "python" else shutil.which(program)
    if found is None:
        raise ClusterError(f"{program} was not found")
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    network = Network.of(options)
    with Cluster(network) as cluster:
        before, began = cluster.counters(), time.monotonic()
        cluster.run([found, *arguments], environment, timeout=options.timeout, echo=True)
        seconds, after = time.monotonic() - began, cluster.counters()
    sent = [b["tx_bytes"] - a["tx_bytes"] for a, b in zip(before, after, strict=True)]
    print(f"{network}: {seconds:.1f} s; sent, in MB, by each host:")
    print("  " + "  ".join(f"{size / 1e6:.2f}" for size in sent))
    if dropped := sum(b["drops"] - a["drops"] for a, b in zip(before, after, strict=True)):
        print(f"  {dropped} packets found a queue full and were dropped")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster")
    commands = parser.add_subparsers(required=True, metavar="command")
    described = commands.add_parser(
        "run", help=(__doc__ or "").splitlines()[0], parents=[network_options()]
    )
    described.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="default 3600"
    )
    described.add_argument("command", nargs=argparse.REMAINDER, help="such as: -- python train.py")
    described.set_defaults(run=run)
    options = parser.parse_args()
    options.command = options.command[options.command[:1] == ["--"] :]
    if not options.command:
        described.error("no command was given: -- python train.py")
    try:
        options.run(options)
    except ClusterError as error:
        print(f"bench.cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
