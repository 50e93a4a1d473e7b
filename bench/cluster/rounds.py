"""Methods timed in turns on several hosts, their bytes, and the table of what the hosts found."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from links import ClusterError
from netns import INTERFACE

WARMUP = 3
BYTE_CALLS = 5
QUIET_SECONDS = 0.1

Report = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to do the job.

    Attributes:
        call: Does it once; returns when the result is there.
        reset: Restores the input; not timed.
        predicted: Payload bytes that a host ought to send in one call, where known.
        check: A number that must come out the same on every host.
    """

    call: Callable[[], object]
    reset: Callable[[], object]
    predicted: float | None
    check: Callable[[], float]


def ring_bytes(hosts: int, payload: float) -> float:
    """Bytes a host sends to reduce and redistribute a payload, each shard owned by one host."""
    return 2 * (hosts - 1) / hosts * payload


def interleave(methods: Mapping[str, Method], repeats: int) -> dict[str, list[float]]:
    """Time the methods in turn, so that a slow spell of the machine hits all of them alike."""
    import torch.distributed as dist

    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(-WARMUP, repeats):
        for name, method in methods.items():
            method.reset()
            # The second barrier takes the ranks' different arrival at the first out of the time.
            dist.barrier()
            dist.barrier()
            start = time.perf_counter()
            method.call()
            took = time.perf_counter() - start
            # Ranks that share a core: the next reset of a fast one must not delay a slow one.
            dist.barrier()
            if repeat >= 0:
                times[name].append(took)
    return times


def go_first() -> None:
    """Lets this process run before other programs; the relay of the links runs before it."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))


def sent_bytes() -> int:
    """Bytes this host's interface has sent so far."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def settle() -> None:
    """Wait until nothing has been sent for a while: calls return before the last byte is out."""
    before, quiet_since = sent_bytes(), time.monotonic()
    while time.monotonic() - quiet_since < QUIET_SECONDS:
        time.sleep(0.01)
        now = sent_bytes()
        if now != before:
            before, quiet_since = now, time.monotonic()


def count_bytes(method: Method) -> float:
    """Bytes this host's interface sends for one call, headers and acknowledgements included."""
    import torch.distributed as dist

    method.reset()
    settle()
    before = sent_bytes()
    # The few hundred bytes of two barriers are the error of this count. No rank of this host sends
    # before the others have looked, and none looks before all that was sent has arrived.
    dist.barrier()
    for _ in range(BYTE_CALLS):
        method.call()
    dist.barrier()
    settle()
    return (sent_bytes() - before) / BYTE_CALLS


def summarise(reports: Sequence[Report], local: int = 1) -> dict[str, Report]:
    """Join the ranks' findings: each repeat takes as long as its slowest rank.

    Args:
        reports: Of each rank, those of a host after one another.
        local: Ranks per host.

    Raises:
        ClusterError: If the hosts did not end with the same numbers.
    """
    rows: dict[str, Report] = {}
    for name, first in reports[0].items():
        found = [report[name] for report in reports]
        if len({host["check"] for host in found}) != 1:
            raise ClusterError(f"{name}: the hosts' results differ")
        slowest = [max(times) for times in zip(*(host["times"] for host in found), strict=True)]
        low, median, high = statistics.quantiles(slowest, n=4, method="inclusive")
        sent, predicted = [rank["sent"] for rank in found[::local]], first["predicted"]
        rows[name] = {
            "seconds": {"median": median, "lower_quartile": low, "upper_quartile": high},
            "seconds_of_slowest_host": slowest,
            "bytes_sent_by_host": sent,
            "bytes_predicted": predicted,
            "bytes_ratio": max(sent) / predicted if predicted else None,
        }
    return rows


def show(rows: Mapping[str, Report], title: str) -> None:
    """Print the figures as a table, with each method's speed-up over the first."""
    from rich.console import Console
    from rich.table import Table

    base = next(iter(rows.values()))["seconds"]["median"]
    for row in rows.values():
        row["speedup"] = base / row["seconds"]["median"]
    table = Table(title=title, caption="slowest host of each repeat; bytes a host sends in a call")
    for head in ("", "median ms", "quartiles ms", "speed-up", "bytes", "predicted", "ratio"):
        table.add_column(head, justify="right" if head else "left")
    for name, row in rows.items():
        seconds, predicted, ratio = row["seconds"], row["bytes_predicted"], row["bytes_ratio"]
        table.add_row(
            name,
            f"{1e3 * seconds['median']:.2f}",
            f"{1e3 * seconds['lower_quartile']:.2f} - {1e3 * seconds['upper_quartile']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{max(row['bytes_sent_by_host']):,.0f}",
            "" if predicted is None else f"{predicted:,.0f}",
            "" if ratio is None else f"{ratio:.3f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
