"""Momentum correction: momentum that workers apply before they compress (DGC).

With momentum in the optimizer, what a sparse codec holds back for many steps would be added up
without momentum and only then enter it. Deep Gradient Compression (Lin et al., ICLR 2018, arXiv
1712.01887, section 3.2) therefore accumulates velocities instead of gradients, on every worker::

    u = m * u + g        the momentum, kept here
    v = v + u            the residual, kept in pydist.feedback
    send codec(v), keep what was not sent in v; for TopK zero u where v was sent

Momenta are keyed by parameter as residuals are, so neither buckets nor their sizes touch them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pydist.codecs.shares import Part


@dataclass
class Advanced:
    """Momenta of one step that have not been taken over yet.

    Attributes:
        values: By ordinal, what is sent instead of the gradient; NaN where that is not finite. Of
            parameters with residuals in the type of their momentum, of others not rounded to it.
        kept: By ordinal, what becomes the momentum where all of it is finite: with residuals the
            same tensor, which the codec masks.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)


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
        self, flat: Tensor, parts: Sequence[Part], used: np.ndarray, with_residual: Sequence[bool]
    ) -> Advanced:
        """``u = m * u + g`` in float32, two roundings, then what is kept to the storage's type.

        Nothing that is kept changes before :meth:`take`. A parameter whose new momentum is not
        finite everywhere keeps the old one. On CUDA this waits for the device.

        Args:
            flat: A bucket's gradients.
            parts: The parameters in it.
            used: Which of them have a gradient that is not all zeros; the others have no part.
            with_residual: Which are encoded with a residual, so in the type of both.
        """
        result, stored = Advanced(), {}
        for part, is_used, narrow in zip(parts, used, with_residual, strict=True):
            if not is_used:
                continue
            gradient = flat[part.offset : part.offset + part.numel]
            dtype = self.dtype_for(gradient.dtype)
            wide = torch.promote_types(dtype, torch.float32)
            old = self.held.get(part.ordinal)
            if old is None:
                new = torch.zeros(part.numel, dtype=wide, device=flat.device)
            else:
                new = old.to(wide) * self.factor
            # Two operations: one could be contracted, on one machine and not on another.
            stored[part.ordinal] = new.add_(gradient).to(dtype)
            result.values[part.ordinal] = stored[part.ordinal] if narrow else new
        finite = _all_finite(list(stored.values()))
        for (ordinal, value), is_finite in zip(stored.items(), finite, strict=True):
            if is_finite:
                result.kept[ordinal] = value
        return result

    def take(self, advanced: Advanced) -> None:
        """Takes over the momenta of a step."""
        self.held.update(advanced.kept)

    def rescale(self, ratio: float) -> None:
        """Multiplies all momenta, as a loss scale changed by ``ratio``; see ``Residuals``."""
        for values in self.held.values():
            values.mul_(ratio).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def clear(self) -> None:
        """Forgets everything."""
        self.held.clear()

    @property
    def memory_bytes(self) -> int:
        """Bytes of all momenta."""
        return sum(x.numel() * x.element_size() for x in self.held.values())


def _all_finite(tensors: list[Tensor]) -> Iterable[bool]:
    """Which tensors hold neither NaN nor infinity; one wait for a device."""
    if not tensors:
        return []
    norms = torch.stack([x.double() for x in torch._foreach_norm(tensors, math.inf)])
    return norms.isfinite().tolist()
