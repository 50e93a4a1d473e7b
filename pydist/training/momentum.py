"""Momentum correction: momentum that workers apply before they compress (DGC).

With momentum in the optimizer, what a sparse codec holds back for many steps would be added up
without momentum and only then enter it. Deep Gradient Compression (Lin et al., ICLR 2018, arXiv
1712.01887, section 3.2) therefore accumulates velocities instead of gradients, on every worker::

    u = m * u + g        the momentum, kept here
    v = v + u            the residual, kept in the residuals
    send codec(v), keep what was not sent in v; for TopK zero u where v was sent

Momenta are keyed by parameter as residuals are, so neither buckets nor their sizes touch them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.shares import Part

LARGEST = 1.8e19
"""Magnitude beyond which a residual or a momentum is damage: its square is no float32 any more."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass
class Advanced:
    """Momenta of one step that have not been taken over yet.

    Attributes:
        values: By ordinal, what is sent instead of the gradient; NaN where that is not finite. Of
            parameters with residuals in the type of their momentum, of others not rounded to it.
        kept: By ordinal, what becomes the momentum where all of it is finite: with residuals the
            same tensor, which the codec masks.
        apart: Of parameters that were sent a part of their step's gradient before, those with
            residuals: what the codec masks is not what becomes the momentum.
        keeps: Where the device alone knows which parameters are used and finite: bool [] by
            ordinal, whether ``kept`` becomes the momentum. Empty: all do.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)
    keeps: dict[int, Tensor] = field(default_factory=dict)


class Momenta:
    """The momenta of one rank, flat in the memory order of their parameters.

    Args:
        factor: m, 0 <= m < 1; zero keeps nothing.
        dtype: float32, or bfloat16 for half the memory; those of float64 gradients are float64.

    Attributes:
        held: By ordinal.
    """

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        self.factor, self.dtype = factor, dtype
        self.held: dict[int, Tensor] = {}

    def dtype_for(self, gradient: torch.dtype) -> torch.dtype:
        """The type of a parameter's momentum."""
        return gradient if gradient == torch.float64 else self.dtype

    def advance(
        self,
        flat: Tensor,
        parts: Sequence[Part],
        used: np.ndarray | Tensor,
        with_residual: Sequence[bool],
        again: Collection[int] = (),
    ) -> Advanced:
        """``u = m * u + g`` in float32, two roundings, then what is kept to the storage's type.

        Where a step has several backwards, the later ones add their gradients alone: ``u = u + g``,
        and g is what is sent.

        Nothing that is kept changes before :meth:`take`. A parameter whose new momentum is not
        finite everywhere keeps the old one.

        Args:
            flat: A bucket's gradients.
            parts: The parameters in it.
            used: Which of them have a gradient that is not all zeros, bool [parts]; the others have
                no part. A tensor on the device of ``flat`` is not waited for.
            with_residual: Which are encoded with a residual, so in the type of both.
            again: Ordinals of parameters whose momentum has moved in this step.
        """
        result, stored = Advanced(), {}
        on_device = used if isinstance(used, Tensor) else None
        flags: Sequence[Any] = list(used)
        for part, is_used, narrow in zip(parts, flags, with_residual, strict=True):
            if not part.numel or (on_device is None and not is_used):
                continue
            gradient = flat[part.offset : part.offset + part.numel]
            dtype = self.dtype_for(gradient.dtype)
            wide = torch.promote_types(dtype, torch.float32)
            old = self.held.get(part.ordinal)
            if old is None:
                new = torch.zeros(part.numel, dtype=wide, device=flat.device)
            else:
                factor = 1.0 if part.ordinal in again else self.factor
                new = old.to(flat.device, wide) * factor
            # Two operations: one could be contracted, on one machine and not on another.
            stored[part.ordinal] = new.add_(gradient).to(dtype)
            result.values[part.ordinal] = stored[part.ordinal] if narrow else new
            if part.ordinal in again:
                result.values[part.ordinal] = gradient.to(dtype if narrow else wide, copy=True)
                if narrow:
                    # What the codec masks becomes zero, so nothing else may be.
                    sent = result.values[part.ordinal]
                    sent.masked_fill_(sent == 0, _TINY)
                    result.apart.add(part.ordinal)
            if on_device is not None:
                sent = result.values[part.ordinal]
                sent.copy_(torch.where(is_used, sent, gradient.to(sent.dtype)))
        finite = _all_finite(list(stored.values()))
        if on_device is None:
            pairs = zip(stored.items(), finite.tolist(), strict=True)
            result.kept = dict(item for item, is_finite in pairs if is_finite)
        else:
            result.kept = stored
            if len(stored) < len(parts):  # without the parts that are empty
                there = [flag for part, flag in zip(parts, flags, strict=True) if part.numel]
                on_device = torch.stack(there) if there else on_device[:0]
            result.keeps = dict(zip(stored, (finite & on_device).unbind(), strict=True))
        return result

    def take(self, advanced: Advanced) -> None:
        """Takes over the momenta of a step."""
        for ordinal in advanced.apart & advanced.kept.keys():
            advanced.kept[ordinal].masked_fill_(advanced.values[ordinal] == 0, 0.0)
        for ordinal, keeps in advanced.keeps.items():
            new, old = advanced.kept[ordinal], self.held.get(ordinal)
            old = torch.zeros_like(new) if old is None else old.to(new.device)
            advanced.kept[ordinal] = torch.where(keeps, new, old)
        self.held.update(advanced.kept)

    def turn(self, ordinal: int, change: Callable[[Tensor], Tensor]) -> None:
        """Brings a parameter's momentum into another order of memory; see ``Residuals``."""
        if (held := self.held.get(ordinal)) is not None:
            self.held[ordinal] = change(held)

    def cut(self, ordinal: int, first: int, last: int) -> None:
        """Keeps these elements of a parameter's momentum, where it is of more."""
        held = self.held.get(ordinal)
        if held is not None and held.numel() != last - first:
            self.held[ordinal] = held[first:last].clone()

    def drop_damaged(self) -> list[int]:
        """Sets elements to zero that no step could have left; the ordinals that had some."""
        return drop_damaged(self.held)

    def rescale(self, ratio: float) -> None:
        """Multiplies all momenta, as a loss scale changed by ``ratio``; see ``Residuals``."""
        for values in self.held.values():
            values.mul_(ratio).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all momenta."""
        return sum(x.numel() * x.element_size() for x in list(self.held.values()))


def is_damaged(values: Tensor) -> bool:
    """Whether something is not finite, or beyond :data:`LARGEST`."""
    return not bool((values.abs() <= LARGEST).all())


def drop_damaged(tensors: dict[int, Tensor]) -> list[int]:
    """Sets damaged elements to zero; returns the keys of the tensors that had some."""
    damaged = [key for key, values in tensors.items() if is_damaged(values)]
    for key in damaged:
        values = tensors[key]
        values.masked_fill_(~(values.abs() <= LARGEST), 0.0)
    return damaged


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Which tensors hold neither NaN nor infinity, bool [tensors]."""
    if not tensors:
        return torch.zeros(0, dtype=torch.bool, device="cpu")
    norms = torch.stack([x.double() for x in torch._foreach_norm(tensors, math.inf)])
    return norms.isfinite()
