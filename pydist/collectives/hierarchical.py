"""All-reduce on two levels: sums inside a node, compressed across nodes, gathered inside.

A call is three collectives one after the other, each on groups of its own::

    inside   reduce-scatter   rank l of a node gets share l of the node's sum, in float32
    across   all-reduce       the ranks l of all nodes reduce their shares, compressed
    inside   all-gather       the node's ranks put the shares together, bit for bit

**Order.** A stage starts when the one before it has ended, which is at another moment on every
rank. So each stage has a communicator of its own and gets the calls in the order in which they were
made: no communicator ever waits for what a later call has to deliver, and in each of them all ranks
meet in the same order.

**Failures.** A rank that fails in a stage still takes part in the agreements of the following ones,
with its problem. So a disagreement inside one node is raised on every rank of every node.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pydist.codecs import Codec, Raw
from pydist.encoding.choose import all_gather_coder, all_reduce_coder, reduce_scatter_coder, unit_of
from pydist.errors import PydistError
from pydist.transport import groups
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator, own_communicator
from pydist.transport.exchange import (
    ALL_GATHER,
    REDUCE_SCATTER,
    Exchange,
    Route,
    await_future,
    wait_for,
)
from pydist.transport.rendezvous import meet

STAGES = ("inside: reduce-scatter", "across", "inside: all-gather")


@dataclass(frozen=True)
class Shares:
    """How a tensor is cut inside a node.

    Attributes:
        numel: Elements of the tensor.
        local: Ranks of a node.
        unit: Elements that stay together: the block of the codec that goes across.
    """

    numel: int
    local: int
    unit: int

    @property
    def share(self) -> int:
        """Elements of a share, whole units; the last shares may have fewer, or none."""
        return -(-self.numel // (self.local * self.unit)) * self.unit

    @property
    def padded(self) -> int:
        """Elements of all shares."""
        return self.local * self.share

    def length(self, rank: int) -> int:
        """Elements of a rank's share that are the tensor's."""
        return max(0, min(self.share, self.numel - rank * self.share))


def inside_worker(node: int, local_rank: int, nodes: int, local: int, worker: Worker) -> Worker:
    """Who a rank is to the codec inside its node.

    It draws like no other rank, and unlike those that go across, who are ranks 0 … nodes - 1.
    """
    rank = nodes + node * local + local_rank
    return Worker(local_rank, local, worker.step, worker.threads, draws_as=rank)


def across_worker(node: int, nodes: int, local: int, first: int, worker: Worker) -> Worker:
    """Who a rank is to the codec across nodes: its node, which speaks for ``local`` ranks."""
    return Worker(node, nodes, worker.step, worker.threads, first=first, behind=local)


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

    def traffic(self) -> dict[str, Counter[str]]:
        """Bytes that this rank has sent ``"inside"`` its node and ``"across"``, by phase."""
        scatter, across, gather = (comm.traffic.bytes_sent for comm in self._stages)
        return {"inside": scatter + gather, "across": across + Counter()}

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
            if stage == len(STAGES):
                return
            order = self._order[stage]
            while order and order[0].at >= stage:
                order.popleft().enter(stage, self._stages[stage])


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
        raise ValueError("group: across and inside do not form a grid: " + "; ".join(problems))


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


def _pair(group: Levels) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The groups across nodes and inside a node.

    Raises:
        TypeError: These are not two groups.
        ValueError: The mesh has another number of dimensions, or this rank is not in both.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 2:
            raise ValueError(
                "group: a mesh must have 2 dimensions (across nodes, inside a node), "
                f"got {group.ndim}"
            )
        pair: tuple[Any, ...] = (group.get_group(0), group.get_group(1))
    else:
        pair = tuple(group)
    if dist.GroupMember.NON_GROUP_MEMBER in pair:
        raise ValueError(f"group: rank {dist.get_rank()} is not in both groups")
    if len(pair) != 2 or not all(isinstance(x, dist.ProcessGroup) for x in pair):
        kinds = ", ".join(type(x).__name__ for x in pair)
        raise TypeError(f"group must be two groups (across nodes, inside a node), got ({kinds})")
    return pair


def counter_of_grid(group: Levels) -> list[int]:
    """The number of calls on two levels so far, the only entry of a list; not collective."""
    across, inside = _pair(group)
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
    across, inside = _pair(group)
    kind = torch.device(device).type
    known = _grids.setdefault(inside, weakref.WeakKeyDictionary()).setdefault(across, {})
    by_device = groups.backend_for(across, kind) == "nccl"
    if by_device not in known:
        known[by_device] = Grid(across, inside, kind, counter_of_grid(group))
    return known[by_device]


# --------------------------------------------------------------------------- a call


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        tensor: Contiguous; read, then overwritten.
        codec: The codec across nodes.
        inner: The codec inside a node.
        options: ``op``, ``ties`` and ``seed``.
        algorithm: That across nodes.
        threads: CPU threads of the kernels.
    """

    tensor: Tensor
    codec: Codec
    inner: Codec
    options: dict[str, Any]
    algorithm: str
    threads: int


class HierarchicalCall:
    """One all-reduce on its way through the stages.

    Args:
        grid: Where.
        name: What the user called.
        fields: What must be equal on all ranks.
        step: Step of the call.
        plan: What to do; ``None``: this rank cannot take part.
        problem: Why.
    """

    def __init__(
        self,
        grid: Grid,
        name: str,
        fields: dict[str, Any],
        step: int,
        plan: Plan | None,
        problem: str | None = None,
    ) -> None:
        self.future: Future[None] = Future()
        self.at = -1
        self._grid, self._name, self._fields, self._step = grid, name, fields, step
        self._plan, self._problem = plan, problem
        self._exchange: Exchange | None = None
        if plan is not None:
            self._cut(plan)

    def _cut(self, plan: Plan) -> None:
        """Makes the shares' memory."""
        grid, x = self._grid, plan.tensor.view(-1)
        self._shares = Shares(x.numel(), grid.local, unit_of(plan.codec))
        self._padded = x
        if self._shares.padded != x.numel():
            self._padded = x.new_zeros(self._shares.padded)
            self._padded[: x.numel()] = x
        self._share = x.new_empty(self._shares.share, dtype=torch.float32)
        self._builders = (self._scatter, self._across, self._gather)

    # ----------------------------------------------------------------- stages

    def _scatter(self, plan: Plan, worker: Worker) -> tuple[Coder, Route | str]:
        grid = self._grid
        inside = inside_worker(grid.node, grid.local_rank, grid.nodes, grid.local, worker)
        options = {**plan.options, "op": "sum"}
        coder = reduce_scatter_coder(self._share, self._padded, plan.inner, inside, **options)
        return coder, REDUCE_SCATTER

    def _across(self, plan: Plan, worker: Worker) -> tuple[Coder, Route | str]:
        grid, shares = self._grid, self._shares
        first = grid.local_rank * shares.share
        node = across_worker(grid.node, grid.nodes, grid.local, first, worker)
        mine = self._share[: shares.length(grid.local_rank)]
        self._share[len(mine) :] = 0  # whatever the codec inside made of the padding
        return all_reduce_coder(mine, plan.codec, node, **plan.options), plan.algorithm

    def _gather(self, plan: Plan, worker: Worker) -> tuple[Coder, Route | str]:
        exact = Raw(str(plan.tensor.dtype)[6:])
        local = Worker(self._grid.local_rank, self._grid.local, worker.step, worker.threads)
        seed = plan.options["seed"]
        return all_gather_coder(self._padded, self._share, exact, local, seed=seed), ALL_GATHER

    def enter(self, stage: int, comm: Communicator) -> None:
        """Issues a stage; where an earlier one failed, takes part in its agreement only."""
        exchange, plan = None, self._plan
        if plan is not None and self._problem is None:
            try:
                exchange = self._exchange_of(stage, comm, plan)
                exchange.future.add_done_callback(self._ended(stage))
            except Exception as error:
                self._fail(error)
                exchange = None
        try:
            if exchange is not None:
                comm.submit(exchange)
            else:
                call = Call(self._name, {}, self._step, problem=self._problem)
                comm.refuse(call, self._ended(stage))
        except PydistError as error:  # the communicator is broken or closed
            self._fail(error)
            self._grid.reached(self, stage + 1)

    def _exchange_of(self, stage: int, comm: Communicator, plan: Plan) -> Exchange:
        worker = Worker(0, 1, self._step, plan.threads)
        call = Call(self._name, {**self._fields, "stage": STAGES[stage]}, self._step)
        before, device = self._exchange, plan.tensor.device
        with wait_for(before):  # on CUDA: in stream order after the stage before
            coder, route = self._builders[stage](plan, worker)
            self._exchange = Exchange(comm, coder, call, route, device)
        return self._exchange

    def _ended(self, stage: int) -> Callable[[Future[None]], None]:
        def ended(future: Future[None]) -> None:
            error = future.exception()
            if error is not None:
                self._fail(error)
            elif stage == len(STAGES) - 1 and self._problem is None:
                self._finish()
            self._grid.reached(self, stage + 1)

        return ended

    def _finish(self) -> None:
        try:
            assert self._plan is not None
            flat = self._plan.tensor.view(-1)
            if self._shares.padded != flat.numel():
                with wait_for(self._exchange):
                    flat.copy_(self._padded[: flat.numel()])
            self.future.set_result(None)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The first problem is the one that this rank raises, and tells the others."""
        if self._problem is None:
            self._problem = str(error)
        if not self.future.done():
            self.future.set_exception(error)

    # ----------------------------------------------------------------- the caller's side

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the result is there (on CUDA: makes the current stream wait)."""
        await_future(self.future, self._name, timeout)
        if self._exchange is not None:
            self._exchange.wait(timeout)  # has ended
