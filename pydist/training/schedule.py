"""Codecs that change as training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydist.codecs import Codec
from pydist.formats import wire

Codecs = Codec | Mapping[str, Codec | None] | None


@dataclass(frozen=True, init=False)
class Schedule:
    """Codecs by step: DGC's warm-up of densities, say, or fewer and fewer bits.

    A stage begins with its step and lasts until the next one's. Steps are those of
    ``CompressionState.step``, the same on all ranks and in a resumed run; steps that
    ``exact_skip`` took back do not count. Residuals and momenta outlive a change of codec.

    Args:
        stages: Pairs of a stage's first step and its codec, a dict of codecs by pattern, or
            ``None`` (raw); the first begins with step 0, the others follow in order.

    Raises:
        TypeError: A stage is not a pair, or its step is not an integer.
        ValueError: There is no stage, the first does not begin with step 0, or a stage does not
            begin after the one before.

    Example:
        Deep Gradient Compression's warm-up (arXiv 1712.01887, section 3.3), an epoch a density::

            densities = (0.25, 0.0625, 0.015625, 0.004, 0.001)
            Schedule([(i * epoch, TopK(density)) for i, density in enumerate(densities)])
    """

    stages: tuple[tuple[int, Codecs], ...]

    def __init__(self, stages: Iterable[tuple[int, Codecs]]) -> None:
        found: list[tuple[int, Codecs]] = []
        for i, stage in enumerate(stages):
            if not isinstance(stage, tuple) or len(stage) != 2:
                raise TypeError(f"stages[{i}] must be a pair (step, codec), got {stage!r}")
            step, codec = wire.as_int(f"the step of stages[{i}]", stage[0]), stage[1]
            if isinstance(codec, Schedule):
                raise TypeError(f"the codec of stages[{i}] must not be a Schedule")
            if not found and step:
                raise ValueError(f"stages must begin with step 0, got {step}")
            if found and step <= found[-1][0]:
                raise ValueError(f"stages[{i}] must begin after step {found[-1][0]}, got {step}")
            found.append((step, codec))
        if not found:
            raise ValueError("stages must not be empty")
        object.__setattr__(self, "stages", tuple(found))

    def stage(self, step: int) -> int:
        """Which stage a step belongs to."""
        return sum(first <= step for first, _ in self.stages) - 1

    def described(self) -> dict[str, Any]:
        """First step to codec by pattern, as all ranks must have given it."""
        return {str(step): described(codec) for step, codec in self.stages}


def described(codec: Codecs) -> dict[str, str]:
    """Pattern to codec."""
    codecs = codec if isinstance(codec, Mapping) else {"*": codec}
    return {pattern: repr(one) for pattern, one in codecs.items()}
