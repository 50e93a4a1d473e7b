"""Saves gradients of the demo's model, every worker's own, for `bench/codecs/compare.py`.

    python examples/language_model/gradients.py --output build/gradients.pt

All workers train in this process: the same model, batches and AdamW as in `demo.py`, one thread, so
that the file depends on the settings, on the text of the running Python and on nothing else but the
last bits of torch's sums. At each of a few places in the run the gradients of some consecutive
steps are kept, since PowerSGD starts from what it found in the step before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from data import Batches, load_text, split
from methods import METHODS, Settings
from model import ByteTransformer
from rich.progress import track
from torch import Tensor
from train import loss_of, rate


def gradients_of(model: ByteTransformer, batches: Batches) -> Tensor:
    """One worker's gradient of its next batch, all parameters one after the other."""
    model.zero_grad()
    loss_of(model, next(batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def collect(settings: Settings, workers: int, at: Sequence[int], length: int) -> dict[str, Any]:
    """Trains as far as needed and keeps gradients.

    Args:
        settings: Those of the demo; the learning rate follows its schedule.
        workers: How many there are, in this process.
        at: First steps of the runs that are kept, rising and at least `length` apart.
        length: Steps of a run.

    Returns:
        `gradients`, float32 [runs, length, workers, elements]; `parameters`, each one's name and
        shape in their order; `at`; `settings`.
    """
    torch.manual_seed(settings.seed)
    training, _ = split(load_text())
    streams = [
        Batches(training, rank, workers, settings.batch_size, settings.context, settings.seed)
        for rank in range(workers)
    ]
    model = ByteTransformer(settings.context, settings.width, settings.depth, settings.heads)
    method = METHODS["adamw"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=method.lr, betas=method.betas, weight_decay=method.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    parameters = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    kept = torch.empty(len(at), length, workers, sum(sizes))
    for step in track(range(at[-1] + length), description="training"):
        own = torch.stack([gradients_of(model, stream) for stream in streams])
        for run, first in enumerate(at):
            if first <= step < first + length:
                kept[run, step - first] = own
        for p, mean in zip(model.parameters(), own.mean(0).split(sizes), strict=True):
            p.grad = mean.view_as(p)
        optimizer.step()
        scheduler.step()
    return {
        "gradients": kept, "parameters": parameters, "at": list(at), "settings": asdict(settings)
    }  # fmt: skip


def main() -> None:
    """Trains and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/gradients.pt"))
    parser.add_argument("--workers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--at", type=int, nargs="+", default=[20, 200, 1000], metavar="STEP",
                        help="where runs of kept steps begin; default 20 200 1000")  # fmt: skip
    parser.add_argument("--length", type=int, default=8, help="steps of a run; default 8")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    options = parser.parse_args()
    if min(options.workers, options.length) < 1 or options.at[0] < 0:
        parser.error("--workers and --length must be at least 1, --at not negative")
    if any(b - a < options.length for a, b in zip(options.at, options.at[1:], strict=False)):
        parser.error(f"--at must rise by at least --length, got {options.at}")
    settings = Settings(seed=options.seed)
    if options.at[-1] + options.length > settings.steps:
        parser.error(f"--at must end {options.length} steps before the last, {settings.steps}")
    torch.set_num_threads(1)  # sums in one order
    found = collect(settings, options.workers, options.at, options.length)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, options.output)
    shape, size = tuple(found["gradients"].shape), options.output.stat().st_size / 1e6
    print(f"{options.output}: runs, steps, workers, elements {shape}, {size:.1f} MB")


if __name__ == "__main__":
    main()
