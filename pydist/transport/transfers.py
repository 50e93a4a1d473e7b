"""Transfers: one message from every rank to every rank.

In host memory every message is a send and a receive between two ranks. Gloo sends a message at once
where it knows that the receiver waits for it, which takes half a round trip. Otherwise the sender
says that it has something and is told to send, which takes one and a half. So receives are posted
as soon as their size is known, before the agreement even: every call has tags of its own, so what
is posted for a call that the ranks do not agree on never receives anything.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from pydist.transport import groups


class Kind(enum.IntEnum):
    """What a message is; messages of one kind and call arrive in the order they were sent in."""

    AGREEMENT = 0
    SCALES = 1
    PHASE_1 = 2
    PHASE_2 = 3
    CONFIRMATION = 4
    BYTES = 5

    @property
    def label(self) -> str:
        """Its name where bytes are counted."""
        return self.name.lower().replace("_", " ")

    def tag(self, number: int) -> int:
        """The tag of this kind of message in the call of this number; tags have 31 bits."""
        return (number * len(Kind) + self) % 2**31


class Transfer(Protocol):
    """A transfer: made, sent once, then waited for."""

    def send(self, rows: Tensor) -> None:
        """Starts to send; uint8 [ranks, bytes], row i to rank i, or [1, bytes] to everyone."""
        ...

    def sent(self) -> Tensor | None:
        """Waits until the memory of what was sent may be written; the rows, once."""
        ...

    def wait(self) -> Tensor:
        """What the ranks have sent here, uint8 [ranks, bytes]; waits for it."""
        ...

    def drop(self) -> Tensor | None:
        """Memory that is free where no rank is going to send."""
        ...


class Alone:
    """A transfer of one rank: what it sends is what it receives."""

    def send(self, rows: Tensor) -> None:
        """Keeps the rows."""
        self._rows = rows

    def sent(self) -> None:
        """The memory is what :meth:`wait` returns."""

    def wait(self) -> Tensor:
        """What was sent."""
        return self._rows

    def drop(self) -> None:
        """There is none."""


class Direct:
    """A transfer by sends and receives; posts the receives.

    Args:
        received: uint8 [ranks, bytes] in host memory, where messages are to arrive; longer ones are
            an error that ends the process.
        rank: This rank's place in the group.
        group: The group.
        tag: The tag of the messages.
    """

    def __init__(self, received: Tensor, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self.received = received
        self._rank, self._group, self._tag = rank, group, tag
        n = len(received)
        # From the next rank on, so that ranks do not all begin with the same one.
        self._peers = [(rank + i) % n for i in range(1, n)]
        rows = received.unbind()
        self._receives = [
            groups.receive(rows[peer], peer, group, tag) for peer in reversed(self._peers)
        ]
        self._sends: list[dist.Work] = []
        self._rows: Tensor | None = None

    def send(self, rows: Tensor) -> None:
        """Starts to send; see :meth:`Transfer.send`."""
        self._rows = rows
        self.send_each(rows.unbind() if len(rows) > 1 else [rows[0]] * len(self.received))

    def send_each(self, messages: Sequence[Tensor]) -> None:
        """Starts to send a message to each rank; uint8, none longer than a row."""
        mine = messages[self._rank]
        self.received[self._rank, : len(mine)] = mine
        self._sends = [
            groups.send(messages[peer], peer, self._group, self._tag) for peer in self._peers
        ]

    def sent(self) -> Tensor | None:
        """Waits for the sends; see :meth:`Transfer.sent`."""
        self._wait_for_sends()
        rows, self._rows = self._rows, None
        return rows

    def wait(self) -> Tensor:
        """Waits for the receives; see :meth:`Transfer.wait`."""
        for work in self._receives:
            groups.wait(work)
        self._receives = []
        self._wait_for_sends()  # one that is let go of before it has begun is never sent
        return self.received

    def drop(self) -> Tensor:
        """Forgets the receives; see :meth:`Transfer.drop`."""
        self._receives = []
        return self.received

    def _wait_for_sends(self) -> None:
        for work in self._sends:
            groups.wait(work)
        self._sends = []


class Collective:
    """A transfer by a collective, of messages on a device.

    Args:
        size: Ranks of the group.
        group: The group.
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        self._size, self._group = size, group

    def send(self, rows: Tensor) -> None:
        """Starts the collective; see :meth:`Transfer.send`."""
        self._received = rows.new_empty((self._size, rows.shape[1]))
        exchange = groups.all_to_all if len(rows) > 1 else groups.all_gather
        self._work = exchange(self._received, rows, self._group)
        self._rows = rows

    def sent(self) -> None:
        """The allocator of the device knows when memory is free."""

    def wait(self) -> Tensor:
        """Waits for the collective; see :meth:`Transfer.wait`."""
        groups.wait(self._work)
        del self._rows
        return self._received

    def drop(self) -> None:
        """The allocator of the device knows."""
