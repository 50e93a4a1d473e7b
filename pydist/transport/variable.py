"""Messages whose length depends on the data: first their lengths travel, then their bytes.

The exchange makes rows of a fixed length; a coder's :class:`pydist.transport.coder.EntropyCoder`
shortens them just before they are sent, and restores them when they have arrived. So nothing else
knows of it. ``all_to_all_single`` with split sizes carries them, in both phases: a
message for everyone is sent to each rank, which takes no more bytes than a gather does.

The lengths must be known on the host: with NCCL that waits for the device, twice a chunk and phase.
Each travels with a checksum: a wrong one would make the next exchange one of other sizes than at
the peer, which ends a process that uses gloo.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pydist.transport import groups
from pydist.transport.coder import EntropyCoder, Span
from pydist.transport.communicator import Call, Communicator

SIZE_BYTES = 8


class VariableMessages:
    """One exchange of rows: ``announce``, ``send``, ``wait``, each once and in this order.

    Args:
        comm: The group's communicator.
        entropy_coder: What shortens the rows.
        phase: ``"phase 1"`` or ``"phase 2"``, to count the bytes and to choose the group.
        call: The call.
        head: Bytes at the beginning of each row that stay as they are.
        units: Units of a row.
        count: Told what is sent, and how many bytes of it.
    """

    def __init__(
        self,
        comm: Communicator,
        entropy_coder: EntropyCoder,
        phase: str,
        call: Call,
        head: int,
        units: int,
        count: Callable[[str, int], None],
    ) -> None:
        self.comm, self.entropy_coder, self.phase = comm, entropy_coder, phase
        self._digest = call.digest
        self.head, self.units, self._tell = head, units, count
        self._group = comm.first if phase == "phase 1" else comm.second
        self._sizes: list[int] = []

    def announce(self, rows: Tensor, sent: Sequence[Span], received: Sequence[Span]) -> None:
        """Shortens the rows and starts to tell each rank how long its message is.

        Args:
            rows: uint8 [n or 1, bytes]: a row for each rank, or one for all.
            sent: Which units each of them holds.
            received: Which units each rank sends here.
        """
        n = self.comm.world_size
        self._spans, self._row_bytes = received, rows.shape[1]
        bodies = self.entropy_coder.pack(rows[:, self.head :], self.units, sent)
        messages = [
            torch.cat([row[: self.head], body]) for row, body in zip(rows, bodies, strict=True)
        ]
        self._messages = messages * (n // len(messages))
        self._lengths = [message.numel() for message in self._messages]
        announced = [length << 32 | self._guard(length) for length in self._lengths]
        mine = torch.tensor(announced, dtype=torch.int64, device=rows.device)
        self._theirs = torch.empty_like(mine)
        self._keep = mine
        self._count("sizes", [SIZE_BYTES] * n)
        self._work = groups.all_to_all(self._theirs, mine, self._group)

    def _guard(self, length: int) -> int:
        """A checksum of 32 bits of a length in this call."""
        return zlib.crc32(length.to_bytes(4, "little"), self._digest)

    def send(self) -> None:
        """Waits for the lengths, then starts to send the messages.

        Raises:
            ValueError: A length is none that such a message can have.
        """
        groups.wait(self._work)
        self._sizes = [announced >> 32 for announced in self._theirs.tolist()]
        expected = [self._guard(size & 0xFFFFFFFF) for size in self._sizes]
        guards = [announced & 0xFFFFFFFF for announced in self._theirs.tolist()]
        for i, (size, span) in enumerate(zip(self._sizes, self._spans, strict=True)):
            least, most = (self.head + bound for bound in self.entropy_coder.bounds(span))
            if guards[i] != expected[i] or not least <= size <= most or size % 4:
                raise ValueError(
                    f"malformed message from rank {self.comm.ranks[i]}: it announces {size} bytes, "
                    f"expected {least} to {most}, a multiple of 4, and their checksum"
                )
        sent = torch.cat(self._messages)
        self._messages = []
        self._received = sent.new_empty(sum(self._sizes))
        self._keep = sent
        self._count(self.phase, self._lengths)
        self._work = groups.all_to_all(
            self._received, sent, self._group, self._sizes, self._lengths
        )

    def wait(self) -> Tensor:
        """All ranks' rows as they were, uint8 [n, bytes].

        Raises:
            ValueError: A message is malformed; names the rank and the reason.
        """
        groups.wait(self._work)
        messages = self._received.split(self._sizes)
        rows = self._received.new_empty((len(messages), self._row_bytes))
        for row, message in zip(rows, messages, strict=True):
            row[: self.head] = message[: self.head]
        bodies = [message[self.head :] for message in messages]
        wrong = self.entropy_coder.unpack(bodies, rows[:, self.head :], self.units, self._spans)
        if wrong is not None:
            rank = self.comm.ranks[wrong[0]]
            raise ValueError(f"malformed message from rank {rank}: {wrong[1]}")
        return rows

    def _count(self, what: str, lengths: Sequence[int]) -> None:
        self._tell(what, sum(lengths) - lengths[self.comm.rank])
