"""What was sent for sharded parameters, and what was not compressed and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pydist.formats import wire
from pydist.training.damage import Damage
from pydist.transport.exchange import Exchange


@dataclass
class Direction:
    """Counters of one direction: gradients, or parameters.

    Attributes:
        calls: Collectives that pydist sent.
        wire_bytes: What this rank sent in them, headers and agreement included.
        raw_bytes: What a ring of uncompressed values would have sent in all collectives.
        uncompressed: Collectives that went past pydist, by reason: calls and bytes.
        raw: Parameters that travel raw beside the others, name to reason.
        damage: Residuals that were damaged.
    """

    calls: int = 0
    wire_bytes: int = 0
    raw_bytes: int = 0
    uncompressed: dict[str, list[int]] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    damage: Damage = field(default_factory=Damage)
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

    def arrived(self, exchange: Exchange) -> bool | Tensor:
        """Counts a call that is over.

        Returns:
            Whether something was not finite; on CUDA a tensor that says so.
        """
        self.calls += 1
        self.wire_bytes += exchange.bytes_sent
        bad = (exchange.flags & wire.FLAG_NON_FINITE) != 0
        # No wait for the device: summary() waits.
        self._non_finite = self._non_finite + (bad[0].long() if bad.is_cuda else int(bad))
        return bad if bad.is_cuda else bool(bad)

    @property
    def non_finite(self) -> int:
        """Calls in which something was not finite; waits for the device."""
        return int(self._non_finite)

    def summary(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        past = dict(self.uncompressed)  # backward may go on meanwhile, in another thread
        sent = self.wire_bytes + sum(size for _, size in past.values())
        reasons = Counter(list(self.raw.values()))
        return {
            "calls": self.calls,
            "wire_bytes": self.wire_bytes,
            "raw_bytes": self.raw_bytes,
            "ratio": self.raw_bytes / sent if sent else float("nan"),
            "non_finite": int(self._non_finite),
            "uncompressed": {
                reason: {"calls": calls, "bytes": size} for reason, (calls, size) in past.items()
            },
            "raw": dict(reasons),
            "damage_dropped": self.damage.counts(),
        }

    @staticmethod
    def scalars(summary: dict[str, Any]) -> dict[str, float]:
        """The numbers of a summary, flat."""
        flat = {key: float(value) for key, value in summary.items() if not isinstance(value, dict)}
        past = summary["uncompressed"].values()
        return flat | {
            "uncompressed_calls": float(sum(entry["calls"] for entry in past)),
            "uncompressed_bytes": float(sum(entry["bytes"] for entry in past)),
            "raw_parameters": float(sum(summary["raw"].values())),
            "damage_dropped": float(sum(summary["damage_dropped"].values())),
        }
