"""pydist's own process groups, the agreement before a call, and the order in which calls travel.

All ranks must issue the collectives of a group in one order. A callback on a finished collective
fires at a different moment on every rank, so a second phase issued there deadlocks as soon as two
buckets are in flight. Here each phase has a process group of its own: the front thread issues the
first phase of call after call, the back thread the second phase in the same order, and neither ever
waits for something that a later call has to deliver. Phase 1 of one call so overlaps phase 2 of the
one before, whatever the timing.

With NCCL nothing needs a thread: collectives are enqueued on a side stream, in program order.

A call ends with a confirmation: every rank waits until all have decoded it, and compares checksums
of what they decoded. So where one rank fails, all ranks raise in the same call: the one that fails
writes why into the store and ends its connections, which wakes the others wherever they wait.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from pydist.errors import PydistError
from pydist.transport import groups
from pydist.transport.agreement import (
    Agreed,
    Agreement,
    Call,
    Confirmation,
    Traffic,
    differences,
)
from pydist.transport.buffers import BufferPool
from pydist.transport.call_group import CallGroup
from pydist.transport.connections import Connections, established
from pydist.transport.failures import Failures, Report
from pydist.transport.link import Link, measure
from pydist.transport.rendezvous import meet
from pydist.transport.transfers import Kind

__all__ = ["Call", "Communicator", "communicator", "differences"]

T = TypeVar("T")

IN_FLIGHT = 4
"""Chunks between the two threads at most; bounds the memory of calls in flight."""

END_SECONDS = 0.5
"""How long a shutdown waits for the next chunk of calls in flight that nobody waited for."""

GRACE_SECONDS = 0.5
"""How long calls in flight may still end by themselves after a peer has hung up."""


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

    def confirm(self) -> Confirmation | None:
        """Issues the call's confirmation, where it has one; all chunks are complete."""
        ...

    def finish(self) -> None:
        """Runs when the call is confirmed."""
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

    def confirm(self) -> Confirmation | None:
        """Nothing was decoded."""
        return None

    def finish(self) -> None:
        """Nothing to do."""


class Communicator:
    """The groups, threads and counters that belong to one process group of the user's.

    Construction is collective over the group's ranks; where it fails, it may be tried again.

    Args:
        parent: The user's process group; no reference to it is kept.
        device: Where data is: ``"cpu"`` or ``"cuda"``.

    Attributes:
        device_side: Messages are exchanged by NCCL, on the device. Otherwise they are in host
            memory, have checksums, and calls are confirmed.
        link: What was measured between the ranks; ``None`` for one rank, and on a device.
    """

    def __init__(self, parent: dist.ProcessGroup, device: str = "cpu") -> None:
        self.ranks = dist.get_process_group_ranks(parent)
        self.rank = dist.get_rank(parent)
        self.world_size = len(self.ranks)
        self.device_side = groups.backend_for(parent, device) == "nccl"
        self.timeout = groups.timeout_of(parent)
        self.traffic = Traffic()
        self.buffers, self.pinned = BufferPool(), BufferPool(pinned=True)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._counter = _counters.setdefault(parent, [0])
        self._made: list[dist.ProcessGroup] = []
        (roster,) = meet([parent], "set-up of a process group", self.timeout)
        self._failures = Failures(
            groups.store(), roster.name, self.ranks, self.rank, self.timeout.total_seconds()
        )
        before = established()
        try:
            self._make_groups(roster.name, parent)
            self._connections = Connections(
                groups.store(), roster.name, self.rank, self.world_size, before, self.timeout
            )
            self.link: Link | None = None
            if self.world_size > 1 and not self.device_side:
                self.link = measure(self.first, self.rank, self.world_size)
        except Exception:
            self._destroy_groups()
            raise
        behind = None if self.device_side else self.second  # on a device it would wait for results
        self.agreement = Agreement(
            roster.name, self.ranks, self.rank, self.control, behind, self.traffic
        )
        self._behind: Agreed | None = None  # what nobody has waited for
        self._breaking = False
        self._broken = ""  # why; empty while nothing is, or while that is found out
        self._explained = threading.Event()
        self._closed = False
        self._lock = threading.Lock()
        self._under_way = 0  # jobs
        self._advanced = 0  # chunks and jobs that have ended
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._chunks: queue.Queue[tuple[Job | None, Chunk | None]] = queue.Queue(IN_FLIGHT)
        self._threads: list[threading.Thread] = []

    def _make_groups(self, name: str, parent: dist.ProcessGroup) -> None:
        def make(purpose: str, backend: str) -> dist.ProcessGroup:
            made = groups.new_group(
                self.ranks, self.rank, backend=backend, name=f"{name}/{purpose}",
                timeout=self.timeout,
            )  # fmt: skip
            self._made.append(made)
            return made

        # One stream orders everything with NCCL, and its messages are on the device. Elsewhere the
        # phases must not wait for each other.
        if self.device_side:
            self.first = self.second = make("phase1", "nccl")
            self.control = make("control", "gloo")
        else:
            on_host = groups.backend_for(parent, "cpu") or "gloo"
            self.first = self.control = make("phase1", on_host)
            self.second = make("phase2", on_host)

    def group_for(self, kind: Kind) -> dist.ProcessGroup:
        """The group that carries the messages of a kind."""
        return self.second if kind in (Kind.PHASE_2, Kind.CONFIRMATION) else self.first

    @property
    def step(self) -> int:
        """Calls of the user's group so far, on any device; a checkpoint may hold it."""
        return self._counter[0]

    @step.setter
    def step(self, value: int) -> None:
        self._counter[0] = value

    def device(self, x: torch.device) -> torch.device:
        """Where messages about data on ``x`` are exchanged."""
        return x if self.device_side else torch.device("cpu")

    def stream_for(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream of all calls with data on a device, made once; ``None`` for the CPU."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def agree(self, call: Call, meanwhile: Callable[[], object] | None = None) -> None:
        """Makes sure that all ranks make the same call (:meth:`Agreement.agree`).

        Where messages stay on a device, a call that all ranks are known to expect (``call.known``)
        is agreed on behind its back: the headers are looked at by the next call, or by
        :meth:`catch_up`. So no call waits for the round trip of its own headers.
        """
        self.catch_up()
        if self.device_side and call.known and not call.problem and self.world_size > 1:
            self._behind = self.agreement.start(call)
            if meanwhile is not None:
                meanwhile()
            return
        self.agreement.agree(call, meanwhile)

    def catch_up(self) -> None:
        """Looks at the headers of the last call that nobody has waited for.

        Raises:
            PydistError: The ranks have made different calls. Their data is under way, so that this
                is the end of the process group.
        """
        behind, self._behind = self._behind, None
        if behind is None:
            return
        try:
            self.agreement.finish(behind)
        except BaseException as error:
            reason = self._break(behind.call.label, error)
            raise (error if isinstance(error, PydistError) else reason) from None

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, of any length, in rank order."""
        return self.agreement.gather_bytes(mine)

    # ----------------------------------------------------------------- order

    def submit(self, job: Job) -> None:
        """Starts a job; its future completes in the order of submission.

        Raises:
            PydistError: An earlier call failed or the communicator was shut down.
        """
        with self._lock:
            if self._closed:
                raise PydistError("the process group was destroyed")
            if self._breaking:
                raise self._earlier()
            self.traffic.calls += 1
            self._under_way += 1
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
        call_group: CallGroup | None = None,
    ) -> Future[None]:
        """Takes part in a call's agreement with its problem, in order; every rank then raises."""

        def task() -> None:
            with contextlib.nullcontext() if call_group is None else call_group.member():
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
        self._connections.watch(self._hung_up)

    def _run_inline(self, job: Job) -> None:
        try:
            with contextlib.closing(job.chunks()) as chunks:  # an error must not keep its stream
                for chunk in chunks:
                    chunk.reduce()
                    chunk.complete()
            job.finish()
            self._end(job, None)
        except BaseException as error:
            self._end(job, error)

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
            if self._breaking:
                raise self._earlier()
            with contextlib.closing(job.chunks()) as chunks:
                for chunk in chunks:
                    self._chunks.put((job, chunk))
            self._chunks.put((job, None))
        except BaseException as error:
            self._end(job, error)
        return True

    def _back(self) -> None:
        """Issues phase 2 of every chunk, in order, one ahead of waiting for it."""
        pending: list[Chunk] = []
        # Confirmations are issued in the order of the calls, and waited for where there is nothing
        # else to do: that issues nothing, so it may happen at any moment.
        unconfirmed: deque[tuple[Job, Confirmation]] = deque()
        while True:
            while unconfirmed and (self._chunks.empty() or len(unconfirmed) > IN_FLIGHT):
                self._settle(*unconfirmed.popleft())
            if not self._advance(*self._chunks.get(), pending, unconfirmed):
                return

    def _advance(
        self,
        job: Job | None,
        chunk: Chunk | None,
        pending: list[Chunk],
        unconfirmed: deque[tuple[Job, Confirmation]],
    ) -> bool:
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
                self._advanced += 1
            if chunk is None:
                confirmation = job.confirm()
                if confirmation is not None:
                    unconfirmed.append((job, confirmation))
                else:
                    job.finish()
                    self._end(job, None)
        except BaseException as error:
            pending.clear()
            self._end(job, error)
        return True

    def _settle(self, job: Job, confirmation: Confirmation) -> None:
        try:
            self.agreement.confirmed(confirmation)
            job.finish()
            self._end(job, None)
        except BaseException as error:
            self._end(job, error)

    # ----------------------------------------------------------------- the end of a job

    def _end(self, job: Job, error: BaseException | None) -> None:
        """Completes a job's future; what breaks the communicator breaks it on all ranks."""
        # A disagreement is raised on every rank before data moved: the group is still in step.
        if error is not None and not isinstance(error, PydistError):
            error = self._break(job.label, error)
        with self._lock:
            if job.future.done():
                return
            self._under_way -= 1
            self._advanced += 1
        if error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(error)

    def _break(self, label: str, error: BaseException) -> PydistError:
        """Ends the connections, so that every rank fails; says what went wrong, and where."""
        with self._lock:
            first, self._breaking = not self._breaking, True
        if first:
            report = Report.of(error)
            self._failures.publish(report)
            self._abort()
            which = f"{label}: " if label else ""
            why = self._failures.explain(report, self._connections.hung_up)
            self._broken = f"{which}a collective failed: {why}"
            self._explained.set()
        self._explained.wait()
        # The frames hold the user's model; who reads the traceback needs their lines alone.
        traceback.clear_frames(error.__traceback__)
        reason = PydistError(self._broken)
        reason.__cause__ = error
        return reason

    @property
    def is_broken(self) -> bool:
        """Whether a call has failed, so that no other can be made."""
        return self._breaking

    def fail(self, error: BaseException) -> None:
        """Ends the connections because of a failure elsewhere: every rank's next call raises."""
        if not self._breaking:
            self._break("", error)

    def _earlier(self) -> PydistError:
        self._explained.wait()
        return PydistError(f"an earlier call on this process group failed: {self._broken}")

    def _abort(self) -> None:
        self._connections.abort()
        if self.device_side:
            groups.abort(self.first)

    def _hung_up(self) -> None:
        """A peer has closed its connections: what still needs it will not end by itself."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self._under_way and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._under_way:
            self._abort()

    def shutdown(self) -> None:
        """Ends the threads; calls in flight have a second to end. Not collective."""
        shut_down([self])

    def _close(self) -> bool:
        """Takes no more calls; whether it took any before."""
        with self._lock:
            was_open, self._closed = not self._closed, True
        if was_open:
            self._failures.closing = True
            self._jobs.put(None)
        return was_open

    def _ended(self) -> bool:
        """Whether the threads have ended; the one that asks does not count."""
        here = threading.current_thread()
        return not any(thread.is_alive() for thread in self._threads if thread is not here)

    def _destroy_groups(self) -> None:
        for group in self._made:
            groups.destroy(group)
        self._made.clear()
        # With the last reference gloo's threads end; later they would meet a dying interpreter.
        self.__dict__.pop("agreement", None)
        for name in ("first", "second", "control"):
            self.__dict__.pop(name, None)


def shut_down(communicators: list[Communicator]) -> None:
    """Ends communicators together: a call of one may be what another waits for."""
    ending = [each for each in communicators if each._close()]
    for _ in range(2):
        _wait_while_they_advance(ending)
        for each in ending:
            if not each._ended():
                each._abort()
    for each in ending:
        each._connections.close()
        each._destroy_groups()


def _wait_while_they_advance(communicators: list[Communicator]) -> None:
    """Waits for their threads to end, as long as a chunk ends every so often."""
    advanced, since = -1, time.monotonic()
    while time.monotonic() < since + END_SECONDS:
        if all(each._ended() for each in communicators):
            return
        if (now := sum(each._advanced for each in communicators)) != advanced:
            advanced, since = now, time.monotonic()
        time.sleep(0.002)


# --------------------------------------------------------------------------- the cache

_counters: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
_communicators: weakref.WeakKeyDictionary[Any, dict[bool, Communicator]] = (
    weakref.WeakKeyDictionary()
)
_all: weakref.WeakSet[Communicator] = weakref.WeakSet()


def checked(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group that a user means; ``None`` is the default one.

    Raises:
        TypeError: ``group`` is no process group.
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
    return parent


def counter_of(group: dist.ProcessGroup | None) -> list[int]:
    """The number of a group's calls so far, as the only entry of a list; not collective."""
    return _counters.setdefault(checked(group), [0])


def own_communicator(parent: dist.ProcessGroup, device: str = "cpu") -> Communicator:
    """A new communicator of a process group, which ends with the group; collective."""
    made = Communicator(parent, device)
    _all.add(made)
    weakref.finalize(parent, made.shutdown)
    return made


def communicator(
    group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Communicator:
    """The communicator of a process group; made at the first call, which is collective.

    Args:
        group: The user's process group; ``None`` is the default one.
        device: Where the data is, which decides what carries it.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: There is no process group, or this rank is not in it.
        PydistError: A rank did not come to the first call in time; it may be tried again.
    """
    parent = checked(group)
    kind = torch.device(device).type
    by_device = groups.backend_for(parent, kind) == "nccl"
    known = _communicators.setdefault(parent, {})
    if by_device not in known:
        known[by_device] = own_communicator(parent, kind)
    return known[by_device]


@atexit.register
def _shut_down_all() -> None:
    shut_down(list(_all))
