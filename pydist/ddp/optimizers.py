"""What a hook learns of the optimizer: it does not see it, but torch tells of every step."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pydist.codecs import Codec, Sign, TopK

# Under which names optimizers keep the running variance that they divide by: torch's Adam, AdamW,
# NAdam and RAdam, those of apex and of 8 bits, Adafactor.
_VARIANCES = ("exp_avg_sq", "state2", "exp_avg_sq_row")

ADAM = (
    "error_feedback='auto' keeps residuals with {codecs}, and {name} divides by a running "
    "variance: there residuals made training worse (docs/ddp.md, loss with and without them: "
    "Sign('l1') 2.57 and 1.85, TopK(0.01) 2.31 and 2.14, uncompressed 1.71). Give "
    "error_feedback=False, take a codec of 4 bits or pydist.optim.OneBitAdam; "
    "error_feedback=True keeps residuals and this message away"
)
TWICE = (
    "momentum={momentum} in the hook, and {name} has one too ({found}): gradients are accumulated "
    "twice; give the optimizer none"
)


def suffer(codecs: list[Codec | None]) -> list[Codec]:
    """Those of some codecs with which residuals and Adam were measured to go badly together."""
    return [
        codec
        for codec in codecs
        if isinstance(codec, TopK) or (isinstance(codec, Sign) and codec.scale is not None)
    ]


_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Lets torch tell of all steps, for good.

    torch calls such hooks out of a dict, and a hook that were taken out when its state is collected
    would change that dict in the middle.
    """

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for watch in list(_watches):
            watch.stepped(optimizer)

    register_optimizer_step_post_hook(stepped)


class OptimizerWatch:
    """Counts the steps of the optimizers that have a model's parameters.

    Args:
        owns: Whether a tensor is one of them.
        first: Called with each such optimizer after its first step.
    """

    def __init__(
        self, owns: Callable[[Tensor], bool], first: Callable[[torch.optim.Optimizer], None]
    ) -> None:
        self._steps = 0
        self._owns, self._first = owns, first
        self._known: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = (
            weakref.WeakKeyDictionary()
        )
        _listen()
        _watches.add(self)

    def count(self) -> int:
        """Their steps so far."""
        return self._steps

    def close(self) -> None:
        """Watches no more."""
        _watches.discard(self)

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer, whosever it is, has made a step."""
        ours = self._known.get(optimizer)
        if ours is None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            ours = self._known[optimizer] = any(self._owns(p) for p in params)
            if ours:
                self._first(optimizer)
        self._steps += ours


def warn_of_variance(optimizer: torch.optim.Optimizer, codecs: list[Codec]) -> bool:
    """Warns where an optimizer divides by a running variance; says whether it does."""
    divides = any(
        name in held for held in optimizer.state.values() if isinstance(held, dict)
        for name in _VARIANCES
    )  # fmt: skip
    if divides:
        names = ", ".join(dict.fromkeys(map(repr, codecs)))
        warnings.warn(ADAM.format(codecs=names, name=type(optimizer).__name__), stacklevel=2)
    return divides


def warn_of_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Warns where an optimizer has a momentum beside the hook's."""
    for group in optimizer.param_groups:
        for key in ("momentum", "betas"):
            value = group.get(key)
            first = value[0] if isinstance(value, tuple | list) and value else value
            if isinstance(first, float | int) and first:
                found = f"{key}={value}"
                name = type(optimizer).__name__
                warnings.warn(TWICE.format(momentum=momentum, name=name, found=found), stacklevel=2)
                return
