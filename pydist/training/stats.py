"""Counters of what was sent, as plain numbers, for loggers and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pydist.collectives.grid import HierarchicalCall
from pydist.transport.exchange import Exchange


class ScalarWriter(Protocol):
    """What TensorBoard's ``SummaryWriter`` and its likes have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Takes one number."""
        ...


def write_scalars(
    writer: ScalarWriter, values: Mapping[str, float], step: int, prefix: str
) -> None:
    """Writes numbers under ``prefix/name``."""
    for name, value in values.items():
        writer.add_scalar(f"{prefix}/{name}", float(value), step)


def ring_bytes(size: int, ranks: int) -> float:
    """What a rank sends in an uncompressed ring all-reduce of ``size`` bytes."""
    return 2 * (ranks - 1) / ranks * size


class Counters:
    """What an optimizer sent.

    Attributes:
        steps: Steps since it was made.
        calls: Messages to all ranks, or buckets of them.
        wire_bytes: What this rank sent, headers and agreement included.
        inside_bytes: What of it went to ranks of its node, on two levels.
        raw_bytes: What a ring of the gradients would have sent.
        last_bytes: What this rank sent in the last call.
        dropped: Elements of kept state that were damaged and set to zero.
    """

    def __init__(self) -> None:
        self.steps = self.calls = self.wire_bytes = self.last_bytes = self.dropped = 0
        self.raw_bytes = 0.0
        self.inside_bytes = 0

    def sent(self, call: Exchange | HierarchicalCall, gradient_bytes: int, ranks: int) -> None:
        """Counts a call of so many ranks that is over."""
        self.calls += 1
        self.last_bytes = call.bytes_sent
        self.wire_bytes += self.last_bytes
        self.inside_bytes += call.inside_bytes
        self.raw_bytes += ring_bytes(gradient_bytes, ranks)

    def sent_nothing(self, gradient_bytes: int, ranks: int) -> None:
        """Counts a step on this rank alone."""
        self.raw_bytes += ring_bytes(gradient_bytes, ranks)

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than uncompressed; NaN where nothing was sent."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else float("nan")

    def summary(self) -> dict[str, float]:
        """Everything, as plain numbers."""
        return {
            "steps": self.steps,
            "calls": self.calls,
            "wire_bytes": self.wire_bytes,
            "wire_bytes_inside": self.inside_bytes,
            "raw_bytes": int(self.raw_bytes),
            "ratio": self.ratio,
            "dropped_elements": self.dropped,
        }

    def line(self) -> str:
        """The beginning of a line for a log."""
        return (
            f"{self.steps} steps, {self.wire_bytes / 1e6:.3g} MB sent, {self.ratio:.3g}x fewer "
            "than raw"
        )
