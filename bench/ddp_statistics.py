"""What the statistics of the DDP hook cost: steps with and without them, in turn, in one run.

    python bench/ddp_statistics.py --ranks 2 --repeats 5

"With" is the default: counters a bucket, and the compression error every hundredth step. A block is
a hundred steps, so that each has one measurement. "Without" counts and measures nothing. Two
figures: the median of the repeats' ratios of the blocks' times, which other programs on the machine
disturb, and the time inside the statistics' own functions over that of the steps. Prints; writes
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import WIDTHS

import pydist
from pydist.ddp import CompressionState, prepare
from pydist.ddp.stats import Stats

BLOCK = 100


class Silent(Stats):
    """Statistics that count nothing."""

    def sent(self, *args: Any) -> None:
        """Nothing."""

    def step_over(self, sent: Sequence[Any]) -> bool:
        """Nothing."""
        return False


class Clock:
    """The time spent inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> None:
        """Counts the calls of one."""
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def trainer(rank: int, batch: int, counted: bool) -> tuple[Callable[[], None], CompressionState]:
    """A step of a multilayer perceptron, and its state."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    ddp = DDP(nn.Sequential(*layers[:-1]), bucket_cap_mb=4)
    options = {} if counted else {"error_every": 0}
    state = pydist.ddp.compress(ddp, pydist.QSGD(bits=4), **options)
    if not counted:
        state.stats_of = Silent()
    inputs = torch.randn(batch, WIDTHS[0], generator=torch.Generator().manual_seed(1 + rank))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        ddp(inputs).square().mean().backward()
        optimizer.step()

    return step, state


def measure(rank: int, ranks: int, store: str, repeats: int, batch: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    runs = {name: trainer(rank, batch, name == "with")[0] for name in ("with", "without")}
    clock = Clock()
    for name in ("sent", "step_over", "measured"):
        clock.around(Stats, name)
    clock.around(prepare.Prepared, "lost")
    clock.around(prepare.Prepared, "measure")
    for step in runs.values():  # one whole block, so that blocks begin with a measured step
        for _ in range(BLOCK):
            step()
    ratios, shares = [], []
    for repeat in range(repeats):
        took = {}
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            dist.barrier()
            began, clock.seconds = time.perf_counter(), 0.0
            for _ in range(BLOCK):
                runs[name]()
            took[name] = time.perf_counter() - began
            if name == "with":
                shares.append(clock.seconds / took[name])
        ratios.append(took["with"] / took["without"])
        if rank == 0:
            print(
                f"repeat {repeat}: {1e3 * took['with'] / BLOCK:.2f} ms a step with, "
                f"{1e3 * took['without'] / BLOCK:.2f} without, ratio {ratios[-1]:.4f}; "
                f"in the statistics {100 * shares[-1]:.3f} %",
                flush=True,
            )
    if rank == 0:
        print(
            f"median ratio {statistics.median(ratios):.4f}, "
            f"share of the step {100 * statistics.median(shares):.3f} % (median)"
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.ranks, f"{folder}/store", options.repeats, options.batch
        mp.spawn(measure, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
