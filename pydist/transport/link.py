"""How far apart the ranks of a group are: measured once, when their connections are made."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pydist.transport.transfers import Direct, Kind

TRIES = 3
SHORT, LONG = 16, 12 * 1024
"""Bytes of the messages; the long ones fit in what TCP sends before the first answer."""
FASTEST = 1.25e9
"""Bytes per second; beyond it other things than the wire take the time."""


@dataclass(frozen=True)
class Link:
    """What it takes to send a message to every rank.

    Attributes:
        seconds: Of a short one, from the send to its arrival: half a round trip.
        rate: Bytes per second that a rank sends, to all others together.
    """

    seconds: float
    rate: float

    @property
    def phase_bytes(self) -> float:
        """How many bytes take as long as one more phase."""
        return self.seconds * self.rate


def measure(group: dist.ProcessGroup, rank: int, size: int) -> Link:
    """What rank 0 measures, on every rank; some four round trips.

    Args:
        group: A group with connections that nobody uses meanwhile.
        rank: This rank's place in it.
        size: Its ranks, two or more.
    """

    def expect(length: int) -> Direct:
        received = torch.zeros((size, length), dtype=torch.uint8, device="cpu")
        return Direct(received, rank, group, Kind.BYTES.tag(0))

    lengths = [SHORT] * (1 + TRIES) + [LONG] * TRIES  # the first lets the ranks begin together
    transfers, answer, took = [expect(length) for length in lengths], expect(16), []
    for transfer, length in zip(transfers, lengths, strict=True):
        start = time.perf_counter()
        transfer.send(torch.zeros((1, length), dtype=torch.uint8, device="cpu"))
        transfer.wait()
        took.append(time.perf_counter() - start)
    short, long = min(took[1 : 1 + TRIES]), min(took[1 + TRIES :])
    rate = (size - 1) * (LONG - SHORT) / max(long - short, 1e-9)
    mine = torch.tensor([short, min(rate, FASTEST)], dtype=torch.float64, device="cpu")
    answer.send(mine.view(torch.uint8).view(1, -1))
    return Link(*answer.wait()[0].view(torch.float64).tolist())
