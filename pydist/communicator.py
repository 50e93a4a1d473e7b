"""pydist's own process groups, the agreement before a call, and the order in which calls travel.

All ranks must issue the collectives of a group in one order. A callback on a finished collective
fires at a different moment on every rank, so a second phase issued there deadlocks as soon as two
buckets are in flight. Here each phase has a process group of its own: the front thread issues the
first phase of call after call, the back thread the second phase in the same order, and neither ever
waits for something that a later call has to deliver. Phase 1 of one call so overlaps phase 2 of the
one before, whatever the timing.

With NCCL nothing needs a thread: collectives are enqueued on a side stream, in program order.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pydist import groups, wire
from pydist.errors import MismatchError, PydistError
from pydist.series import Series
from pydist.staging import Staging

T = TypeVar("T")

IN_FLIGHT = 4
"""Chunks between the two threads at most; bounds the memory of calls in flight."""

JOIN_SECONDS = 10.0
"""How long a shutdown waits for calls in flight that nobody waited for."""


@dataclass(frozen=True)
class Call:
    """What all ranks must agree on before data moves.

    Attributes:
        name: What the user called, for messages.
        fields: Names and values that must be equal on all ranks (JSON types).
        step: Step of the call; must be equal too.
        problem: Why this rank cannot take part; all ranks then raise.
    """

    name: str
    fields: dict[str, Any]
    step: int = 0
    problem: str | None = None

    @property
    def digest(self) -> int:
        """32-bit checksum of name and fields."""
        return zlib.crc32(_json([self.name, self.fields]))

    @property
    def label(self) -> str:
        """Name and step, for messages."""
        return f"{self.name}, step {self.step}"


class Chunk(Protocol):
    """A part of a job after its first phase was issued."""

    def reduce(self) -> None:
        """Waits for phase 1, reduces, issues phase 2."""
        ...

    def complete(self) -> None:
        """Waits for phase 2 and decodes."""
        ...


class Job(Protocol):
    """A collective call, cut into chunks.

    Attributes:
        future: Complete when the job is.
        label: What the user called and its step, for messages; may be empty.
    """

    future: Future[None]
    label: str

    def chunks(self) -> Generator[Chunk, None, None]:
        """Agrees with the other ranks, then encodes and issues phase 1, chunk after chunk."""
        ...

    def finish(self) -> None:
        """Runs when all chunks are complete."""
        ...


class _Task(Generic[T]):
    """A job without data: something small that must keep its place among the others."""

    result: T

    def __init__(self, task: Callable[[], T], label: str = "") -> None:
        self.task, self.label = task, label
        self.future: Future[None] = Future()

    def chunks(self) -> Generator[Chunk, None, None]:
        self.result = self.task()
        yield from ()

    def finish(self) -> None:
        """Nothing to do."""


@dataclass
class Traffic:
    """Bytes this rank handed to the network, by phase, and the number of calls."""

    bytes_sent: Counter[str] = field(default_factory=Counter)
    calls: int = 0


class Communicator:
    """The groups, threads and counters that belong to one process group of the user's.

    Construction is collective over the group's ranks.

    Args:
        parent: The user's process group; no reference to it is kept.
        phases: 1 where calls have no second phase.
    """

    def __init__(self, parent: dist.ProcessGroup, phases: int = 2) -> None:
        self.ranks = dist.get_process_group_ranks(parent)
        self.rank = dist.get_rank(parent)
        self.world_size = len(self.ranks)
        self.backend = str(dist.get_backend(parent))
        self.timeout = groups.timeout_of(parent)
        self.device_side = "nccl" in self.backend
        self.step = 0
        self.traffic = Traffic()
        self.staging = Staging()
        name = groups.unique_name(parent)
        self.first = self._new_group(f"{name}/phase1", self.backend)
        # One stream orders everything with NCCL, and its messages are on the device. Elsewhere the
        # phases must not wait for each other.
        self.second = self.control = self.first
        if self.device_side:
            self.control = self._new_group(f"{name}/control", "gloo")
        elif phases > 1:
            self.second = self._new_group(f"{name}/phase2", self.backend)
        self._broken: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._chunks: queue.Queue[tuple[Job | None, Chunk | None]] = queue.Queue(IN_FLIGHT)
        self._threads: list[threading.Thread] = []

    def _new_group(self, name: str, backend: str) -> dist.ProcessGroup:
        return groups.new_group(
            self.ranks, self.rank, backend=backend, name=name, timeout=self.timeout
        )

    def device(self, x: torch.device) -> torch.device:
        """Where messages about data on ``x`` are exchanged."""
        return x if self.device_side else torch.device("cpu")

    # ----------------------------------------------------------------- agreement

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
        flags = wire.FLAG_PROBLEM if call.problem else 0
        mine = wire.Header(wire.CODECS["agreement"], 0, flags, call.digest, call.step).pack()
        sent = torch.frombuffer(bytearray(mine * self.world_size), dtype=torch.uint8)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self.control, async_op=True)
        try:
            meanwhile()
        finally:
            work.wait()
        self.traffic.bytes_sent["agreement"] += (self.world_size - 1) * len(mine)
        if call.problem or received.numpy().tobytes() != mine * self.world_size:
            self._raise_difference(call, received.view(self.world_size, -1))

    def _raise_difference(self, call: Call, headers: Tensor) -> None:
        for rank, header in zip(self.ranks, headers, strict=True):
            _, reason = wire.unpack_header(header.numpy().tobytes())
            if reason:  # not only here: whoever sent it sees ours as malformed, others see it too
                call = replace(call, problem=call.problem or f"header of rank {rank}: {reason}")
        described = {"call": call.name, **call.fields, "step": call.step}
        mine = _json({"fields": described, "problem": call.problem})
        descriptions = [json.loads(text) for text in self.gather_bytes(mine)]
        problems = [
            f"rank {rank}: {description['problem']}"
            for rank, description in zip(self.ranks, descriptions, strict=True)
            if description["problem"]
        ]
        if problems:
            raise PydistError(f"{call.name}: " + "; ".join(problems))
        fields = [description["fields"] for description in descriptions]
        raise MismatchError(f"{call.name}: ranks disagree: {differences(fields, self.ranks)}")

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, of any length, in rank order."""
        size = torch.tensor([len(mine)])
        sizes = torch.empty(self.world_size, dtype=torch.int64)
        groups.all_gather(sizes, size, self.control).wait()
        padded = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
        padded.numpy()[: len(mine)] = list(mine)
        rows = padded.new_empty((self.world_size, len(padded)))
        groups.all_gather(rows, padded, self.control).wait()
        return [row.numpy().tobytes()[:n] for row, n in zip(rows, sizes.tolist(), strict=True)]

    # ----------------------------------------------------------------- order

    def submit(self, job: Job) -> None:
        """Starts a job; its future completes in the order of submission.

        Raises:
            PydistError: An earlier call failed or the communicator was shut down.
        """
        with self._lock:
            if self._closed:
                raise PydistError("the process group was destroyed")
            if self._broken is not None:
                raise PydistError(
                    f"an earlier collective of this process group failed: {self._broken}"
                ) from self._broken
            self.traffic.calls += 1
            if not self.device_side and not self._threads:
                self._start_threads()
            if not self.device_side:
                self._jobs.put(job)
        if self.device_side:
            self._run_inline(job)

    def run(self, task: Callable[[], T]) -> T:
        """Runs a task that uses this communicator's groups, in order with the jobs."""
        job = _Task(task)
        self.submit(job)
        job.future.result()
        return job.result

    def refuse(
        self,
        call: Call,
        then: Callable[[Future[None]], None] | None = None,
        series: Series | None = None,
    ) -> Future[None]:
        """Takes part in a call's agreement with its problem, in order; every rank then raises."""

        def task() -> None:
            with contextlib.nullcontext() if series is None else series.member():
                self.agree(call)

        job = _Task(task, call.label)
        if then is not None:
            job.future.add_done_callback(then)
        self.submit(job)
        return job.future

    def _start_threads(self) -> None:
        for name, loop in (("front", self._front), ("back", self._back)):
            thread = threading.Thread(target=loop, name=f"pydist-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run_inline(self, job: Job) -> None:
        try:
            with contextlib.closing(job.chunks()) as chunks:  # an error must not keep its stream
                for chunk in chunks:
                    chunk.reduce()
                    chunk.complete()
            job.finish()
            job.future.set_result(None)
        except BaseException as error:
            self._fail(job, error)

    def _front(self) -> None:
        """Issues phase 1 of every chunk of every job, in order."""
        while self._issue(self._jobs.get()):
            pass
        self._chunks.put((None, None))

    # One job, one call: a thread that waits for the next one must not keep the tensors of the last.
    def _issue(self, job: Job | None) -> bool:
        if job is None:
            return False
        try:
            if self._broken is not None:
                raise PydistError(f"an earlier collective failed: {self._broken}")
            with contextlib.closing(job.chunks()) as chunks:
                for chunk in chunks:
                    self._chunks.put((job, chunk))
            self._chunks.put((job, None))
        except BaseException as error:
            self._fail(job, error)
        return True

    def _back(self) -> None:
        """Issues phase 2 of every chunk, in order, one ahead of waiting for it."""
        pending: list[Chunk] = []
        while self._advance(*self._chunks.get(), pending):
            pass

    def _advance(self, job: Job | None, chunk: Chunk | None, pending: list[Chunk]) -> bool:
        if job is None:
            return False
        try:
            if job.future.done():  # failed already
                pending.clear()
                return True
            if chunk is not None:
                chunk.reduce()
                pending.append(chunk)
            while len(pending) > (1 if chunk is not None else 0):
                pending.pop(0).complete()
            if chunk is None:
                job.finish()
                job.future.set_result(None)
        except BaseException as error:
            pending.clear()
            self._fail(job, error)
        return True

    def _fail(self, job: Job, error: BaseException) -> None:
        # A disagreement is raised on every rank before data moved: the group is still in step.
        if not isinstance(error, PydistError):
            self._broken = error
            which = f"{job.label}: " if job.label else ""
            me = self.ranks[self.rank]
            reason = PydistError(f"{which}rank {me}: a collective failed: {error}")
            reason.__cause__ = error
            error = reason
        if not job.future.done():
            job.future.set_exception(error)

    def shutdown(self) -> None:
        """Ends the threads once the jobs in flight are done. Not collective."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._jobs.put(None)
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=max(0.0, deadline - time.monotonic()))
        for group in {self.first, self.second, self.control}:
            groups.destroy(group)


# --------------------------------------------------------------------------- helpers


def _json(value: Any) -> bytes:
    # What JSON cannot hold (numbers of NumPy, say) is told apart by its repr.
    return json.dumps(value, sort_keys=True, default=repr).encode()


def differences(descriptions: list[dict[str, Any]], ranks: list[int]) -> str:
    """Says in which fields descriptions differ, with the values and who has them."""
    parts = []
    for name in sorted({key for description in descriptions for key in description}):
        by_value: dict[str, list[int]] = {}
        for rank, description in zip(ranks, descriptions, strict=True):
            by_value.setdefault(json.dumps(description.get(name)), []).append(rank)
        if len(by_value) > 1:
            sides = [
                f"{value} on rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
                for value, who in by_value.items()
            ]
            parts.append(f"{name} is {' and '.join(sides)}")
    return "; ".join(parts)


# --------------------------------------------------------------------------- the cache

_communicators: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()
_all: weakref.WeakSet[Communicator] = weakref.WeakSet()


def own_communicator(parent: dist.ProcessGroup, phases: int = 2) -> Communicator:
    """A new communicator of a process group, which ends with the group; collective."""
    made = Communicator(parent, phases)
    _all.add(made)
    weakref.finalize(parent, made.shutdown)
    return made


def communicator(
    group: dist.ProcessGroup | None = None,
) -> Communicator:
    """The communicator of a process group; made at the first call, which is collective.

    Args:
        group: The user's process group; ``None`` is the default one.

    Raises:
        ValueError: There is no process group, or this rank is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group={group}: no process group; call torch.distributed.init_process_group() "
            "first (torchrun sets its environment)"
        )
    parent: Any = group if group is not None else dist.group.WORLD
    outside = parent in (None, dist.GroupMember.NON_GROUP_MEMBER)
    if not outside and not isinstance(parent, dist.ProcessGroup):
        raise TypeError(f"group must be one process group, got {type(group).__name__}")
    if outside or dist.get_rank(parent) < 0:
        raise ValueError(f"group: rank {dist.get_rank()} is not in this process group")
    found = _communicators.get(parent)
    if found is None:
        found = _communicators[parent] = own_communicator(parent)
    return found


@atexit.register
def _shutdown_all() -> None:
    for found in list(_all):
        found.shutdown()
