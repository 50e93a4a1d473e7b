"""The exchange of a collective: chunks, messages, phases; the only place that sends data.

One exchange for every codec::

    encode ──────▶ phase 1 ──────▶ reduce ──────▶ phase 2 ──────▶ decode
    local bytes    each rank owns  by the owner,  everyone decodes the same
                   a shard         once           bytes, so replicas stay equal

A rank sends ``(n - 1) / n * (payload + reduced payload)`` whatever the world size. Where it is
cheaper (two ranks, or so little data that latency rules) the payloads are gathered instead and
every rank reduces everything itself, to the same bits. A reduce-scatter ends after the first phase
and an all-gather has no other; both decode what has arrived.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pydist.errors import PydistError
from pydist.formats import wire
from pydist.transport import message
from pydist.transport.agreement import Confirmation
from pydist.transport.buffers import BufferPool
from pydist.transport.call_group import CallGroup
from pydist.transport.coder import Coder, Span, entropy_coder_of, spans
from pydist.transport.communicator import Call, Communicator
from pydist.transport.link import Link
from pydist.transport.profiling import phase
from pydist.transport.streams import SideStream
from pydist.transport.transfers import Alone, Collective, Direct, Kind, Transfer
from pydist.transport.variable import VariableCollective, VariableMessages

CHUNK_BYTES = 512 * 1024
"""Payload bytes per chunk: about 4 ms at 1 Gbit, so that coding hides behind the wire."""

DEVICE_CHUNK_BYTES = 16 * 1024 * 1024
"""The same where messages stay on a device: one stream runs chunks one after another, so smaller
ones would hide nothing; what bounds them is memory."""

LATENCY_BYTES = 16 * 1024
"""What a phase costs, in bytes, where it was not measured: below it one phase beats two."""

MOST_GATHERED_BYTES = 1024 * 1024
"""However far apart ranks are: what is gathered takes memory, and every rank decodes all of it."""

_FLAGS_AT = wire.FLAGS_AT
_CHECKSUM = slice(wire.CHECKSUM_AT, wire.CHECKSUM_AT + 4)
_ALIKE = [*range(_FLAGS_AT), *range(_CHECKSUM.stop, wire.HEADER_BYTES)]
"""Bytes of a header that all messages of a call have alike: kind and step."""


@dataclass(frozen=True)
class Route:
    """Which ways a call's bytes take.

    Attributes:
        scatters: Phase 1 sends row i to rank i, of a row for each; else its one row to everyone.
        reduces: What has arrived is reduced before it is decoded.
    """

    scatters: bool
    reduces: bool

    @property
    def second(self) -> bool:
        """Whether reduced shards are gathered: a second phase."""
        return self.scatters and self.reduces


ALL_REDUCE = {"two_phase": Route(True, True), "all_gather": Route(False, True)}
REDUCE_SCATTER = Route(scatters=True, reduces=False)
ALL_GATHER = Route(scatters=False, reduces=False)
ALGORITHMS = ("auto", *ALL_REDUCE)


class Sizes(Protocol):
    """What is asked of a coder before there is one: how much it is going to send."""

    @property
    def units(self) -> int: ...  # noqa: D102

    def message_bytes(self, units: int) -> int: ...  # noqa: D102

    def reduced_bytes(self, units: int) -> int: ...  # noqa: D102


def choose_algorithm(algorithm: str, coder: Sizes, ranks: int, link: Link | None = None) -> str:
    """Picks the cheaper algorithm, the same on all ranks.

    Args:
        algorithm: What the user asks for.
        coder: What travels.
        ranks: Ranks of the group.
        link: What was measured between them. ``None``: sizes alone decide, so that the choice is
            the same in every run. That is for owners' residuals, which it moves.

    Raises:
        ValueError: ``algorithm`` is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm != "auto":
        return algorithm
    payload, reduced = coder.message_bytes(coder.units), coder.reduced_bytes(coder.units)
    gathered = (ranks - 1) * payload
    two_phase = (ranks - 1) / ranks * (payload + reduced)
    worth = LATENCY_BYTES
    if link is not None:
        worth = min(max(worth, int(link.phase_bytes)), MOST_GATHERED_BYTES)
    return "all_gather" if gathered - two_phase <= worth else "two_phase"


def chunk_units(coder: Coder, chunk_bytes: int | None = None) -> int:
    """Units of a chunk, of :data:`CHUNK_BYTES` where no other size is given."""
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    whole: int = getattr(coder, "together", 1)
    return max(1, chunk_bytes // (coder.unit_bytes * whole)) * whole


class Chunk:
    """One chunk: units ``begin`` … ``end`` of the call.

    Buffers go back to the communicator's staging as soon as their bytes have moved on, so a chunk
    has two of its size at most. That, and ``IN_FLIGHT``, bounds memory.
    """

    def __init__(self, exchange: Exchange, begin: int, end: int, metadata: Tensor | None) -> None:
        self.exchange, self.begin, self.end, self.metadata = exchange, begin, end, metadata
        units = end - begin
        self.shard = -(-units // exchange.comm.world_size) if exchange.route.second else units
        self.told = 0 if begin or exchange.coder.usage is None else exchange.coder.usage.told
        extra = wire.payload_bytes(self.told) if metadata is None else metadata.shape[-1]
        self.offset = wire.HEADER_BYTES + extra
        self._sent: Tensor | None = None
        self._arriving: Transfer | None = None

    def expect(self) -> None:
        """Gets ready for phase 1."""
        exchange, second = self.exchange, self.exchange.route.second
        if exchange.entropy_coder is None:
            size = self.offset + exchange.coder.message_bytes(self.shard)
            self._arriving = exchange.expect(Kind.PHASE_1, size)
            return
        everything = [(self.begin, self.end)]
        ranks = exchange.comm.world_size
        rows = ranks if exchange.route.scatters else 1
        sent = self._shards() if second else everything * rows
        received = [self._mine] * ranks
        self._arriving = exchange.variable(Kind.PHASE_1, sent, received, self.offset, self.shard)

    @phase("pydist.encode")
    def encode(self) -> None:
        """Makes the messages of phase 1."""
        exchange = self.exchange
        rows = exchange.comm.world_size if exchange.route.scatters else 1
        size = self.offset + exchange.coder.message_bytes(self.shard)
        self._sent = sent = exchange.room(rows, size)
        beside = exchange.data_device == exchange.device
        coded = sent if beside else torch.empty_like(sent, device=exchange.data_device)
        exchange.coder.encode(coded[:, self.offset :], self.shard, self.begin, self.end)
        exchange.put_header(coded, exchange.coder.flags, self.told)
        if self.metadata is not None:
            coded[:, wire.HEADER_BYTES : self.offset] = self.metadata
        if not beside:
            exchange.stream.to_host(sent, coded)
        exchange.seal(sent)

    def drop(self) -> None:
        """Gives back what nobody will send, and what was encoded in vain."""
        if self._arriving is not None:
            self.exchange.drop(self._arriving)
        if self._sent is not None:
            self.exchange.done(self._sent)

    @property
    def _mine(self) -> Span:
        """The units that this rank reduces."""
        if self.exchange.route.second:
            return self._shards()[self.exchange.comm.rank]
        return self.begin, self.end

    def _shards(self) -> list[Span]:
        """The units of every rank's shard."""
        return list(spans(self.exchange.comm.world_size, self.shard, self.begin, self.end))

    def send(self) -> None:
        """Issues phase 1."""
        assert self._sent is not None and self._arriving is not None
        sent, self._sent = self._sent, None
        self.exchange.send(self._arriving, Kind.PHASE_1, sent)

    @phase("pydist.wait")
    def _arrived(self) -> Tensor:
        """Waits for what was issued last."""
        assert self._arriving is not None
        arriving, self._arriving = self._arriving, None
        received = arriving.wait()
        self._release(arriving)
        return received

    @phase("pydist.wait")
    def _release(self, sending: Transfer) -> None:
        """Gives back the memory of what was sent, once."""
        sent = sending.sent()
        if sent is not None:
            self.exchange.done(sent)

    @phase("pydist.reduce")
    def reduce(self) -> None:
        """Waits for phase 1, reduces this rank's shard, issues phase 2; where there is one."""
        with self.exchange.stream():
            self._reduce()

    def _reduce(self) -> None:
        exchange, first = self.exchange, self._arriving
        if not exchange.route.reduces:
            return
        assert first is not None
        second: Transfer | None = None if exchange.route.second else Alone()
        # With the last chunk the call waits for phase 2 alone, whose receives are posted before it
        # is needed. They have the memory that phase 1 was sent from, and the place in the queue
        # of a chunk behind this one.
        if second is None and self.end == exchange.coder.units:
            self._release(first)
            second = self._expect_second()
        received = self._arrived()
        exchange.check(received, self.told)
        if self.offset > wire.HEADER_BYTES and not (self.told and received.is_cuda):
            exchange.coder.merge_metadata(received[:, wire.HEADER_BYTES : self.offset])
        sent = exchange.room(1, wire.HEADER_BYTES + exchange.coder.reduced_bytes(self.shard))
        exchange.coder.reduce(
            received[:, self.offset :], sent[0, wire.HEADER_BYTES :], self.shard, *self._mine,
            exchange.flags,
        )  # fmt: skip
        exchange.put_header(sent, exchange.flags)
        exchange.seal(sent)
        exchange.done(received)
        del received
        self._arriving = second or self._expect_second()
        exchange.send(self._arriving, Kind.PHASE_2, sent)

    def _expect_second(self) -> Transfer:
        exchange, head = self.exchange, wire.HEADER_BYTES
        if exchange.entropy_coder is None:
            size = head + exchange.coder.reduced_bytes(self.shard)
            return exchange.expect(Kind.PHASE_2, size)
        return exchange.variable(Kind.PHASE_2, [self._mine], self._shards(), head, self.shard)

    @phase("pydist.decode")
    def complete(self) -> None:
        """Waits for the last phase and decodes."""
        with self.exchange.stream():
            exchange = self.exchange
            received, begin = self._arrived(), wire.HEADER_BYTES
            exchange.check(received, decoded=True)
            arrived = exchange.stream.to_device(received)
            if not exchange.route.reduces and self.metadata is not None:
                begin = self.offset
                exchange.coder.merge_metadata(arrived[:, wire.HEADER_BYTES : begin])
            exchange.coder.decode(arrived[:, begin:], self.shard, self.begin, self.end)
            exchange.done(received)


class Exchange:
    """One collective on its way (a :class:`pydist.transport.communicator.Job`).

    Args:
        comm: The group's communicator.
        coder: The data and its codec.
        call: What the ranks must agree on.
        route: The way to take, or for an all-reduce ``"auto"``, ``"two_phase"`` or
            ``"all_gather"``.
        device: The data's device.
        call_group: Calls that this one belongs to; it is left out when one before it was refused.
    """

    def __init__(
        self,
        comm: Communicator,
        coder: Coder,
        call: Call,
        route: Route | str,
        device: torch.device,
        call_group: CallGroup | None = None,
    ) -> None:
        self.comm, self.coder = comm, coder
        self.call_group = call_group or CallGroup()
        # How the data is cut must be equal too; another release may choose otherwise.
        self.chunk_bytes = DEVICE_CHUNK_BYTES if comm.device_side else CHUNK_BYTES
        cut: dict[str, object] = {"chunk_bytes": self.chunk_bytes}
        if not isinstance(route, Route):
            cut["algorithm"] = choose_algorithm(route, coder, comm.world_size, comm.link)
            route = ALL_REDUCE[str(cut["algorithm"])]
        self.route = route
        cut |= getattr(coder, "agreed", {})
        self.call = replace(call, fields=call.fields | cut)
        self.label = call.label
        self.data_device = device
        self.device = comm.device(device)
        self.future: Future[None] = Future()
        self.flags = coder.all_flags
        if self.flags.device != self.device:
            self.flags = torch.zeros(1, dtype=torch.int32, device=self.device)
        header = wire.Header(coder.codec, coder.bits, 0, self.call.digest, call.step).pack()
        self._on_device = message.DeviceHeader(header, self.flags)
        self._header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._expected = np.frombuffer(header, dtype=np.uint8)[_ALIKE]
        self._decoded = 0  # checksum of the checksums of what was decoded
        self.stream = SideStream(comm.stream_for(device))
        self.entropy_coder = entropy_coder_of(coder) if comm.world_size > 1 else None
        self._bytes_sent = 0  # by this rank so far, but for the agreement
        self._number = 0  # of its agreement
        self._confirmations: Direct | None = None

    # ----------------------------------------------------------------- Job

    def chunks(self) -> Generator[Chunk, None, None]:
        """Agrees, then sends chunk after chunk."""
        units, size = self.coder.units, chunk_units(self.coder, self.chunk_bytes)
        with self.stream():
            metadata = self.coder.metadata()
            chunks = [
                Chunk(self, begin, min(begin + size, units), None if begin else metadata)
                for begin in range(0, units, size)
            ]
            encoded = self._agree(chunks[:1])
            for i, chunk in enumerate(chunks):
                if i:
                    chunk.expect()
                if i >= encoded:
                    chunk.encode()
                chunk.send()
                yield chunk

    @phase("pydist.agree")
    def _agree(self, first: list[Chunk]) -> int:
        """Agrees, and exchanges scales; returns how many chunks have been encoded meanwhile."""
        expected: list[tuple[Tensor, Transfer]] = []
        # Where encoding changes nothing but buffers of its own, it hides the agreement's round
        # trip. Otherwise a disagreement must leave everything as it was.
        early = first if self.coder.repeatable else []

        def meanwhile() -> None:
            self._number = self.comm.agreement.number
            self._confirmations = self.comm.agreement.expect_confirmation()
            for chunk in first:
                chunk.expect()
            scales = self.coder.scales()
            if scales is not None:
                size = wire.HEADER_BYTES + scales.numel()
                expected.append((scales, self.expect(Kind.SCALES, size)))
            for chunk in [] if expected else early:
                chunk.encode()

        try:
            with self.call_group.member():
                self.comm.agree(self.call, meanwhile)
        except PydistError:
            for chunk in first:
                chunk.drop()
            for _, sharing in expected:
                self.drop(sharing)
            raise
        if not expected:
            return len(early)
        # Right behind the agreement, by the same thread: so it keeps its place among the calls.
        everyones = self.share(*expected.pop())
        self.coder.merge_scales(self.stream.to_device(everyones)[:, wire.HEADER_BYTES :])
        self.done(everyones)
        return 0

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all is decoded (on CUDA: makes the current stream wait)."""
        await_future(self.future, self.call.name, timeout)
        if self.stream.done is not None:
            torch.cuda.current_stream(self.data_device).wait_event(self.stream.done)

    def confirm(self) -> Confirmation | None:
        """Tells the other ranks what was decoded here."""
        if self._confirmations is None:
            return None
        # Shares differ by rank; everything else is the same everywhere.
        same = self.route.reduces or not self.route.scatters
        confirmation = self.comm.agreement.confirm(
            self._confirmations, self.call, self._decoded if same else 0
        )
        self._bytes_sent += confirmation.bytes_sent
        return confirmation

    def finish(self) -> None:
        """Hands the flags of all ranks to the coder."""
        with self.stream():
            self.coder.finish(self.flags)

    # ----------------------------------------------------------------- messages

    def room(self, rows: int, size: int) -> Tensor:
        """Memory for messages, where they are exchanged."""
        if self.device.type == "cpu":
            return self._buffers.take(rows, size)
        return torch.empty((rows, size), dtype=torch.uint8, device=self.device)

    def done(self, messages: Tensor) -> None:
        """Lets others use the memory of messages (on a device torch itself does)."""
        if self.device.type == "cpu":
            self._buffers.give(messages, self.stream.last)

    @property
    def _buffers(self) -> BufferPool:
        return self.comm.pinned if self.data_device.type == "cuda" else self.comm.buffers

    def put_header(self, messages: Tensor, flags: Tensor, told: int = 0) -> None:
        """Puts the 16 bytes with this rank's flags, int32[1], before messages.

        Args:
            messages: uint8 [messages, bytes].
            flags: The flags, where the messages are.
            told: Of how many usage words they tell, in the bytes that follow.
        """
        if messages.is_cuda:
            self._on_device.put(messages, flags, self._words(everyones=False, told=told), told)
            return
        messages[:, : wire.HEADER_BYTES] = self._header
        messages[:, _FLAGS_AT] = flags

    def _words(self, *, everyones: bool, told: int) -> int:
        usage = self.coder.usage
        return usage.address(everyones=everyones) if told and usage is not None else 0

    def seal(self, messages: Tensor) -> None:
        """Puts checksums into messages that are about to be sent."""
        if messages.device.type == "cpu":
            message.seal(messages)

    def check(self, received: Tensor, told: int = 0, *, decoded: bool = False) -> None:
        """Compares checksums and headers, and collects the flags of all ranks.

        Args:
            received: Messages, which are used right behind this.
            told: Of how many usage words they tell; collected too, on a device.
            decoded: They are what every rank decodes.

        Raises:
            ValueError: A message was damaged on its way, or did not come from an equal pydist.
        """
        headers = received[:, : wire.HEADER_BYTES]
        if headers.is_cuda:
            self._on_device.merge(received, self._words(everyones=True, told=told), told)
            return
        damaged = message.first_damaged(received, self.call.digest)
        if damaged is not None:
            raise self._malformed(received, damaged, "its checksum is wrong")
        table = headers.numpy()
        raised = int(np.bitwise_or.reduce(table[:, _FLAGS_AT]))
        if raised:
            self.flags |= raised
        if decoded:
            self._decoded = zlib.crc32(table[:, _CHECKSUM].tobytes(), self._decoded)
        others = table[:, _ALIKE] != self._expected
        if others.any():
            row = int(others.any(1).nonzero()[0][0])
            header, _ = wire.unpack_header(table[row].tobytes())
            raise self._malformed(received, row, str(header))

    def _malformed(self, received: Tensor, row: int, what: str) -> ValueError:
        ranks = self.comm.ranks
        rank = ranks[row] if len(received) == len(ranks) else ranks[self.comm.rank]
        _, reason = wire.unpack_header(received[row, : wire.HEADER_BYTES].numpy().tobytes())
        return ValueError(f"malformed message from rank {rank}: {reason or what}")

    def share(self, scales: Tensor, sharing: Transfer) -> Tensor:
        """Every rank's bytes, uint8 [ranks, bytes]; waits for them."""
        sent = self.room(1, wire.HEADER_BYTES + scales.numel())
        beside = scales.device == sent.device
        coded = sent if beside else torch.empty_like(sent, device=scales.device)
        self.put_header(coded, torch.zeros_like(self.coder.flags))
        coded[0, wire.HEADER_BYTES :] = scales.view(-1)
        if not beside:
            self.stream.to_host(sent, coded)
        self.seal(sent)
        self.send(sharing, Kind.SCALES, sent)
        received = sharing.wait()
        if (free := sharing.sent()) is not None:
            self.done(free)
        self.check(received)
        return received

    # ----------------------------------------------------------------- transfers

    def expect(self, kind: Kind, size: int) -> Transfer:
        """Gets ready for messages of ``size`` bytes from all ranks."""
        n = self.comm.world_size
        if n == 1:
            return Alone()
        if self.comm.device_side:
            return Collective(n, self.comm.group_for(kind))
        return self.receive(kind, size)

    def send(self, transfer: Transfer, kind: Kind, rows: Tensor) -> None:
        """Starts to send rows (:meth:`Transfer.send`), and counts them."""
        if isinstance(transfer, Direct | Collective):
            self.count(kind.label, (self.comm.world_size - 1) * rows.shape[1])
        transfer.send(rows)

    def drop(self, transfer: Transfer) -> None:
        """Gives back the memory of a transfer that no rank makes."""
        if (received := transfer.drop()) is not None:
            self.done(received)

    def receive(self, kind: Kind, size: int) -> Direct:
        """Receives messages of at most ``size`` bytes in host memory."""
        comm = self.comm
        room = self.room(comm.world_size, size)
        return Direct(room, comm.rank, comm.group_for(kind), kind.tag(self._number))

    def variable(
        self, kind: Kind, sent: list[Span], received: list[Span], head: int, units: int
    ) -> VariableMessages:
        """Gets ready for messages that are shortened."""
        make = VariableCollective if self.comm.device_side else VariableMessages
        return make(self, kind, sent, received, head, units)

    def count(self, what: str, size: int) -> None:
        """Counts bytes that this rank sends to others."""
        self.comm.traffic.bytes_sent[what] += size
        self._bytes_sent += size

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent so far, headers and agreement included."""
        return self._bytes_sent + (self.comm.world_size - 1) * wire.HEADER_BYTES

    @property
    def inside_bytes(self) -> int:
        """What of it was sent for the sake of two levels."""
        return 0


def await_future(future: Future[None], name: str, timeout: float | None) -> None:
    """Waits for a call; raises what it raised, or TimeoutError, naming it."""
    try:
        future.result(timeout)
    except FutureTimeoutError as error:  # before Python 3.11 it was no TimeoutError
        raise TimeoutError(f"{name} takes longer than {timeout} s") from error


def wait_for(exchange: Exchange | None) -> contextlib.AbstractContextManager[None]:
    """On CUDA: runs a block on the stream of an exchange, after its kernels."""
    return contextlib.nullcontext() if exchange is None else exchange.stream()
