"""What a hook sent and what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydist.ddp.carriers import Sending
from pydist.ddp.layout import Layout
from pydist.encoding.bucket import BucketCoder
from pydist.encoding.raw import RawRows
from pydist.formats import wire
from pydist.training.advice import Advice, BucketSize, advise
from pydist.training.damage import Damage
from pydist.training.kept import Kept
from pydist.training.stats import ring_bytes


class Stats:
    """Counters of one state; cheap enough to be always on.

    Backward counts, and any thread may read meanwhile: what is read is replaced, never changed.

    Attributes:
        layouts: Those of the last step's buckets.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.wire_bytes = self.inside_bytes = 0
        self.raw_bytes = 0.0
        self.steps = 0
        self.seconds: Counter[str] = Counter()
        self.layouts: list[Layout] = []
        self._sent: list[Layout] = []  # in this step
        self._non_finite: int | Tensor = 0
        self.damage = Damage()
        self._sizes: list[BucketSize] = []
        self._lost: list[tuple[Tensor, Tensor]] = []
        self._measured_step = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layouts": [], "_sent": []}

    def sent(self, layout: Layout, flat: Tensor, ranks: int, *, first: bool) -> None:
        """Counts a bucket of so many ranks at its start; ``first``: of a step."""
        self.calls += 1
        self.raw_bytes += ring_bytes(flat.numel() * flat.element_size(), ranks)
        self._sent = [layout] if first else [*self._sent, layout]

    def step_over(self, sent: Sequence[tuple[Sending, BucketCoder, Tensor]]) -> bool | Tensor:
        """Counts a step that is complete: what was sent, what encoded it, and the bucket.

        Returns:
            Whether any rank's gradients were not finite; on CUDA a tensor that says so.
        """
        self.steps += 1
        self.layouts, seconds = self._sent, self.seconds.copy()
        for sending, coder, _ in sent:
            self.wire_bytes += sending.call.bytes_sent
            self.inside_bytes += sending.call.inside_bytes
            seconds.update(coder.seconds)
        self.seconds = seconds
        if not sent:
            return False
        sections = [section for _, coder, _ in sent for section in coder.plan.sections]
        if any(not isinstance(section.codec, RawRows) for section in sections):
            self._sizes = [_size(coder, flat) for _, coder, flat in sent]
        flags = torch.cat([sending.flagged.not_finite for sending, _, _ in sent])
        bad = (flags & wire.FLAG_NON_FINITE).amax()
        if bad.is_cuda:  # no wait for the device; summary() waits
            self._non_finite = self._non_finite + bad.long()
            return bad
        self._non_finite += int(bad)
        return bool(bad)

    def measured(self, lost: Sequence[tuple[Tensor, Tensor]], step: int) -> None:
        """Takes a step's squares of norms: what was to be sent, and what was not, by parameter."""
        self._lost, self._measured_step = list(lost), step

    @property
    def compression_error(self) -> float:
        """Norm of what was not sent over that of what was to be, when last measured; else NaN."""
        whole, rest = (sum(float(pair[i]) for pair in self._lost) for i in (0, 1))
        return math.sqrt(rest / whole) if whole else float("nan")

    def advice(self) -> Advice:
        """Whether the buckets of the last compressed step are of a good size."""
        return advise(self._sizes)

    @property
    def non_finite_steps(self) -> int:
        """Steps in which some rank's gradients were not finite."""
        return int(self._non_finite)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Reason to number of parameters and of elements that travelled raw in the last step."""
        result: dict[str, dict[str, int]] = {}
        for layout in self.layouts:
            for choice, part in zip(layout.choices, layout.parts, strict=True):
                if choice.codec is None:
                    entry = result.setdefault(choice.reason, {"parameters": 0, "elements": 0})
                    entry["parameters"] += 1
                    entry["elements"] += part.numel
        return result

    def summary(self, kept: Kept) -> dict[str, Any]:
        """Everything, as plain numbers."""
        residuals = kept.residuals
        return {
            "step": kept.step,
            "steps": self.steps,
            "non_finite_steps": self.non_finite_steps,
            "buckets": self.calls,
            "wire_bytes": self.wire_bytes,
            "wire_bytes_inside": self.inside_bytes,
            "raw_bytes": int(self.raw_bytes),
            "ratio": self.raw_bytes / self.wire_bytes if self.wire_bytes else float("nan"),
            "residual_bytes": residuals.memory_bytes,
            "residual_norm": residuals.norm(),
            "momentum_bytes": kept.momenta.memory_bytes,
            "compression_error": self.compression_error,
            "compression_error_step": self._measured_step,
            "seconds": dict(self.seconds),
            "fallbacks": self.fallbacks(),
            "damage_dropped": self.damage.counts(),
            "world_size": kept.ranks,
            "ranks_per_node": 1 if kept.levels is None else kept.levels.local,
        }

    @staticmethod
    def scalars(summary: dict[str, Any]) -> dict[str, float]:
        """The numbers of a summary, flat."""
        flat = {key: float(value) for key, value in summary.items() if not isinstance(value, dict)}
        raw = summary["fallbacks"].values()
        return flat | {
            **{f"seconds/{name}": float(value) for name, value in summary["seconds"].items()},
            "seconds": float(sum(summary["seconds"].values())),
            "fallback_parameters": float(sum(entry["parameters"] for entry in raw)),
            "fallback_elements": float(sum(entry["elements"] for entry in raw)),
            "damage_dropped": float(sum(summary["damage_dropped"].values())),
        }

    @staticmethod
    def line(summary: dict[str, Any]) -> str:
        """One line for a log."""
        raw = "; ".join(
            f"{entry['parameters']} parameters ({entry['elements']} elements) raw: {reason}"
            for reason, entry in summary["fallbacks"].items()
        )
        return (
            f"{summary['steps']} steps, {summary['wire_bytes'] / 1e6:.3g} MB sent, "
            f"{summary['ratio']:.3g}x fewer than raw, "
            f"{summary['non_finite_steps']} steps not finite, "
            f"residuals {summary['residual_bytes'] / 1e6:.3g} MB, "
            f"compression error {summary['compression_error']:.3g}" + (f"; {raw}" if raw else "")
        )


def _size(coder: BucketCoder, flat: Tensor) -> BucketSize:
    plan = coder.plan
    size = plan.message_bytes(plan.units)
    return BucketSize(flat.numel() * flat.element_size(), size, len(plan.parts))
