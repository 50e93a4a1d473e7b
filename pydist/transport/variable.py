"""Transfers of messages whose length depends on the data.

The exchange makes rows of a fixed length; a coder's :class:`pydist.transport.coder.EntropyCoder`
shortens them just before they are sent, and restores them when they have arrived. So nothing else
knows of it.

In host memory a message begins with its length, and arrives in memory for the longest that there
may be: no round trip is spent on lengths. Collectives on a device must know all lengths on the
host: there they travel first, and the host waits for the device. Each length has a checksum: a
wrong one would make such a collective one of other sizes than at the peer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pydist.transport import groups
from pydist.transport.coder import Span
from pydist.transport.transfers import Collective, Kind

if TYPE_CHECKING:
    from pydist.transport.exchange import Exchange

SIZE_BYTES = 8


class VariableMessages:
    """A :class:`pydist.transport.transfers.Transfer` of rows that are shortened, in host memory.

    Args:
        exchange: The call.
        kind: What is sent.
        sent: Which units each row holds; a row for each rank, or one for all.
        received: Which units each rank sends here.
        head: Bytes at the beginning of each row that stay as they are.
        units: Units of a row.
    """

    def __init__(
        self,
        exchange: Exchange,
        kind: Kind,
        sent: Sequence[Span],
        received: Sequence[Span],
        head: int,
        units: int,
    ) -> None:
        assert exchange.entropy_coder is not None
        self.exchange, self.kind, self.entropy_coder = exchange, kind, exchange.entropy_coder
        self.head, self.units, self._spans, self._arriving = head, units, sent, received
        self._rows: Tensor | None = None
        self._limits = [
            (head + least, head + most)
            for least, most in map(self.entropy_coder.bounds, range(len(received)), received)
        ]
        self._expect()

    def _expect(self) -> None:
        longest = SIZE_BYTES + max(most for _, most in self._limits)
        self._direct = self.exchange.receive(self.kind, longest)

    def send(self, rows: Tensor) -> None:
        """Shortens the rows and starts to send them."""
        self._row_bytes, self._rows = rows.shape[1], rows
        bodies = self.entropy_coder.pack(rows[:, self.head :], self.units, self._spans)
        sizes = [self.head + body.numel() for body in bodies]
        # One that is too long ends the receiver's process; its length says that it is malformed.
        most = [self.entropy_coder.most(i, span) for i, span in enumerate(self._spans)]
        messages = [
            torch.cat([row[: self.head], body[:limit]])
            for row, body, limit in zip(rows, bodies, most, strict=True)
        ]
        copies = self.exchange.comm.world_size // len(messages)
        messages, sizes = messages * copies, sizes * copies
        self.exchange.count("sizes", SIZE_BYTES * (len(sizes) - 1))
        self.exchange.count(self.kind.label, sum(sizes) - sizes[self.exchange.comm.rank])
        announced = [size << 32 | self._guard(size) for size in sizes]
        self._send(messages, torch.tensor(announced, dtype=torch.int64, device=rows.device))

    def _send(self, messages: list[Tensor], announced: Tensor) -> None:
        heads = announced.view(torch.uint8).view(-1, SIZE_BYTES)
        self._direct.send_each(
            [torch.cat([head, message]) for head, message in zip(heads, messages, strict=True)]
        )

    def sent(self) -> Tensor | None:
        """The rows, once: what is sent has memory of its own."""
        rows, self._rows = self._rows, None
        return rows

    def wait(self) -> Tensor:
        """All ranks' rows as they were, uint8 [n, bytes].

        Raises:
            ValueError: A message is malformed; names the rank and the reason.
        """
        received = self._direct.wait()
        announced = received[:, :SIZE_BYTES].contiguous().view(torch.int64).view(-1)
        sizes = self._checked(announced)
        rows = self._restored(
            [row[SIZE_BYTES:][:size] for row, size in zip(received, sizes, strict=True)]
        )
        self.exchange.done(received)
        return rows

    def drop(self) -> Tensor | None:
        """The memory for messages that nobody sends."""
        return self._direct.drop()

    def _guard(self, size: int) -> int:
        """A checksum of 32 bits of a length in this call."""
        return zlib.crc32(size.to_bytes(4, "little"), self.exchange.call.digest)

    def _checked(self, announced: Tensor) -> list[int]:
        """The lengths of all ranks' messages, int64 [n] as they were sent."""
        sizes = []
        for rank, value, (least, most) in zip(
            self.exchange.comm.ranks, announced.tolist(), self._limits, strict=True
        ):
            size, guard = value >> 32, value & 0xFFFFFFFF
            if guard != self._guard(size & 0xFFFFFFFF) or not least <= size <= most or size % 4:
                raise ValueError(
                    f"malformed message from rank {rank}: it announces {size} bytes, "
                    f"expected {least} to {most}, a multiple of 4, and their checksum"
                )
            sizes.append(size)
        return sizes

    def _restored(self, messages: Sequence[Tensor]) -> Tensor:
        """The rows that messages were made of."""
        rows = messages[0].new_empty((len(messages), self._row_bytes))
        for row, message in zip(rows, messages, strict=True):
            row[: self.head] = message[: self.head]
        bodies = [message[self.head :] for message in messages]
        wrong = self.entropy_coder.unpack(bodies, rows[:, self.head :], self.units, self._arriving)
        if wrong is not None:
            rank = self.exchange.comm.ranks[wrong[0]]
            raise ValueError(f"malformed message from rank {rank}: {wrong[1]}")
        return rows


class VariableCollective(VariableMessages):
    """The same of messages on a device: lengths travel first."""

    def _expect(self) -> None:
        self._group = self.exchange.comm.group_for(self.kind)

    def _send(self, messages: list[Tensor], announced: Tensor) -> None:
        lengths = Collective(len(messages), self._group)
        lengths.send(announced.view(torch.uint8).view(-1, SIZE_BYTES))
        self._sizes = self._checked(lengths.wait().view(torch.int64).view(-1))
        self._messages = torch.cat(messages)
        self._received = self._messages.new_empty(sum(self._sizes))
        sizes = [message.numel() for message in messages]
        self._work = groups.all_to_all(
            self._received, self._messages, self._group, self._sizes, sizes
        )

    def wait(self) -> Tensor:
        """See :meth:`VariableMessages.wait`."""
        groups.wait(self._work)
        return self._restored(self._received.split(self._sizes))

    def drop(self) -> None:
        """There is none yet."""
