"""The memory that collectives need beside their tensors, measured on real ranks of this machine.

    python bench/memory.py --ranks 4 --numel 262144 16777216 --in-flight 1 16

What the exchange holds at most is counted by the exchange. What the process grows by (the median of
five runs) is the kernel's record of its peak, reset before the calls, so what gloo needs counts,
too, and only pages that were touched. Large buffers are mapped afresh (``MALLOC_MMAP_THRESHOLD_``),
so that none kept from earlier calls is left out; those that the exchange keeps for the next call
are let go before. The payload of an all-gather is that of its whole output; the bound is two
payloads and a shard of one call, however many there are.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pydist
from pydist.transport.communicator import communicator

CODECS: dict[str, Any] = {
    "qsgd4": pydist.QSGD(4), "qsgd8": pydist.QSGD(8), "l1": pydist.Sign("l1"), "raw": pydist.Raw(),
}  # fmt: skip
REPEATS = 5


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` (the peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{name} is not in /proc/self/status")


def payload_bytes(codec: Any, numel: int) -> int:
    """Bytes of ``numel`` elements on the wire."""
    return 4 * numel if codec.block_format is None else codec.block_format.payload_bytes(numel)


def peak(run: Callable[[], list[Any]]) -> tuple[int, int]:
    """The most that the exchange held in a run, and what the process grew by at most."""
    buffers = communicator().buffers
    held, extra = 0, []
    for _ in range(REPEATS):
        buffers.clear()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
        before = resident("VmRSS")
        for work in run():
            work.wait()
        extra.append(resident("VmHWM") - before)
        held = max(held, buffers.peak)
    return held, sorted(extra)[REPEATS // 2]


def calls_of(numel: int, ranks: int, many: int, codec: Any) -> dict[str, Callable[[], list[Any]]]:
    """Each collective, ``many`` times at once."""
    options: dict[str, Any] = {"async_op": True}
    wholes = [torch.randn(numel) for _ in range(many)]
    shares = [torch.zeros(numel // ranks) for _ in range(many)]
    pairs = list(zip(shares, wholes, strict=True))
    return {
        "all_reduce": lambda: [
            pydist.all_reduce(x, codec, algorithm="two_phase", **options) for x in wholes
        ],
        "reduce_scatter": lambda: [
            pydist.reduce_scatter(share, x, codec, **options) for share, x in pairs
        ],
        "all_gather": lambda: [pydist.all_gather(x, share, codec, **options) for share, x in pairs],
    }


def measure(rank: int, ranks: int, options: argparse.Namespace, store: str) -> None:
    """Runs on each rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for numel in options.numel:
        for many in options.in_flight:
            for name, codec in CODECS.items():
                payload = payload_bytes(codec, numel)
                bound = 2 * payload + payload // ranks
                for call, run in calls_of(numel, ranks, many, codec).items():
                    held, extra = peak(run)
                    if rank == 0:
                        print(
                            f"{many:3} x {call:15} {name:6} payload {payload / 1e6:7.2f} MB   held "
                            f"{held / 1e6:6.2f} MB = {held / payload:5.2f} payloads, "
                            f"{held / bound:4.2f} of the bound; process {extra / 1e6:6.2f} MB",
                            flush=True,
                        )
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--numel", type=int, nargs="+", default=[1024 * 1024, 16 * 1024 * 1024])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as directory:
        arguments = (options.ranks, options, str(Path(directory) / "store"))
        mp.spawn(measure, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
