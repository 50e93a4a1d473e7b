"""What a change costs in whole calls: two checkouts in turn, each in processes of its own.

    python bench/versions.py OLD_CHECKOUT . --repeats 3

Two ranks over gloo, one thread each: ``pydist.all_reduce`` of three sizes, and steps of two small
models with the DDP hook. Prints the medians of both checkouts and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

RANKS = 2
CALLS = {64 * 1024: 200, 1024**2: 60, 16 * 1024**2: 8}
"""Elements, and how many calls are timed."""
STEPS = {256: 150, 1024: 40}
"""Width of the model, and how many steps are timed."""


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of a call."""
    import torch.distributed as dist

    took = []
    for repeat in range(-max(3, repeats // 10), repeats):
        if repeat == 0:
            dist.barrier()
        began = time.perf_counter()
        call()
        if repeat >= 0:
            took.append(time.perf_counter() - began)
    return 1e3 * statistics.median(took)


def ddp_step(width: int) -> Callable[[], None]:
    """Forward, backward and update with the hook."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import pydist

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    ddp = DistributedDataParallel(net)
    pydist.ddp.compress(ddp, pydist.QSGD(4))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    x = torch.randn(8, width)

    def step() -> None:
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()

    return step


def rank_main() -> None:
    """One rank of one checkout; rank 0 prints what it found."""
    import torch
    import torch.distributed as dist

    import pydist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for n, repeats in CALLS.items():
        x = torch.randn(n)
        mean = partial(pydist.all_reduce, x, pydist.QSGD(4))
        vote = partial(pydist.all_reduce, x, pydist.Sign(None), op="vote")
        found[f"all_reduce, QSGD(4), {n:,} elements"] = median_ms(mean, repeats)
        found[f"all_reduce, votes, {n:,} elements"] = median_ms(vote, repeats)
    for width, repeats in STEPS.items():
        parameters = 2 * width * (width + 1)
        found[f"DDP step, {parameters:,} parameters"] = median_ms(ddp_step(width), repeats)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def measure(checkout: Path) -> dict[str, float]:
    """Milliseconds of every call, with the package of one checkout."""
    script = Path(__file__).resolve()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), str(script), "--rank"]
    env = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, cwd=checkout.resolve().anchor, capture_output=True, text=True, timeout=600
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if line is None:
        raise SystemExit(f"{checkout}: no result\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(line)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout with its extension built in place")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs: dict[Path, list[dict[str, float]]] = {options.old: [], options.new: []}
    for repeat in range(options.repeats):
        for checkout in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            runs[checkout].append(measure(checkout))
    for name in runs[options.new][0]:
        old, new = ([found[name] for found in runs[c]] for c in (options.old, options.new))
        pairs = ", ".join(f"{b / a:.2f}" for a, b in zip(old, new, strict=True))
        a, b = statistics.median(old), statistics.median(new)
        print(f"{name:<40} old {a:8.3f} ms  new {b:8.3f} ms  ratio {b / a:.2f}  (pairs {pairs})")


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        rank_main()
    else:
        main()
