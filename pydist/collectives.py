"""Compressed collectives over any process group, any backend, any length.

One road for every codec::

    encode ─▶ all_to_all_single ─▶ reduce ─▶ all_gather_into_tensor ─▶ decode
    local bytes   each rank owns      by the      everyone decodes the same
                  a shard             owner, once  bytes, so replicas stay equal

A rank sends ``(n - 1) / n * (payload + reduced payload)`` whatever the world size. Where it is
cheaper (two ranks, or so little data that latency rules) the payloads are gathered instead and
every rank reduces everything itself, to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pydist import checks, wire
from pydist.codecs import Sign
from pydist.codecs.base import Coder
from pydist.codecs.votes import OPS, TensorVoteCoder, VoteRule
from pydist.communicator import Call, Communicator, communicator
from pydist.errors import PydistError
from pydist.groups import all_gather
from pydist.operators import dense_of, written

CHUNK_WORDS = 1 << 16
"""Payload words a chunk: 256 KiB, about 2 ms at 1 Gbit, so that coding hides behind the wire."""

LATENCY_BYTES = 16 * 1024
"""What a round trip costs, in bytes: below it one phase beats two."""

ALGORITHMS = ("auto", "two_phase", "all_gather")
_FLAGS_AT = 7  # where a header has its flags


def choose_algorithm(algorithm: str, coder: Coder, ranks: int) -> str:
    """Picks the cheaper algorithm from sizes alone, so that all ranks pick the same.

    Raises:
        ValueError: ``algorithm`` is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm != "auto":
        return algorithm
    payload = coder.words * wire.WORD_BYTES
    gathered = (ranks - 1) * payload
    two_phase = (ranks - 1) / ranks * (payload + coder.reduced_bytes(coder.words))
    return "all_gather" if gathered - two_phase <= LATENCY_BYTES else "two_phase"


class _Exchange:
    """One chunk on the road: words ``begin`` … ``end`` of the call."""

    def __init__(self, road: Road, begin: int, end: int, extra: Tensor | None) -> None:
        self.road, self.begin, self.end, self.extra = road, begin, end, extra
        n, words = road.comm.world_size, end - begin
        whole = road.algorithm == "all_gather"
        block = road.coder.block_words
        self.shard = words if whole else -(-words // (n * block)) * block
        self.offset = wire.HEADER_BYTES + (0 if extra is None else extra.numel())

    def encode(self) -> None:
        """Makes the messages of phase 1."""
        road, shard_bytes = self.road, self.shard * wire.WORD_BYTES
        payload, flags = road.coder.encode(self.begin, self.end)
        payload = payload.to(road.device)
        copies = 1 if road.algorithm == "all_gather" else road.comm.world_size
        sent = payload.new_zeros((copies, self.offset + shard_bytes))
        sent[:, : wire.HEADER_BYTES] = road.header(flags)
        if self.extra is not None:
            sent[:, wire.HEADER_BYTES : self.offset] = self.extra.to(road.device)
        full, rest = divmod(payload.numel(), shard_bytes)
        sent[:full, self.offset :] = payload[: full * shard_bytes].view(full, shard_bytes)
        if rest:
            sent[full, self.offset : self.offset + rest] = payload[full * shard_bytes :]
        self.sent = sent

    def send(self) -> None:
        """Issues phase 1."""
        whole = self.road.algorithm == "all_gather"
        self.received = self.road.gather(self.sent) if whole else self.road.scatter(self.sent)

    def reduce(self) -> None:
        """Waits for phase 1, checks the headers, reduces this rank's shard, issues phase 2."""
        with self.road.stream():
            self._reduce()

    def _reduce(self) -> None:
        road = self.road
        received = self.received.wait()
        road.check(received)
        if self.extra is not None:
            road.coder.merge_extra(received[:, wire.HEADER_BYTES : self.offset])
        mine = 0 if road.algorithm == "all_gather" else road.comm.rank
        begin = self.begin + mine * self.shard
        reduced = road.coder.reduce(received, self.offset, begin, begin + self.shard)
        if road.algorithm == "all_gather":
            self.reduced: Tensor | _Pending = reduced.unsqueeze(0)
        else:
            message = torch.cat([road.header(road.flags), reduced])
            self.reduced = road.gather(message.unsqueeze(0), second=True)

    def complete(self) -> None:
        """Waits for phase 2 and decodes."""
        with self.road.stream():
            self._complete()

    def _complete(self) -> None:
        shards = self.reduced
        if not isinstance(shards, Tensor):
            received = shards.wait()
            self.road.check(received)
            shards = received[:, wire.HEADER_BYTES :].contiguous()
        self.road.coder.decode(shards, self.begin, self.end)


class _Pending:
    """A collective under way, and the buffers it needs."""

    def __init__(self, work: dist.Work | None, received: Tensor, sent: Tensor) -> None:
        self.work, self.received, self.sent = work, received, sent

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.received


class Road:
    """One all-reduce on its way (a :class:`pydist.communicator.Job`).

    Args:
        comm: The group's communicator.
        coder: The data and its codec.
        call: What the ranks must agree on.
        algorithm: ``"auto"``, ``"two_phase"`` or ``"all_gather"``.
        device: The data's device.
    """

    def __init__(
        self, comm: Communicator, coder: Coder, call: Call, algorithm: str, device: torch.device
    ) -> None:
        self.comm, self.coder = comm, coder
        self.algorithm = choose_algorithm(algorithm, coder, comm.world_size)
        # How the data is cut must be equal too; another release may choose otherwise.
        cut = {"algorithm": self.algorithm, "chunk_words": CHUNK_WORDS}
        self.call = replace(call, fields=call.fields | cut)
        self.data_device = device
        self.device = comm.device(device)
        self.future: Future[None] = Future()
        self.flags = torch.zeros(1, dtype=torch.int32, device=self.device)
        header = wire.Header(coder.codec, coder.bits, 0, self.call.digest, call.step).pack()
        self._header = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(self.device)
        self.stream = _SideStream(device)

    # ----------------------------------------------------------------- Job

    def chunks(self) -> Generator[_Exchange, None, None]:
        """Agrees, then sends chunk after chunk."""
        words = self.coder.words
        extra = self.coder.extra()
        exchanges = [
            _Exchange(self, begin, min(begin + CHUNK_WORDS, words), None if begin else extra)
            for begin in range(0, words, CHUNK_WORDS)
        ]
        with self.stream():
            # Where encoding changes nothing but buffers of its own, it hides the agreement's
            # round trip. Otherwise a disagreement must leave everything as it was.
            early = exchanges[:1] if self.coder.repeatable else []
            self.comm.agree(self.call, lambda: early[0].encode() if early else None)
            for exchange in exchanges:
                if exchange not in early:
                    exchange.encode()
                exchange.send()
                yield exchange

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all is decoded (on CUDA: makes the current stream wait)."""
        try:
            self.future.result(timeout)
        except FutureTimeoutError as error:  # before Python 3.11 it was no TimeoutError
            raise TimeoutError(f"{self.call.name} takes longer than {timeout} s") from error
        if self.stream.done is not None:
            torch.cuda.current_stream(self.data_device).wait_event(self.stream.done)

    def finish(self) -> None:
        """Hands the flags of all ranks to the coder."""
        with self.stream():
            self.coder.finish(self.flags)

    # ----------------------------------------------------------------- messages

    def header(self, flags: Tensor) -> Tensor:
        """A message's 16 bytes with this rank's flags."""
        header = self._header.clone()
        header[_FLAGS_AT] = flags[0]
        return header

    def check(self, received: Tensor) -> None:
        """Collects the flags of all ranks' headers and compares the rest with our own.

        Raises:
            ValueError: A header is malformed: the bytes did not come from an equal pydist.
        """
        headers = received[:, : wire.HEADER_BYTES]
        if headers.is_cuda:  # agreed on the host before; comparing here would wait for the device
            self.flags |= headers[:, _FLAGS_AT].max().to(torch.int32)
            return
        table = headers.numpy().copy()
        self.flags |= int(np.bitwise_or.reduce(table[:, _FLAGS_AT]))
        table[:, _FLAGS_AT] = 0
        if not (table == self._header.numpy()).all():
            rank = int((table != self._header.numpy()).any(1).nonzero()[0][0])
            header, reason = wire.unpack_header(table[rank].tobytes())
            raise ValueError(
                f"{self.call.name}: malformed message from rank {self.comm.ranks[rank]}: "
                f"{reason or header}"
            )

    def scatter(self, sent: Tensor) -> _Pending:
        """Phase 1: row i goes to rank i."""
        received = torch.empty_like(sent)
        self._count("phase 1", sent.numel() - sent.shape[1])
        work = None
        if self.comm.world_size > 1:
            work = dist.all_to_all_single(received, sent, group=self.comm.first, async_op=True)
        else:
            received = sent
        return _Pending(work, received, sent)

    def gather(self, sent: Tensor, *, second: bool = False) -> _Pending:
        """Everyone's message to everyone."""
        n = self.comm.world_size
        self._count("phase 2" if second else "phase 1", (n - 1) * sent.numel())
        if n == 1:
            return _Pending(None, sent, sent)
        received = sent.new_empty((n, sent.numel()))
        group = self.comm.second if second else self.comm.first
        work = all_gather(received, sent, group)
        return _Pending(work, received, sent)

    def _count(self, phase: str, size: int) -> None:
        self.comm.traffic.bytes_sent[phase] += size


class _SideStream:
    """Runs a job's kernels beside the caller's stream, after what the caller had enqueued.

    Attributes:
        done: On CUDA, recorded after the last kernel so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self.done = torch.cuda.Event()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.done is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self.done.record(self._stream)


class Work:
    """A collective under way, as ``torch.distributed`` hands it out with ``async_op=True``."""

    def __init__(self, road: Road, tensor: Tensor, dense: Tensor) -> None:
        self._road, self._tensor = road, tensor
        self._dense: Tensor | None = dense

    def is_completed(self) -> bool:
        """Whether the result is there."""
        return self._road.future.done()

    def wait(self, timeout: float | None = None) -> Tensor:
        """Waits for the result (on CUDA: makes the current stream wait).

        Args:
            timeout: Seconds; ``None`` waits as long as the process group does.

        Returns:
            The tensor that was given, now holding the result.

        Raises:
            PydistError: The call failed; on every rank where ranks disagree.
            TimeoutError: It took longer than ``timeout``.
        """
        self._road.wait(timeout)
        if self._dense is not None:
            written(self._tensor.detach(), self._dense)
            self._dense = None
        return self._tensor


def _step_of(step: int | Tensor) -> int:
    value: Any = step.item() if isinstance(step, Tensor) else step
    number = wire.as_int("step", value)
    checks.check_step(number)
    return number


def _check_all_reduce(tensor: Tensor, codec: Any, op: str) -> None:
    if not isinstance(codec, Sign):
        raise TypeError(f"codec must be a pydist codec, got {type(codec).__name__}")
    if codec.scale is not None:
        raise ValueError(f"codec must be Sign(scale=None) in this version, got {codec}")
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # a DTensor's memory is elsewhere
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"tensor must be dense, got layout {tensor.layout}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"tensor must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"tensor must be on cpu or cuda, got {tensor.device}")


def all_reduce(
    tensor: Tensor,
    codec: Sign,
    *,
    op: str = "mean",
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    seed: int = 0,
    step: int | Tensor | None = None,
    ties: str = "hash",
    async_op: bool = False,
) -> Tensor | Work:
    """Reduces a tensor over all ranks, in place, in compressed form.

    1. Each rank packs its tensor with the codec; all ranks agree on what they are about to do.
    2. Shard i of every rank's bytes goes to rank i (``all_to_all_single``).
    3. Rank i reduces them once, in rank order.
    4. The reduced shards go to everyone (``all_gather_into_tensor``) and are decoded; all ranks
       decode the same bytes, so all hold the same bits.

    A NaN or an infinity on any rank makes the whole result NaN on every rank.

    Args:
        tensor: float32, float16 or bfloat16, any shape and length, CPU or CUDA; overwritten.
        codec: ``pydist.Sign(scale=None)``.
        op: ``"vote"``: ±1, the sign most ranks have; ``"mean"`` or ``"sum"`` of the ranks' signs.
        group: Process group; default the world. The first call on a group makes groups of
            pydist's own, so all its ranks must make it.
        algorithm: ``"two_phase"``, ``"all_gather"``, or the cheaper one: ``"auto"``.
        seed: Seed of the tie hash, 0 … 2**32 - 1.
        step: Step of the tie hash and the zero rule, an int or a tensor of one; ``None`` takes
            the number of the group's calls so far.
        ties: ``"hash"``, ``"zero"`` (result 0, one more bit comes back) or ``"positive"``.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The tensor, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: Tensor or codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, or there is no process group.
        MismatchError: Ranks disagree (length, dtype, options, step); raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    comm = communicator(group)
    number, comm.step = comm.step, comm.step + 1  # counted on all ranks, whatever comes of it
    fields: dict[str, Any] = {}
    try:
        _check_all_reduce(tensor, codec, op)
        number = number if step is None else _step_of(step)
        rule = VoteRule(average=op != "vote", ties=ties, seed=seed)
        dense = dense_of("tensor", tensor.detach())
        coder = TensorVoteCoder(
            dense, rule, mean=op == "mean", rank=comm.rank, ranks=comm.world_size, step=number,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        fields = {
            "codec": repr(codec), "op": op, "numel": tensor.numel(), "dtype": str(tensor.dtype),
            "ties": ties, "seed": seed, "algorithm": algorithm,
        }  # fmt: skip
        road = Road(comm, coder, Call("all_reduce", fields, number), algorithm, tensor.device)
    except Exception as error:
        # The other ranks are about to wait for this one: they are told, then this one raises.
        refuse(comm, Call("all_reduce", fields, number, problem=str(error)))
        raise
    comm.submit(road)
    work = Work(road, tensor, dense)
    return work if async_op else work.wait()


def refuse(comm: Communicator, call: Call) -> None:
    """Takes part in a call's agreement with a problem, so that all ranks raise."""
    with contextlib.suppress(PydistError):
        comm.refuse(call).result()


def state_dict(group: dist.ProcessGroup | None = None) -> dict[str, int]:
    """The group's counter of calls, for a checkpoint."""
    return {"step": communicator(group).step}


def load_state_dict(state: dict[str, int], group: dist.ProcessGroup | None = None) -> None:
    """Restores the counter that :func:`state_dict` saved; call it on every rank."""
    communicator(group).step = int(state["step"])
