"""What ranks do in test_transfers.py: send directly, and look when receives are posted."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pydist
from pydist.transport import groups
from pydist.transport.communicator import communicator
from pydist.transport.link import Link
from pydist.transport.transfers import Direct, Kind


def _group() -> dist.ProcessGroup:
    return communicator().second


def rows_to_everyone(rank: int, ranks: int) -> None:
    """A row for each rank, or one for all; several transfers under way, sent in their order."""
    sizes = (1, 16, 70_000)
    received = [torch.zeros((ranks, size), dtype=torch.uint8) for size in sizes for _ in range(2)]
    transfers = [
        Direct(rows, rank, _group(), Kind.SCALES.tag(i)) for i, rows in enumerate(received)
    ]
    for i, (transfer, rows) in enumerate(zip(transfers, received, strict=True)):
        each = torch.arange(ranks, dtype=torch.uint8) if i % 2 else torch.zeros(1).byte()
        sent = (each + 10 * rank).view(-1, 1).repeat(1, rows.shape[1])
        transfer.send(sent)
        assert transfer.sent() is sent and transfer.sent() is None
    for i, transfer in enumerate(transfers):
        expected = 10 * torch.arange(ranks, dtype=torch.uint8) + (rank if i % 2 else 0)
        assert bool((transfer.wait() == expected.view(-1, 1)).all())


def shorter_messages(rank: int, ranks: int) -> None:
    """A message may be shorter than the memory that waits for it, by another length per rank."""
    for turn in range(3):
        received = torch.full((ranks, 100), 255, dtype=torch.uint8)
        transfer = Direct(received, rank, _group(), Kind.PHASE_2.tag(turn))
        message = torch.full((1 + 20 * rank,), rank, dtype=torch.uint8)
        transfer.send_each([message] * ranks)
        for sender, row in enumerate(transfer.wait()):
            length = 1 + 20 * sender
            assert bool((row[:length] == sender).all()) and bool((row[length:] == 255).all())


def refused_then_made(rank: int, ranks: int) -> None:
    """What was posted for refused calls, of other lengths by rank, takes nothing of later ones."""
    for turn in range(4):
        n = 1000 + 500 * rank
        with pytest.raises(pydist.MismatchError, match="numel"):
            pydist.all_reduce(torch.ones(n), pydist.Raw(), step=turn, algorithm="two_phase")
        x = torch.ones(700)
        pydist.all_reduce(x, pydist.Raw(), op="sum", step=turn, algorithm="two_phase")
        assert bool((x == ranks).all())


class _Log:
    """Posts and arrivals of a rank's messages, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._works: list[tuple[Any, str]] = []

    def posted(self, receive: Any) -> Any:
        def post(tensor: Tensor, source: int, group: dist.ProcessGroup, tag: int) -> Any:
            work, kind = receive(tensor, source, group, tag), Kind(tag % len(Kind)).label
            self.events.append(("post", kind))
            self._works.append((work, kind))
            return work

        return post

    def arrived(self, wait: Any) -> Any:
        def waited(work: Any) -> None:
            wait(work)
            self.events += [("arrive", kind) for other, kind in self._works if other is work]

        return waited


def posted_ahead(rank: int, ranks: int, algorithm: str, codec: Any) -> list[tuple[str, str]]:
    """A call's posts and arrivals; the receives of its agreement were posted before it began."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(rank))
    communicator()
    log = _Log()
    with (
        mock.patch.object(groups, "receive", log.posted(groups.receive)),
        mock.patch.object(groups, "wait", log.arrived(groups.wait)),
    ):
        pydist.all_reduce(x, codec, step=0, algorithm=algorithm)
        begin = len(log.events)
        pydist.all_reduce(x, codec, step=1, algorithm=algorithm)
    return list(dict.fromkeys(log.events[begin:]))


def measured(rank: int, ranks: int) -> Link:
    """What a communicator holds; the same bits come of any link."""
    comm = communicator(dist.new_group())
    assert comm.link is not None
    x, results = torch.randn(70_000, generator=torch.Generator().manual_seed(rank)), []
    for link in (comm.link, Link(0.0, 1.0), Link(10.0, 1e9)):
        with mock.patch.object(communicator(), "link", link):
            results.append(pydist.all_reduce(x.clone(), pydist.QSGD(4), step=3))
    assert all(torch.equal(result, results[0]) for result in results)
    return comm.link
