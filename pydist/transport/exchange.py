"""The exchange of a collective: chunks, messages, phases; the only place that sends data.

One exchange for every codec::

    encode ─▶ all_to_all_single ─▶ reduce ─▶ all_gather_into_tensor ─▶ decode
    local bytes   each rank owns      by the      everyone decodes the same
                  a shard             owner, once  bytes, so replicas stay equal

A rank sends ``(n - 1) / n * (payload + reduced payload)`` whatever the world size. Where it is
cheaper (two ranks, or so little data that latency rules) the payloads are gathered instead and
every rank reduces everything itself, to the same bits. A reduce-scatter ends after the first phase
and an all-gather has no other; both decode what has arrived.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pydist.errors import PydistError
from pydist.formats import wire
from pydist.transport import groups, message
from pydist.transport.agreement import Confirmation
from pydist.transport.buffers import BufferPool
from pydist.transport.call_group import CallGroup
from pydist.transport.coder import Coder, Span, entropy_coder_of, spans
from pydist.transport.communicator import Call, Communicator
from pydist.transport.profiling import phase
from pydist.transport.streams import SideStream
from pydist.transport.variable import VariableMessages

CHUNK_BYTES = 512 * 1024
"""Payload bytes per chunk: about 4 ms at 1 Gbit, so that coding hides behind the wire."""

DEVICE_CHUNK_BYTES = 16 * 1024 * 1024
"""The same where messages stay on a device: one stream runs chunks one after another, so smaller
ones would hide nothing; what bounds them is memory."""

LATENCY_BYTES = 16 * 1024
"""What a round trip costs, in bytes: below it one phase beats two."""

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


def choose_algorithm(algorithm: str, coder: Sizes, ranks: int) -> str:
    """Picks the cheaper algorithm from sizes alone, so that all ranks pick the same.

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
    return "all_gather" if gathered - two_phase <= LATENCY_BYTES else "two_phase"


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
        self._arriving: _Pending | VariableMessages | None = None

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
        """Gives back what was encoded in vain."""
        if self._sent is not None:
            self.exchange.done(self._sent)

    def announce(self) -> None:
        """Where messages have lengths of their own, starts to send those of phase 1."""
        if self.exchange.entropy_coder is None:
            return
        assert self._sent is not None
        n = self.exchange.comm.world_size
        everything = (self.begin, self.end)
        sent = self._shards() if self.exchange.route.second else [everything] * len(self._sent)
        mine = sent[self.exchange.comm.rank] if self.exchange.route.second else everything
        variable = self.exchange.variable("phase 1", self.offset, self.shard)
        variable.announce(self._sent, sent, [mine] * n)
        self.exchange.done(self._sent)  # shortened into memory of its own
        self._arriving, self._sent = variable, None

    def _shards(self) -> list[Span]:
        """The units of every rank's shard."""
        return list(spans(self.exchange.comm.world_size, self.shard, self.begin, self.end))

    def send(self) -> None:
        """Issues phase 1."""
        if isinstance(self._arriving, VariableMessages):
            self._arriving.send()
            return
        assert self._sent is not None
        send = self.exchange.scatter if self.exchange.route.scatters else self.exchange.gather
        self._arriving, self._sent = send(self._sent), None

    @phase("pydist.wait")
    def _arrived(self) -> Tensor:
        """Waits for what was issued last."""
        assert self._arriving is not None
        arriving, self._arriving = self._arriving, None
        received = arriving.wait()
        if isinstance(arriving, _Pending) and arriving.sent is not received:
            self.exchange.done(arriving.sent)
        return received

    @phase("pydist.reduce")
    def reduce(self) -> None:
        """Waits for phase 1, reduces this rank's shard, issues phase 2; where there is one."""
        with self.exchange.stream():
            self._reduce()

    def _reduce(self) -> None:
        exchange = self.exchange
        if not exchange.route.reduces:
            return
        received = self._arrived()
        exchange.check(received, self.told)
        if self.offset > wire.HEADER_BYTES and not (self.told and received.is_cuda):
            exchange.coder.merge_metadata(received[:, wire.HEADER_BYTES : self.offset])
        second = exchange.route.second
        begin, end = self._shards()[exchange.comm.rank] if second else (self.begin, self.end)
        size = wire.HEADER_BYTES + exchange.coder.reduced_bytes(self.shard)
        sent = exchange.room(1, size)
        exchange.coder.reduce(
            received[:, self.offset :], sent[0, wire.HEADER_BYTES :], self.shard, begin, end,
            exchange.flags,
        )  # fmt: skip
        exchange.put_header(sent, exchange.flags)
        exchange.seal(sent)
        exchange.done(received)
        del received
        if not second:
            self._arriving = _Pending(None, sent, sent)
        elif exchange.entropy_coder is None:
            self._arriving = exchange.gather(sent, second=True)
        else:
            self._arriving = exchange.variable("phase 2", wire.HEADER_BYTES, self.shard)
            self._arriving.announce(sent, [(begin, end)], self._shards())
            exchange.done(sent)
            self._arriving.send()

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


class _Pending:
    """A collective under way, and the buffers it needs."""

    def __init__(self, work: dist.Work | None, received: Tensor, sent: Tensor) -> None:
        self.work, self.received, self.sent = work, received, sent

    def wait(self) -> Tensor:
        if self.work is not None:
            groups.wait(self.work)
        return self.received


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
            cut["algorithm"] = choose_algorithm(route, coder, comm.world_size)
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
            # Lengths travel while the next chunk is encoded.
            ahead, announced = 1 if self.entropy_coder else 0, deque[Chunk]()
            for i, chunk in enumerate(chunks):
                if i >= encoded:
                    chunk.encode()
                chunk.announce()
                announced.append(chunk)
                if len(announced) > ahead:
                    announced[0].send()
                    yield announced.popleft()
            for chunk in announced:
                chunk.send()
                yield chunk

    @phase("pydist.agree")
    def _agree(self, first: list[Chunk]) -> int:
        """Agrees, and exchanges scales; returns how many chunks have been encoded meanwhile."""
        all_scales: list[Tensor] = []
        # Where encoding changes nothing but buffers of its own, it hides the agreement's round
        # trip. Otherwise a disagreement must leave everything as it was.
        early = first if self.coder.repeatable else []

        def meanwhile() -> None:
            scales = self.coder.scales()
            if scales is not None:
                all_scales.append(scales)
            for chunk in [] if all_scales else early:
                chunk.encode()

        try:
            with self.call_group.member():
                self.comm.agree(self.call, meanwhile)
        except PydistError:
            for chunk in early:
                chunk.drop()
            raise
        if not all_scales:
            return len(early)
        # Right behind the agreement, by the same thread: so it keeps its place among the calls.
        everyones = self.share(all_scales.pop())
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
        # Shares differ by rank; everything else is the same everywhere.
        same = self.route.reduces or not self.route.scatters
        confirmation = self.comm.agreement.confirm(self.call, self._decoded if same else 0)
        if confirmation is not None:
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

    def scatter(self, sent: Tensor) -> _Pending:
        """Phase 1: row i goes to rank i."""
        self._count("phase 1", sent.numel() - sent.shape[1])
        if self.comm.world_size == 1:
            return _Pending(None, sent, sent)
        received = self.room(*sent.shape)
        work = groups.all_to_all(received, sent, self.comm.first)
        return _Pending(work, received, sent)

    def share(self, scales: Tensor) -> Tensor:
        """Every rank's bytes, uint8 [ranks, bytes]; waits for them."""
        sent = self.room(1, wire.HEADER_BYTES + scales.numel())
        beside = scales.device == sent.device
        coded = sent if beside else torch.empty_like(sent, device=scales.device)
        self.put_header(coded, torch.zeros_like(self.coder.flags))
        coded[0, wire.HEADER_BYTES :] = scales.view(-1)
        if not beside:
            self.stream.to_host(sent, coded)
        self.seal(sent)
        received = self.gather(sent, phase="scales").wait()
        if received is not sent:
            self.done(sent)
        self.check(received)
        return received

    def gather(self, sent: Tensor, *, second: bool = False, phase: str | None = None) -> _Pending:
        """Everyone's message to everyone."""
        n = self.comm.world_size
        phase = phase or ("phase 2" if second else "phase 1")
        self._count(phase, (n - 1) * sent.numel())
        if n == 1:
            return _Pending(None, sent, sent)
        received = self.room(n, sent.numel())
        group = self.comm.second if second else self.comm.first
        work = groups.all_gather(received, sent, group)
        return _Pending(work, received, sent)

    def variable(self, phase: str, head: int, units: int) -> VariableMessages:
        """An exchange of rows that are shortened."""
        assert self.entropy_coder is not None
        return VariableMessages(
            self.comm, self.entropy_coder, phase, self.call, head, units, self._count
        )

    def _count(self, phase: str, size: int) -> None:
        self.comm.traffic.bytes_sent[phase] += size
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
