"""What happens to a bucket's local gradients before they are encoded.

Clipping, momentum, and residuals that their codec does not take any more; parameter by parameter,
so that buckets and their sizes change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pydist.ddp.accumulation import Accumulation
from pydist.ddp.layout import Layout
from pydist.encoding.shares import Part
from pydist.encoding.usage import Usage
from pydist.kernels.torch_tensors import moved
from pydist.training.momentum import Advanced, Momenta
from pydist.training.norms import norm_of, norms_of
from pydist.training.residuals import Residuals, any_nonzero

PIECE = 65536
"""Elements whose norm is taken at once."""


class Earlier:
    """What of a bucket's gradients was reduced in an earlier backward of the step: taken out of it.

    Args:
        layout: The bucket's layout.
        flat: Its buffer; overwritten.
        accumulation: Knows what that is; ``None``: nothing is known to be.
    """

    def __init__(self, layout: Layout, flat: Tensor, accumulation: Accumulation | None) -> None:
        self._bases: list[tuple[Tensor, Tensor]] = []
        if accumulation is None or not accumulation.continues:
            return
        for part, order in zip(layout.parts, layout.orders, strict=True):
            if (base := accumulation.base(part.ordinal)) is not None:
                view = order.shaped(_gradient(flat, part))
                view.sub_(base)
                self._bases.append((view, base))

    def put_back(self) -> None:
        """Adds it to the result."""
        for view, base in self._bases:
            view.add_(base)


class Prepared:
    """Gradients, or a node's sums of them, ready to be encoded; what is kept stays as it was.

    :meth:`take` and :meth:`forget` change it.

    1. Momenta advance. Parameters with residuals are encoded from them; in those without they
       replace the gradient in the buffer, rounded to its type.
    2. A parameter that has a residual and does not keep one in this step (its codec changed) has
       it added in the buffer. It is forgotten after the first step that is finite everywhere: of
       any other nothing arrives, or the optimizer leaves it out.

    Parameters whose gradient is all zeros have no part in any of it.

    Args:
        layout: The bucket's layout.
        flat: The buffer of its plan; overwritten.
        residuals: The rank's.
        momenta: The rank's.
        rank: This rank, or on two levels its node.
        measured: Find out how long what is encoded is (:meth:`lost`).
        earlier: What of the gradients has been reduced before; ``None``: nothing is known to be.

    Attributes:
        used: Which parts have a gradient that is not all zeros; all of them where nobody asks.
            ``None``: their device knows.
        usage: What it knows.
        advanced: The new momenta until they are taken over; ``None`` without momentum.
    """

    def __init__(
        self,
        layout: Layout,
        flat: Tensor,
        residuals: Residuals,
        momenta: Momenta,
        *,
        rank: int,
        measured: bool,
        earlier: Accumulation | None = None,
    ) -> None:
        parts, plan = layout.plan.parts, layout.plan
        self._residuals, self._momenta = residuals, momenta
        self._earlier = earlier
        self._sent: list[tuple[int, Tensor | bool]] = []
        # Ordinal, square of the norm of what enters, whether the parameter is used.
        self._entered: list[tuple[int, Tensor, Tensor | bool]] = []
        self.advanced: Advanced | None = None
        left = [
            (part, rest)
            for part, choice in zip(parts, layout.choices, strict=True)
            if not choice.feedback
            and (rest := residuals.release(part, flat.device, rank)) is not None
        ]
        self.used: np.ndarray | None = np.ones(len(parts), dtype=bool)
        self.usage: Usage | None = None
        if any(plan.with_feedback) or momenta.factor or left:
            if flat.is_cuda:
                self.used, self.usage = None, Usage(flat, plan)
            else:
                self.used = used_parts(flat, parts)
        if momenta.factor:
            self._advance(layout, flat)
        for part, rest in left:
            self._release(layout, flat, part, rest)
        if measured:
            self.measure(layout, flat)

    @cached_property
    def _flags(self) -> np.ndarray | Tensor:
        """Which parts are used, bool [parts], here or on the device that knows it."""
        if self.usage is not None:
            return self.usage.of_parts(everyones=False)
        assert self.used is not None
        return self.used

    def _advance(self, layout: Layout, flat: Tensor) -> None:
        """Advances the momenta; without residuals they replace the gradients in the bucket."""
        parts = layout.plan.parts
        with_residual = [choice.feedback for choice in layout.choices]
        moved = set() if self._earlier is None else self._earlier.moved
        self.advanced = self._momenta.advance(flat, parts, self._flags, with_residual, moved)
        for part, choice in zip(parts, layout.choices, strict=True):
            if not choice.feedback and part.ordinal in self.advanced.values:
                _gradient(flat, part).copy_(self.advanced.values[part.ordinal])

    def _release(self, layout: Layout, flat: Tensor, part: Part, rest: Tensor) -> None:
        """Adds a residual that is not kept any more; zeros may come out of a checkpoint."""
        view = _gradient(flat, part)
        used = self._flags[layout.plan.parts.index(part)]
        if self.usage is None and not used:
            return
        self._sent.append((part.ordinal, used))
        if isinstance(used, Tensor):
            whole = self._input(view, part).float() + rest
            view.copy_(torch.where(used & rest.any(), whole, view.float()))
        elif bool(rest.any()):
            view.copy_(self._input(view, part).float() + rest)

    def measure(self, layout: Layout, flat: Tensor) -> None:
        """Notes how long what is going to be encoded with residuals is."""
        for part, choice, used in zip(layout.plan.parts, layout.choices, self._flags, strict=True):
            if choice.feedback and (self.usage is not None or used):
                whole = self._input(_gradient(flat, part), part).float()
                if (old := self._residuals.worker.get(part.ordinal)) is not None:
                    whole = whole + old
                self._entered.append((part.ordinal, _square(whole) * used, used))

    def _input(self, gradient: Tensor, part: Part) -> Tensor:
        """What is encoded of a parameter, without its residual."""
        if self.advanced is None:
            return gradient
        return self.advanced.values.get(part.ordinal, gradient)

    def take(self) -> None:
        """Takes over the new momenta, once."""
        if self.advanced is not None:
            self._momenta.take(self.advanced)
            if self._earlier is not None:
                self._earlier.have_moved(self.advanced.kept, self.advanced.keeps)
            self.advanced = None

    @property
    def releases(self) -> bool:
        """Whether residuals were added in the bucket, to be forgotten once they have arrived."""
        return bool(self._sent)

    def forget(self) -> None:
        """Forgets residuals that were sent as they are."""
        for ordinal, used in self._sent:
            if bool(used):
                self._residuals.drop(ordinal)

    def lost(self) -> list[tuple[Tensor, Tensor]]:
        """By parameter, squares of the norms of what was encoded and of what was not sent of it.

        Empty unless ``measured``; the residuals must be the new ones.
        """
        return [
            (whole, _square(self._residuals.worker[i]) * used) for i, whole, used in self._entered
        ]


class StepOf:
    """What the buckets of one step, prepared one by one, change when it is over."""

    def __init__(self) -> None:
        self._prepared: list[Prepared] = []
        self._finite: list[Tensor] = []  # appended by the threads that end local reductions

    def add(self, prepared: Prepared) -> None:
        """Takes note of a bucket on its way."""
        self._prepared.append(prepared)

    def watch(self, flat: Tensor) -> None:
        """Notes whether what a local step left in a bucket is finite."""
        self._finite.append(flat.isfinite().all())

    def take(self) -> None:
        """Takes over all buckets' momenta."""
        for one in self._prepared:
            one.take()

    def forget(self, bad: bool | Tensor) -> None:
        """Forgets what was released, unless something was not finite; asks only if it matters.

        Args:
            bad: Whether something that was reduced over all ranks was not finite.
        """
        if not any(one.releases for one in self._prepared):
            return
        if bool(bad) or not all(bool(x) for x in self._finite):
            return
        for one in self._prepared:
            one.forget()

    def lost(self) -> list[tuple[Tensor, Tensor]]:
        """:meth:`Prepared.lost` of all buckets."""
        return [pair for one in self._prepared for pair in one.lost()]


def used_parts(flat: Tensor, parts: Sequence[Part]) -> np.ndarray:
    """:func:`pydist.training.residuals.any_nonzero`, of float64 too."""
    if flat.dtype != torch.float64:
        return any_nonzero(flat, parts)
    return np.array([bool(_gradient(flat, part).any()) for part in parts], dtype=bool)


def _gradient(flat: Tensor, part: Part) -> Tensor:
    return flat[part.offset : part.offset + part.numel]


def _square(x: Tensor) -> Tensor:
    """The square of a norm, for statistics: float32 in pieces, whose sum is float64.

    All of it in float64 takes thirty times as long on the CPU; in one float32 sum four digits stay.
    """
    norms = torch._foreach_norm(x.split(PIECE))
    return torch.stack(norms).double().square().sum()


def clip(flat: Tensor, parts: Sequence[Part], limit: float) -> None:
    """Scales gradients that are longer than ``limit``, in place, parameter by parameter."""
    (_clip_on_device if flat.is_cuda else _clip)(flat, parts, limit)


def _clip_on_device(flat: Tensor, parts: Sequence[Part], limit: float) -> None:
    """:func:`_clip` of all parameters at once; nothing is waited for."""
    if not parts:
        return
    lengths = norms_of(flat, [part.numel for part in parts])
    longer = (lengths > limit) & (lengths < math.inf)
    wide = torch.promote_types(flat.dtype, torch.float32)
    factors = torch.where(longer, limit / lengths, 1.0).to(wide)
    numel = torch.tensor([part.numel for part in parts], dtype=torch.int64, device="cpu")
    factor = factors.repeat_interleave(moved(numel, flat.device), output_size=flat.numel())
    flat.copy_(flat.to(wide) * factor)


def _clip(flat: Tensor, parts: Sequence[Part], limit: float) -> None:
    """Scales gradients that are longer than ``limit``: float32 products, rounded once."""
    for part in parts:
        gradient = _gradient(flat, part)
        length = float(norm_of(gradient))
        if limit < length < math.inf:
            factor = limit / length
            if flat.dtype == torch.float64:
                gradient.mul_(factor)
            else:
                gradient.copy_(gradient.float() * factor)


def clip_limit(clip_norm: float, ranks: int, mean: bool, scale: float) -> float:
    """How long a parameter's gradient may be on each rank, so that what arrives is ``clip_norm``.

    Deep Gradient Compression (arXiv 1712.01887, section 3.2) clips what each of n workers adds to
    the sum at ``clip_norm / sqrt(n)``: as long as n independent contributions of that length are
    together ``clip_norm`` long. To a mean a worker adds its gradient over n, so the gradient itself
    may be ``clip_norm * sqrt(n)`` long.

    Args:
        clip_norm: The limit of the result, without loss scale.
        ranks: n.
        mean: The result is a mean, not a sum.
        scale: The loss scale.
    """
    root = math.sqrt(ranks)
    return clip_norm * scale * (root if mean else 1 / root)
