"""What a hook sent and what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydist import wire
from pydist.codecs.bucket_coder import BucketCoder, BucketPlan
from pydist.codecs.bucket_sections import RawSection
from pydist.communicator import Communicator
from pydist.ddp.options import Choice
from pydist.feedback import Residuals
from pydist.momentum import Momenta
from pydist.road import Road
from pydist.training.advice import Advice, BucketSize, advise


class Stats:
    """Counters of one state; cheap enough to be always on."""

    def __init__(self) -> None:
        self.calls = 0
        self.wire_bytes = 0
        self.raw_bytes = 0.0
        self.steps = 0
        self.seconds: Counter[str] = Counter()
        self._non_finite: int | Tensor = 0
        # Elements and names of what travels raw, by reason; as of the last step.
        self._raw: dict[int, tuple[str, int]] = {}
        self._sizes: list[BucketSize] = []
        self._lost: list[tuple[Tensor, Tensor]] = []
        self._measured_step = -1

    def sent(self, choices: Sequence[Choice], plan: BucketPlan, flat: Tensor) -> None:
        """Counts a bucket at its start."""
        self.calls += 1
        ring = 2 * (plan.ranks - 1) / plan.ranks
        self.raw_bytes += ring * flat.numel() * flat.element_size()
        for choice, part in zip(choices, plan.parts, strict=True):
            if choice.codec is None:
                self._raw[part.ordinal] = (choice.reason, part.numel)
            else:
                self._raw.pop(part.ordinal, None)

    def step_over(self, sent: Sequence[tuple[Road, BucketCoder]]) -> bool | Tensor:
        """Counts a step that is complete.

        Returns:
            Whether any rank's gradients were not finite; on CUDA a tensor that says so.
        """
        self.steps += 1
        for road, coder in sent:
            self.wire_bytes += road.bytes_sent + (road.comm.world_size - 1) * wire.HEADER_BYTES
            self.seconds.update(coder.seconds)
        if not sent:
            return False
        coders = [coder for _, coder in sent]
        if any(not isinstance(x, RawSection) for coder in coders for x in coder.plan.sections):
            self._sizes = [_size(coder) for coder in coders]
        flags = torch.stack([coder.not_finite.view(1) for _, coder in sent])
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
        for reason, numel in self._raw.values():
            entry = result.setdefault(reason, {"parameters": 0, "elements": 0})
            entry["parameters"] += 1
            entry["elements"] += numel
        return result

    def summary(
        self, comm: Communicator, residuals: Residuals, momenta: Momenta, step: int
    ) -> dict[str, Any]:
        """Everything, as plain numbers."""
        return {
            "step": step,
            "steps": self.steps,
            "non_finite_steps": self.non_finite_steps,
            "buckets": self.calls,
            "wire_bytes": self.wire_bytes,
            "raw_bytes": int(self.raw_bytes),
            "ratio": self.raw_bytes / self.wire_bytes if self.wire_bytes else float("nan"),
            "residual_bytes": residuals.memory_bytes,
            "residual_norm": residuals.norm(),
            "momentum_bytes": momenta.memory_bytes,
            "compression_error": self.compression_error,
            "compression_error_step": self._measured_step,
            "seconds": dict(self.seconds),
            "fallbacks": self.fallbacks(),
            "world_size": comm.world_size,
        }

    @staticmethod
    def scalars(summary: dict[str, Any]) -> dict[str, float]:
        """The numbers of a summary, flat."""
        names = (
            "non_finite_steps", "wire_bytes", "raw_bytes", "ratio", "residual_bytes",
            "residual_norm", "momentum_bytes", "compression_error",
        )  # fmt: skip
        flat = {name: float(summary[name]) for name in names}
        return flat | {f"seconds/{name}": value for name, value in summary["seconds"].items()}

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


def _size(coder: BucketCoder) -> BucketSize:
    flat, plan = coder.bucket.flat, coder.plan
    size = plan.message_bytes(plan.units)
    return BucketSize(flat.numel() * flat.element_size(), size, len(plan.parts))
