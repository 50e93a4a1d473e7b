"""Whether DDP's buckets are of a good size for the messages that are made of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydist.transport import exchange

LEAST_BUCKETS = 4
"""With fewer, more than a quarter of the gradients travels after backward has ended."""
LEAST_ROUND_TRIPS = 4
"""A payload should be worth as many round trips: agreement and two phases take three."""
MIB = 1024 * 1024


@dataclass(frozen=True)
class BucketSize:
    """One bucket as it was sent last.

    Attributes:
        raw_bytes: Of its gradients.
        payload_bytes: What a rank encodes of it, for all owners.
        parameters: How many parameters it holds.
    """

    raw_bytes: int
    payload_bytes: int
    parameters: int


@dataclass(frozen=True)
class Advice:
    """What ``bucket_cap_mb`` of DDP should be.

    Attributes:
        verdict: ``"larger"``, ``"smaller"``, ``"keep"``, or ``"unknown"`` where nothing has been
            compressed yet.
        bucket_cap_mb: The proposed size, MiB; 0 where it is unknown.
        buckets: Buckets a step.
        payload_bytes: The median bucket's payload.
        reason: In words.
    """

    verdict: str
    bucket_cap_mb: float
    buckets: int
    payload_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"bucket_cap_mb: {self.verdict}: {self.reason}"


def advise(sizes: Sequence[BucketSize]) -> Advice:
    """Advice from the buckets of a step.

    A bucket should fill one chunk of the exchange (:data:`pydist.transport.exchange.CHUNK_BYTES`):
    less, and the agreement before every bucket is a larger part of it; more, and nothing is gained.
    There should be four buckets at least, so that most of them travel while backward still runs,
    unless their payloads were then worth less than four round trips
    (:data:`pydist.transport.exchange.LATENCY_BYTES`). Within a factor of two of that size the
    buckets stay as they are.
    """
    raw, payload = sum(x.raw_bytes for x in sizes), sum(x.payload_bytes for x in sizes)
    if not payload:
        return Advice("unknown", 0.0, len(sizes), 0, "nothing has been compressed yet")
    ratio = raw / payload
    proposed = min(exchange.CHUNK_BYTES * ratio, raw / LEAST_BUCKETS)
    proposed = min(max(proposed, LEAST_ROUND_TRIPS * exchange.LATENCY_BYTES * ratio), raw)
    usual = statistics.median_high([x.raw_bytes for x in sizes])
    typical = int(statistics.median_high([x.payload_bytes for x in sizes]))
    cap = max(0.01, round(proposed / MIB, 2))
    found = (
        f"{len(sizes)} buckets a step, payloads of {typical / 1024:.4g} KiB (a chunk is "
        f"{exchange.CHUNK_BYTES / 1024:.4g} KiB, "
        f"a round trip costs {exchange.LATENCY_BYTES / 1024:.4g})"
    )
    # What one parameter alone fills no cap makes smaller.
    divisible = [x for x in sizes if x.raw_bytes > 2 * proposed and x.parameters > 1]
    if len(sizes) > 1 and usual < proposed / 2:
        return Advice("larger", cap, len(sizes), typical, f"{found}: try {cap:g}")
    if divisible:
        return Advice("smaller", cap, len(sizes), typical, f"{found}: try {cap:g}")
    return Advice("keep", cap, len(sizes), typical, found)
