"""What all ranks exchange before a call and behind it: that it is one call, and how it ended."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.errors import MismatchError, PydistError
from pydist.formats import wire
from pydist.transport import groups
from pydist.transport.transfers import Direct, Kind

DESCRIBE_SECONDS = 5.0
"""How long ranks that disagree wait for each other's descriptions."""
MOST_ALIKE = 4
"""Fields that a message names of those that differ in their last word alone, as by parameter."""


@dataclass(frozen=True)
class Call:
    """What all ranks must agree on before data moves.

    Attributes:
        name: What the user called, for messages.
        fields: Names and values that must be equal on all ranks (JSON types).
        step: Step of the call; must be equal too.
        problem: Why this rank cannot take part; all ranks then raise.
        details: Gives further names and values for the message where ranks differ: what a checksum
            among the fields stands for.
        known: All ranks have agreed on the layout of such calls before, and expect this one.
    """

    name: str
    fields: dict[str, Any]
    step: int = 0
    problem: str | None = None
    details: Callable[[], dict[str, Any]] | None = None
    known: bool = False

    @cached_property
    def digest(self) -> int:
        """32-bit checksum of name and fields, which do not change any more."""
        return zlib.crc32(_json([self.name, self.fields]).encode())

    @property
    def label(self) -> str:
        """Name and step, for messages."""
        return f"{self.name}, step {self.step}"


@dataclass
class Agreed:
    """An exchange of headers under way."""

    call: Call
    sent: bytes
    headers: Direct


@dataclass
class Confirmation:
    """The last exchange of a call, under way: who has decoded what."""

    sent: bytes
    headers: Direct
    bytes_sent: int


@dataclass
class Traffic:
    """Bytes this rank handed to the network, by phase, and the number of calls."""

    bytes_sent: Counter[str] = field(default_factory=Counter)
    calls: int = 0


class Agreement:
    """The small exchanges around the calls of a communicator.

    Args:
        name: Unique, the same on all ranks.
        ranks: The ranks, as the world counts them.
        rank: This rank's place among them.
        before: The group that carries what comes before a call.
        behind: The one for what comes behind it; ``None``: nothing does.
        traffic: Counts what is sent.

    Attributes:
        number: Of agreements so far; the tags of a call's messages have the number of its own.
    """

    def __init__(
        self,
        name: str,
        ranks: list[int],
        rank: int,
        before: dist.ProcessGroup,
        behind: dist.ProcessGroup | None,
        traffic: Traffic,
    ) -> None:
        self._name, self.ranks, self.rank, self.world_size = name, ranks, rank, len(ranks)
        self._before, self._behind, self._traffic = before, behind, traffic
        self.number = self._differences = 0
        self._next: Direct | None = None  # receives the headers of the next call

    def agree(self, call: Call, meanwhile: Callable[[], object] | None = None) -> None:
        """Makes sure that all ranks make the same call, before any payload is sent.

        1. Everyone sends its 16-byte header to everyone.
        2. Where all are equal and none has a problem, that was it.
        3. Otherwise the descriptions are exchanged and every rank raises.

        With NCCL the exchange runs on the hosts, without waiting for the devices.

        Args:
            call: What this rank is about to do.
            meanwhile: Work to do while the headers travel.

        Raises:
            MismatchError: Ranks make different calls; names field, values and ranks.
            PydistError: A rank has a problem; names the rank and the problem.
        """
        meanwhile = meanwhile or (lambda: None)
        if self.world_size == 1:
            if call.problem:
                raise PydistError(f"{call.name}: {call.problem}")
            meanwhile()
            return
        started = self.start(call)
        try:
            meanwhile()
        finally:
            started.headers.wait()
        self.finish(started)

    def start(self, call: Call) -> Agreed:
        """Sends this rank's header to everyone."""
        flags = wire.FLAG_PROBLEM if call.problem else 0
        mine = wire.Header(wire.CODECS["agreement"], 0, flags, call.digest, call.step).pack()
        headers = self._next or self._expect(self.number + 1)
        self.number += 1
        self._send(headers, mine, Kind.AGREEMENT)
        self._next = self._expect(self.number + 1)
        return Agreed(call, mine * self.world_size, headers)

    def _expect(self, number: int) -> Direct:
        received = torch.empty(
            (self.world_size, wire.HEADER_BYTES), dtype=torch.uint8, device="cpu"
        )
        return Direct(received, self.rank, self._before, Kind.AGREEMENT.tag(number))

    def _send(self, headers: Direct, mine: bytes, kind: Kind) -> int:
        headers.send(torch.frombuffer(bytearray(mine), dtype=torch.uint8).view(1, -1))
        size = (self.world_size - 1) * len(mine)
        self._traffic.bytes_sent[kind.label] += size
        return size

    def finish(self, started: Agreed) -> None:
        """Waits for the headers of all ranks, and raises as :meth:`agree` does."""
        received = started.headers.wait()
        if started.call.problem or received.numpy().tobytes() != started.sent:
            self._raise_difference(started.call, received)

    def _raise_difference(self, call: Call, headers: Tensor) -> None:
        for rank, header in zip(self.ranks, headers, strict=True):
            _, reason = wire.unpack_header(header.numpy().tobytes())
            if reason:  # not only here: whoever sent it sees ours as malformed, others see it too
                call = replace(call, problem=call.problem or f"header of rank {rank}: {reason}")
        details = {} if call.details is None else call.details()
        described = {"call": call.name, **call.fields, **details, "step": call.step}
        descriptions = self._descriptions({"fields": described, "problem": call.problem})
        problems = [
            f"rank {self.ranks[place]}: {description['problem']}"
            for place, description in descriptions.items()
            if description["problem"]
        ]
        if len(descriptions) < self.world_size:
            # The others saw no difference, so a header was damaged on its way here.
            silent = [r for place, r in enumerate(self.ranks) if place not in descriptions]
            raise ValueError(
                f"{call.name}: the agreement failed: no description from ranks {silent}"
                + "".join(f"; {problem}" for problem in problems)
            )
        if problems:
            raise PydistError(f"{call.name}: " + "; ".join(problems))
        fields = [descriptions[place]["fields"] for place in range(self.world_size)]
        raise MismatchError(f"{call.name}: ranks disagree: {differences(fields, self.ranks)}")

    def _descriptions(self, mine: dict[str, Any]) -> dict[int, Any]:
        """What every rank is about to do, by its place; of those who see a difference, too.

        Over the store: an exchange here would meet the next one of a rank that saw none.
        """
        self._differences += 1
        store = groups.store()
        place = f"{self._name}/difference/{self._differences}"
        store.set(f"{place}/{self.rank}", _json(mine))
        found: dict[int, Any] = {}
        deadline = time.monotonic() + DESCRIBE_SECONDS
        while len(found) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - set(found):
                if store.check([f"{place}/{rank}"]):
                    found[rank] = json.loads(store.get(f"{place}/{rank}"))
            if len(found) < self.world_size:
                time.sleep(0.002)
        return found

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, of any length, in rank order.

        Raises:
            ValueError: Bytes were damaged on their way.
        """
        sizes = [
            int.from_bytes(row, "little")
            for row in self._gather_rows(len(mine).to_bytes(8, "little"))
        ]
        rows = self._gather_rows(mine.ljust(max(sizes), b"\0"))
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def _gather_rows(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, of one length; a wrong length here would end the process in gloo."""
        sent = torch.frombuffer(
            bytearray(mine + zlib.crc32(mine).to_bytes(4, "little")), dtype=torch.uint8
        )
        rows = Direct(
            sent.new_empty((self.world_size, len(sent))), self.rank, self._before, Kind.BYTES.tag(0)
        )
        rows.send(sent.view(1, -1))
        result = []
        for rank, row in zip(self.ranks, rows.wait(), strict=True):
            data = row.numpy().tobytes()
            if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
                raise ValueError(f"malformed message from rank {rank}: its checksum is wrong")
            result.append(data[:-4])
        return result

    def expect_confirmation(self) -> Direct | None:
        """Gets ready for the others' confirmations of the call that was agreed on last."""
        if self.world_size == 1 or self._behind is None:
            return None
        received = torch.empty(
            (self.world_size, wire.HEADER_BYTES), dtype=torch.uint8, device="cpu"
        )
        return Direct(received, self.rank, self._behind, Kind.CONFIRMATION.tag(self.number))

    def confirm(self, headers: Direct, call: Call, decoded: int) -> Confirmation:
        """Starts to tell all ranks that this one has decoded a call.

        Args:
            headers: What :meth:`expect_confirmation` returned for the call.
            call: The call.
            decoded: Checksum of what was decoded, where it is the same on all ranks.
        """
        header = wire.Header(wire.CODECS["confirmation"], 0, 0, decoded, call.step).pack()
        size = self._send(headers, header, Kind.CONFIRMATION)
        return Confirmation(header * self.world_size, headers, size)

    def confirmed(self, confirmation: Confirmation) -> None:
        """Waits for the others' confirmations.

        Raises:
            ValueError: A rank has decoded something else.
            LinkError: A rank has failed.
        """
        rows = confirmation.headers.wait().numpy()
        if rows.tobytes() == confirmation.sent:
            return
        digests = [{"checksum": wire.unpack_header(row.tobytes())[0].digest} for row in rows]
        raise ValueError(
            "ranks decoded different bytes: " + (differences(digests, self.ranks) or "bad headers")
        )


def _json(value: Any) -> str:
    # What JSON cannot hold (numbers of NumPy, say) is told apart by its repr.
    return json.dumps(value, sort_keys=True, default=repr)


def differences(descriptions: list[dict[str, Any]], ranks: list[int]) -> str:
    """Says in which fields descriptions differ, with the values and who has them."""
    parts = []
    alike: Counter[str] = Counter()
    for name in sorted({key for description in descriptions for key in description}):
        by_value: dict[str, list[int]] = {}
        for rank, description in zip(ranks, descriptions, strict=True):
            by_value.setdefault(json.dumps(description.get(name)), []).append(rank)
        if len(by_value) < 2:
            continue
        kind = name.rpartition(" ")[0] or name
        alike[kind] += 1
        if alike[kind] > MOST_ALIKE:
            continue
        sides = [
            f"{value} on rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
            for value, who in by_value.items()
        ]
        parts.append(f"{name} is {' and '.join(sides)}")
    more = alike.total() - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")
