"""Whole DDP training steps for ``cluster.py step``: what people use today, and pydist.

Every method has a model, an optimizer and a DDP wrapper of its own and makes the same step:
forward, backward with its communication, update. ``no communication`` makes it under
``no_sync()``: what a step costs where the network is infinitely fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

WIDTHS = (512, 1280, 1280, 1280, 512, 256)
"""Widths of the multilayer perceptron: 4.72 million parameters."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Trainer:
    """One method at work.

    Attributes:
        step: Makes a training step; returns when the weights are there.
        model: The replica.
        synchronised: Whether replicas stay equal.
    """

    step: Step
    model: nn.Module
    synchronised: bool = True

    def check(self) -> float:
        """A number that must be equal on all hosts."""
        if not self.synchronised:
            return 0.0
        return float(sum(p.detach().double().sum() for p in self.model.parameters()))


def model_of() -> nn.Sequential:
    """The multilayer perceptron, the same on every host."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def parameters() -> int:
    """Parameters of the model."""
    return sum(p.numel() for p in model_of().parameters())


def _trainer(
    rank: int,
    batch: int,
    bucket_cap_mb: float,
    prepare: Callable[[DDP], object],
    optimizer_of: Callable[[DDP], torch.optim.Optimizer],
    *,
    sync: bool = True,
) -> Trainer:
    ddp = DDP(model_of(), gradient_as_bucket_view=True, bucket_cap_mb=bucket_cap_mb)
    prepare(ddp)
    optimizer = optimizer_of(ddp)
    generator = torch.Generator().manual_seed(1 + rank)
    inputs = torch.randn(batch, WIDTHS[0], generator=generator)
    targets = torch.randint(WIDTHS[-1], (batch,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        with contextlib.nullcontext() if sync else ddp.no_sync():
            nn.functional.cross_entropy(ddp(inputs), targets).backward()
        optimizer.step()

    return Trainer(step, ddp.module, synchronised=sync)


def _sgd(ddp: DDP) -> torch.optim.Optimizer:
    return torch.optim.SGD(ddp.parameters(), lr=1e-3, momentum=0.9)


def _hook(hook: Any) -> Callable[[DDP], object]:
    # state None: the default process group
    return lambda ddp: ddp.register_comm_hook(None, hook)


def _power_sgd(ddp: DDP) -> None:
    state = powerSGD_hook.PowerSGDState(
        dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _compressed(codec: Any, **options: Any) -> Callable[[DDP], object]:
    import pydist

    return partial(pydist.ddp.compress, codec=codec, **options)


def _lion(aggregate: str, **options: Any) -> Callable[[DDP], torch.optim.Optimizer]:
    import pydist

    def optimizer(ddp: DDP) -> torch.optim.Optimizer:
        lion = pydist.optim.DistributedLion(
            ddp.module.named_parameters(), lr=1e-4, aggregate=aggregate, **options
        )
        lion.attach(ddp)
        return lion

    return optimizer


def trainers(
    names: list[str], rank: int, batch: int, bucket_cap_mb: float = 25.0
) -> dict[str, Trainer]:
    """The methods by name, made in order; a collective call."""
    import pydist

    def nothing(ddp: DDP) -> None:
        pass

    trainer = partial(_trainer, rank, batch, bucket_cap_mb)
    plain = partial(trainer, optimizer_of=_sgd)
    kinds: dict[str, Callable[[], Trainer]] = {
        "fp32": lambda: plain(nothing),
        "fp16 hook": lambda: plain(_hook(default_hooks.fp16_compress_hook)),
        "bf16 hook": lambda: plain(_hook(default_hooks.bf16_compress_hook)),
        "PowerSGD hook": lambda: plain(_power_sgd),
        "pydist Sign(l1)": lambda: plain(_compressed(pydist.Sign("l1"))),
        "pydist QSGD(4)": lambda: plain(_compressed(pydist.QSGD(bits=4))),
        "pydist BlockInt(8)": lambda: plain(_compressed(pydist.BlockInt(bits=8))),
        "DistributedLion majority": lambda: trainer(nothing, _lion("majority")),
        "DistributedLion average": lambda: trainer(nothing, _lion("average")),
        "levels Sign(l1)": lambda: plain(_compressed(pydist.Sign("l1"), levels="auto")),
        "levels QSGD(4)": lambda: plain(_compressed(pydist.QSGD(bits=4), levels="auto")),
        "levels DistributedLion": lambda: trainer(nothing, _lion("majority", levels="votes")),
        "no communication": lambda: plain(nothing, sync=False),
    }
    return {name: kinds[name]() for name in names}


HANGS = ("PowerSGD hook",)
"""Methods that may never return, on gloo with several buckets."""

METHODS = (
    "fp32", "fp16 hook", "bf16 hook", "PowerSGD hook", "pydist Sign(l1)", "pydist QSGD(4)",
    "pydist BlockInt(8)", "DistributedLion majority", "DistributedLion average",
    "levels Sign(l1)", "levels QSGD(4)", "levels DistributedLion", "no communication",
)  # fmt: skip
