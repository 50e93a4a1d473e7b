"""Two levels of process groups, and the order in which calls go through them.

A call is three collectives one after the other, each on groups of its own. An all-reduce::

    inside   reduce-scatter   rank l of a node gets share l of the node's sum
    across   all-reduce       the ranks l of all nodes reduce their shares, compressed
    inside   all-gather       the node's ranks put the shares together, bit for bit

A call without data for a stage sends flags there (:class:`pydist.collectives.hierarchical.Flags`),
so that the ranks of a node agree in every stage, whatever each of them has called.

**Order.** A stage starts when the one before it has ended, which is at another moment on every
rank. So each stage has a communicator of its own and gets the calls in the order in which they were
made: no communicator ever waits for what a later call has to deliver, and in each of them all ranks
meet in the same order.

**Failures.** A rank that fails in a stage still takes part in the agreements of the following ones,
with its problem. So a disagreement inside one node is raised on every rank of every node.
"""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pydist.errors import PydistError
from pydist.transport import groups
from pydist.transport.call_group import CallGroup
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator, own_communicator
from pydist.transport.exchange import Exchange, Route, await_future
from pydist.transport.rendezvous import meet
from pydist.transport.streams import SideStream

STAGES = ("inside, first", "across", "inside, last")
INSIDE, ACROSS, GATHER = range(len(STAGES))


# --------------------------------------------------------------------------- the groups


class Grid:
    """The communicators of a node and of its peers across nodes.

    Construction is collective over all ranks of the grid.

    Args:
        across: The ranks that have this rank's place in their nodes.
        inside: The ranks of this node.
        device: Where the data is: ``"cpu"`` or ``"cuda"``.
        counter: Holds the number of calls.

    Attributes:
        nodes: Number of nodes.
        local: Ranks of each.
        node: This rank's node.
        local_rank: Its place in it.
        ranks: Number of all ranks.
        rank: This rank's number among them, counted node by node.
        step: Number of calls so far; that of all devices of these groups.

    Raises:
        ValueError: The groups do not form a grid; on every rank of them.
    """

    def __init__(
        self, across: dist.ProcessGroup, inside: dist.ProcessGroup, device: str, counter: list[int]
    ) -> None:
        _check_grid(across, inside)
        self.nodes, self.local = across.size(), inside.size()
        self.node, self.local_rank = dist.get_rank(across), dist.get_rank(inside)
        self.ranks, self.rank = self.nodes * self.local, self.node * self.local + self.local_rank
        self._counter = counter
        self._stages = tuple(own_communicator(group, device) for group in (inside, across, inside))
        self._lock = threading.RLock()
        self._order: tuple[deque[HierarchicalCall], ...] = (deque(), deque(), deque())

    @property
    def step(self) -> int:
        """Number of calls so far."""
        return self._counter[0]

    @step.setter
    def step(self, value: int) -> None:
        self._counter[0] = value

    def messages_on(self, device: torch.device) -> torch.device:
        """Where messages between nodes about data on a device are exchanged."""
        return self._stages[ACROSS].device(device)

    def traffic(self) -> dict[str, Counter[str]]:
        """Bytes that this rank has sent ``"inside"`` its node and ``"across"``, by phase."""
        scatter, across, gather = (comm.traffic.bytes_sent for comm in self._stages)
        return {"inside": scatter + gather, "across": across + Counter()}

    def catch_up(self) -> None:
        """:meth:`Communicator.catch_up` of all stages."""
        for comm in self._stages:
            comm.catch_up()

    def start(self, call: HierarchicalCall) -> None:
        """Starts a call."""
        with self._lock:
            for order in self._order:
                order.append(call)
        self.reached(call, 0)

    def reached(self, call: HierarchicalCall, stage: int) -> None:
        """A call is through with the stages before ``stage``: it and who waited for it go on."""
        with self._lock:
            call.at = stage
            if stage < len(STAGES):
                order = self._order[stage]
                while order and order[0].at >= stage:
                    order.popleft().enter(stage, self._stages[stage])
                return
        call.end()

    def fail_together(self, stage: int, error: BaseException) -> None:
        """Ends the communicators of all stages where that of one has ended.

        So the ranks of other nodes hear of a failure inside this one, and go no further than the
        call after.
        """
        if self._stages[stage].is_broken:
            for comm in self._stages:
                comm.fail(error)


def _check_grid(across: dist.ProcessGroup, inside: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank of both groups unless all ranks see the same grid.

    Everyone publishes its groups and reads those of its peers in both, then publishes what it
    found wrong: what one rank sees so reaches all ranks of the grid, in whatever order they look.
    """
    mine = {"across": _ranks(across), "inside": _ranks(inside)}
    both, timeout = [inside, across], groups.timeout_of(inside)
    inner, outer = (
        [json.loads(text) for text in roster.texts]
        for roster in meet(both, "grid of process groups", timeout, json.dumps(mine))
    )
    problem = _grid_problem(mine, inner, outer, dist.get_rank())
    heard = meet(both, "verdict on a grid of process groups", timeout, problem)
    problems = sorted({text for roster in heard for text in roster.texts if text})
    if problems:
        raise ValueError("across and inside do not form a grid: " + "; ".join(problems))


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _grid_problem(
    mine: dict[str, list[int]],
    inner: list[dict[str, list[int]]],
    outer: list[dict[str, list[int]]],
    rank: int,
) -> str:
    """What is wrong with the groups of this rank's peers; empty if nothing is."""
    shared = sorted(set(mine["across"]) & set(mine["inside"]))
    if shared != [rank]:
        return f"rank {rank} has ranks {shared} in both"
    for kind, peers in (("inside", inner), ("across", outer)):
        other = "across" if kind == "inside" else "inside"
        place = mine[other].index(rank)
        for peer, groups_of_peer in zip(mine[kind], peers, strict=True):
            theirs = groups_of_peer[other]
            if groups_of_peer[kind] != mine[kind]:
                return (
                    f"{kind} is {mine[kind]} on rank {rank} and "
                    f"{groups_of_peer[kind]} on rank {peer}"
                )
            if len(theirs) != len(mine[other]) or theirs.index(peer) != place:
                return (
                    f"rank {rank} is number {place} of {len(mine[other])} in {other}, "
                    f"rank {peer} number {theirs.index(peer)} of {len(theirs)}"
                )
    return ""


_grids: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[bool, Grid]]] = (
    weakref.WeakKeyDictionary()
)
_counters: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, list[int]]] = (
    weakref.WeakKeyDictionary()
)

Levels = DeviceMesh | tuple[dist.ProcessGroup, dist.ProcessGroup]
"""Two levels of groups: (across nodes, inside a node), or a mesh of these two dimensions."""


def pair(group: Levels) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The groups across nodes and inside a node.

    Raises:
        TypeError: These are not two groups.
        ValueError: The mesh has another number of dimensions, or this rank is not in both.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 2:
            raise ValueError(
                f"a mesh must have 2 dimensions (across nodes, inside a node), got {group.ndim}"
            )
        pair: tuple[Any, ...] = (group.get_group(0), group.get_group(1))
    else:
        pair = tuple(group)
    if dist.GroupMember.NON_GROUP_MEMBER in pair:
        raise ValueError(f"rank {dist.get_rank()} is not in both groups (across, inside)")
    if len(pair) != 2 or not all(isinstance(x, dist.ProcessGroup) for x in pair):
        kinds = ", ".join(type(x).__name__ for x in pair)
        raise TypeError(f"expected two groups (across nodes, inside a node), got ({kinds})")
    return pair


def counter_of_grid(group: Levels) -> list[int]:
    """The number of calls on two levels so far, the only entry of a list; not collective."""
    across, inside = pair(group)
    return _counters.setdefault(inside, weakref.WeakKeyDictionary()).setdefault(across, [0])


def grid(group: Levels, device: torch.device | str = "cpu") -> Grid:
    """The grid of two levels of groups; made at the first call, which is collective.

    Args:
        group: A 2-D mesh, its dimensions (across nodes, inside a node), or two groups in that
            order.
        device: Where the data is.

    Raises:
        TypeError: It is neither.
        ValueError: The mesh has another number of dimensions, this rank is not in it, or the groups
            do not form a grid.
    """
    across, inside = pair(group)
    kind = torch.device(device).type
    known = _grids.setdefault(inside, weakref.WeakKeyDictionary()).setdefault(across, {})
    by_device = groups.backend_for(across, kind) == "nccl"
    if by_device not in known:
        known[by_device] = Grid(across, inside, kind, counter_of_grid(group))
    return known[by_device]


# --------------------------------------------------------------------------- a call


def new_call_groups() -> list[CallGroup]:
    """Groups of calls that fail together, one for each stage."""
    return [CallGroup() for _ in STAGES]


class Stages(Protocol):
    """What a call does in each stage.

    Attributes:
        device: Where its data is.
        threads: CPU threads of its kernels.
    """

    device: torch.device
    threads: int

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage and the way it takes; called when the stage before has ended.

        Args:
            stage: ``INSIDE``, ``ACROSS`` or ``GATHER``.
            worker: Step and threads of the call.
        """
        ...

    def finish(self) -> None:
        """Called when the last stage has ended."""
        ...


class HierarchicalCall:
    """One call on its way through the stages.

    Args:
        grid: Where.
        name: What the user called.
        fields: What must be equal on all ranks.
        step: Step of the call.
        stages: What to do; ``None``: this rank cannot take part.
        problem: Why.
        across: What must be equal on the ranks with this rank's place in their nodes.
        known: As of :class:`pydist.transport.agreement.Call`.
        call_groups: For each stage the calls that this one belongs to.
    """

    def __init__(
        self,
        grid: Grid,
        name: str,
        fields: dict[str, Any],
        step: int,
        stages: Stages | None,
        problem: str | None = None,
        *,
        across: dict[str, Any] | None = None,
        known: bool = False,
        call_groups: Sequence[CallGroup] | None = None,
    ) -> None:
        self.future: Future[None] = Future()
        self.at = -1
        self._grid, self._name, self._fields, self._step = grid, name, fields, step
        self._stages, self._problem, self._known = stages, problem, known
        self._fields_across = across or {}
        self._call_groups = call_groups or new_call_groups()
        self._exchange: Exchange | None = None  # of the stage under way
        self._side: SideStream | None = None  # of the last stage so far
        self._device = None if stages is None else stages.device
        self._error: BaseException | None = None
        self._sent = [0] * len(STAGES)

    # ----------------------------------------------------------------- stages

    def enter(self, stage: int, comm: Communicator) -> None:
        """Issues a stage; where an earlier one failed, takes part in its agreement only."""
        exchange, stages = None, self._stages
        if stages is not None and self._problem is None:
            try:
                exchange = self._exchange_of(stage, comm, stages)
                exchange.future.add_done_callback(self._ended(stage))
            except Exception as error:
                self._fail(error)
                exchange = None
        try:
            if exchange is not None:
                comm.submit(exchange)
            else:
                call = Call(self._name, {}, self._step, problem=self._problem)
                comm.refuse(call, self._ended(stage), self._call_groups[stage])
        except PydistError as error:  # the communicator is broken or closed
            self._fail(error)
            self._grid.reached(self, stage + 1)

    def _exchange_of(self, stage: int, comm: Communicator, stages: Stages) -> Exchange:
        worker = Worker(0, 1, self._step, stages.threads)
        fields = {**self._fields, "stage": STAGES[stage]}
        if stage == ACROSS:
            fields |= self._fields_across
        call = Call(self._name, fields, self._step, known=self._known)
        with self.stream():  # on CUDA: in stream order after the stage before
            coder, route = stages.coder(stage, worker)
            group = self._call_groups[stage]
            self._exchange = Exchange(comm, coder, call, route, stages.device, group)
        self._side = self._exchange.stream
        return self._exchange

    def _ended(self, stage: int) -> Callable[[Future[None]], None]:
        def ended(future: Future[None]) -> None:
            exchange, self._exchange = self._exchange, None  # whose future holds this call
            if exchange is not None:
                self._sent[stage] = exchange.bytes_sent
            error = future.exception()
            if error is not None:
                self._fail(error)
                self._grid.fail_together(stage, error)
            elif stage == GATHER and self._problem is None:
                self._finish()
            self._grid.reached(self, stage + 1)

        return ended

    def _finish(self) -> None:
        try:
            assert self._stages is not None
            with self.stream():
                self._stages.finish()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The first problem is the one that this rank raises, and tells the others."""
        if self._problem is None:
            self._problem = str(error)
        if self._error is None:
            self._error = error

    def end(self) -> None:
        """Completes the future: all stages are over, and no rank waits for this one any more."""
        self._stages = None
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)

    # ----------------------------------------------------------------- the caller's side

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """On CUDA: runs a block on the stream of the last stage so far, after its kernels."""
        return contextlib.nullcontext() if self._side is None else self._side()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the result is there (on CUDA: makes the current stream wait)."""
        await_future(self.future, self._name, timeout)
        if self._side is not None and self._side.done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._side.done)

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent, headers and agreements included, when the call is complete."""
        return sum(self._sent)

    @property
    def inside_bytes(self) -> int:
        """What of it has gone to ranks of its node."""
        return self._sent[INSIDE] + self._sent[GATHER]
