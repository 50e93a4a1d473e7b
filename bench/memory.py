"""The memory that a collective needs beside its tensors, measured on real ranks of this machine.

    python bench/memory.py --ranks 4 --numel 16777216

The kernel's record of the process's peak is reset before a call and read after it. Large buffers
are mapped afresh (``MALLOC_MMAP_THRESHOLD_``), so that none kept from earlier calls is left out.
The payload of an all-gather is that of its whole output.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pydist

CODECS = {
    "qsgd4": pydist.QSGD(4), "qsgd8": pydist.QSGD(8), "l1": pydist.Sign("l1"),
}  # fmt: skip


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` (the peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{name} is not in /proc/self/status")


def measure(rank: int, ranks: int, numel: int, store: str) -> None:
    """Runs on each rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    x, share = torch.randn(numel), torch.empty(numel // ranks)
    for name, codec in CODECS.items():
        payload = codec.block_format.payload_bytes(numel)
        calls = {
            "all_reduce": lambda codec=codec: pydist.all_reduce(x, codec, algorithm="two_phase"),
            "reduce_scatter": lambda codec=codec: pydist.reduce_scatter(share, x, codec),
            "all_gather": lambda codec=codec: pydist.all_gather(x, share, codec),
        }
        for call, run in calls.items():
            run()
            extra = []
            for _ in range(5):
                dist.barrier()
                Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
                before = resident("VmRSS")
                run()
                extra.append(resident("VmHWM") - before)
            if rank == 0:
                peak = max(extra)
                print(
                    f"{call:15} {name:6} payload {payload / 1e6:7.2f} MB   "
                    f"peak extra {peak / 1e6:7.2f} MB = {peak / payload:.2f} payloads"
                )
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--numel", type=int, default=16 * 1024 * 1024)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as directory:
        arguments = (options.ranks, options.numel, str(Path(directory) / "store"))
        mp.spawn(measure, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
