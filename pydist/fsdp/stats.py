"""What was sent for sharded parameters, and what was not compressed and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pydist import wire
from pydist.road import Road


@dataclass
class Direction:
    """Counters of one direction: gradients, or parameters.

    Attributes:
        calls: Collectives that pydist sent.
        wire_bytes: What this rank sent in them, headers and agreement included.
        raw_bytes: What a ring of uncompressed values would have sent in all collectives.
        uncompressed: Collectives that went past pydist, by reason: calls and bytes.
        raw: Parameters that travel raw beside the others, name to reason.
    """

    calls: int = 0
    wire_bytes: int = 0
    raw_bytes: int = 0
    uncompressed: dict[str, list[int]] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    _non_finite: int | Tensor = 0

    def planned(self, row: Tensor, ranks: int) -> int:
        """Counts what a call would send uncompressed; ``row`` is one rank's part of it."""
        size = (ranks - 1) * row.numel() * row.element_size()
        self.raw_bytes += size
        return size

    def passed(self, reason: str, size: int) -> None:
        """Counts a call that went past pydist."""
        entry = self.uncompressed.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += size

    def arrived(self, road: Road) -> None:
        """Counts a call that is over."""
        self.calls += 1
        self.wire_bytes += road.bytes_sent + (road.comm.world_size - 1) * wire.HEADER_BYTES
        bad = (road.flags & wire.FLAG_NON_FINITE) != 0
        # No wait for the device: summary() waits.
        self._non_finite = self._non_finite + (bad[0].long() if bad.is_cuda else int(bad))

    def summary(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        sent = self.wire_bytes + sum(size for _, size in self.uncompressed.values())
        reasons: dict[str, int] = {}
        for reason in self.raw.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        return {
            "calls": self.calls,
            "wire_bytes": self.wire_bytes,
            "raw_bytes": self.raw_bytes,
            "ratio": self.raw_bytes / sent if sent else float("nan"),
            "non_finite": int(self._non_finite),
            "uncompressed": {
                reason: {"calls": calls, "bytes": size}
                for reason, (calls, size) in self.uncompressed.items()
            },
            "raw": reasons,
        }
