"""What a change costs in whole calls: two checkouts, whose ranks take turns.

    python bench/versions.py OLD_CHECKOUT . --rounds 20

Two ranks of each checkout over gloo, one thread each. All four stay up: in every round one
checkout's ranks make some calls while the other's wait for theirs, so that what else the machine
does meets both alike. Prints medians of a call's milliseconds, of the processor's milliseconds in
it (both ranks, all their threads), and of the rounds' ratios, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RANKS = 2
CALLS = {64 * 1024: 50, 1024**2: 20, 16 * 1024**2: 2}
"""Elements, and the calls of a round."""
STEPS = {256: 50, 1024: 10}
"""Width of the model, and the steps of a round."""

# --------------------------------------------------------------------------- a rank


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


def cases() -> dict[str, tuple[Callable[[], object], int]]:
    """By name, a call and how many make a round."""
    import torch

    import pydist

    found: dict[str, tuple[Callable[[], object], int]] = {}
    for n, calls in CALLS.items():
        x = torch.randn(n)
        mean = partial(pydist.all_reduce, x, pydist.QSGD(4))
        vote = partial(pydist.all_reduce, x.clone(), pydist.Sign(None), op="vote")
        found[f"all_reduce, QSGD(4), {n:,} elements"] = mean, calls
        found[f"all_reduce, votes, {n:,} elements"] = vote, calls
    for width, calls in STEPS.items():
        found[f"DDP step, {2 * width * (width + 1):,} parameters"] = ddp_step(width), calls
    return found


def rank_main(store: str, rank: int) -> None:
    """Makes a round of the case that each line of the input names."""
    import torch
    import torch.distributed as dist

    import pydist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    known = cases()
    print(json.dumps([str(Path(pydist.__file__).parent.parent), *known]), flush=True)
    for line in sys.stdin:
        call, calls = known[line.strip()]
        took, worked = [], time.process_time()
        for _ in range(calls):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
        worked = (time.process_time() - worked) / calls
        print(json.dumps([1e3 * statistics.median(took), 1e3 * worked]), flush=True)
    dist.destroy_process_group()


# --------------------------------------------------------------------------- both checkouts


class Checkout:
    """The ranks of one checkout."""

    def __init__(self, root: Path, directory: str) -> None:
        root = root.resolve()
        script, store = str(Path(__file__).resolve()), f"{directory}/{root.name}-{id(self)}"
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, script, "--rank", store, str(rank)], env=env, cwd=directory,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        (found, *self.cases), *_ = self._answers()
        if Path(found) != root:
            raise SystemExit(f"{root}: its ranks import the package of {found}")

    def _answers(self) -> list[list[Any]]:
        answers = [rank.stdout.readline() for rank in self._ranks if rank.stdout]
        if not all(answers):
            raise SystemExit("a rank ended; what it printed is above")
        return [json.loads(answer) for answer in answers]

    def round(self, case: str) -> tuple[float, float]:
        """Milliseconds of a call of one round on rank 0, and the processor's of all ranks."""
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.write(case + "\n")
            rank.stdin.flush()
        answers = self._answers()
        return answers[0][0], sum(worked for _, worked in answers)

    def close(self) -> None:
        """Ends the ranks."""
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait(timeout=60)


def compared(name: str, old: list[float], new: list[float]) -> str:
    """Medians of one figure's rounds, and of their ratios."""
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = f"old {statistics.median(old):8.3f}  new {statistics.median(new):8.3f}"
    return f"{name}: {medians}  ratio {middle:.3f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["--rank"]:
        return rank_main(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout with its extension built in place")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name has this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        old, new = (Checkout(root, directory) for root in (options.old, options.new))
        for case in old.cases:
            if options.only not in case:
                continue
            rounds: dict[Checkout, list[tuple[float, float]]] = {old: [], new: []}
            for turn in range(-2, options.rounds):  # two to warm up
                for checkout in (old, new) if turn % 2 else (new, old):
                    rounds[checkout].append(checkout.round(case))
            print(case)
            for i, what in enumerate(("  a call, ms     ", "  processor, ms  ")):
                a, b = ([found[i] for found in rounds[c][2:]] for c in (old, new))
                print(compared(what, a, b), flush=True)
        old.close()
        new.close()


if __name__ == "__main__":
    main()
