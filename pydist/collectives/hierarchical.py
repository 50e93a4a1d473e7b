"""All-reduce and reduce-scatter on two levels: sums inside a node, compressed across nodes.

The stages of a call are those of :mod:`pydist.collectives.grid`. For an all-reduce a tensor is cut
into shares of equal length, whole blocks, one for each rank of a node; what becomes of them across
nodes is gathered inside. A reduce-scatter has a part for every rank of every node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.collectives.grid import ACROSS, INSIDE, Grid
from pydist.encoding.choose import all_gather_coder, all_reduce_coder, reduce_scatter_coder, unit_of
from pydist.encoding.rows import Job, fill_nan
from pydist.formats import wire
from pydist.transport.coder import BareCoder, Coder, Worker
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, Route


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


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        tensor: Contiguous; overwritten.
        codec: The codec across nodes.
        inner: The codec inside a node.
        options: ``op``, ``ties`` and ``seed``.
        threads: CPU threads of the kernels.
    """

    tensor: Tensor
    codec: Codec
    inner: Codec
    options: dict[str, Any]
    threads: int

    def inside_coder(self, grid: Grid, sums: Tensor, data: Tensor, worker: Worker) -> Coder:
        """The coder of the reduce-scatter inside a node: the sum of its ranks' data."""
        inside = inside_worker(grid.node, grid.local_rank, grid.nodes, grid.local, worker)
        return reduce_scatter_coder(sums, data, self.inner, inside, **self.options | {"op": "sum"})


class AllReduce:
    """The stages of an all-reduce (:class:`pydist.collectives.grid.Stages`).

    Args:
        grid: The groups.
        plan: What to do; the tensor is read, too.
        algorithm: That across nodes.
    """

    def __init__(self, grid: Grid, plan: Plan, algorithm: str) -> None:
        self._grid, self._plan, self._algorithm = grid, plan, algorithm
        self.device, self.threads = plan.tensor.device, plan.threads
        x = plan.tensor.view(-1)
        self._shares = Shares(x.numel(), grid.local, unit_of(plan.codec))
        self._padded = x
        if self._shares.padded != x.numel():
            self._padded = x.new_zeros(self._shares.padded)
            self._padded[: x.numel()] = x
        self._share = x.new_empty(self._shares.share, dtype=torch.float32)

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage."""
        if stage == INSIDE:
            coder = self._plan.inside_coder(self._grid, self._share, self._padded, worker)
            return coder, REDUCE_SCATTER
        if stage == ACROSS:
            return self._across(worker), self._algorithm
        return self._gather(worker), ALL_GATHER

    def _across(self, worker: Worker) -> Coder:
        grid, shares = self._grid, self._shares
        first = grid.local_rank * shares.share
        node = across_worker(grid.node, grid.nodes, grid.local, first, worker)
        mine = self._share[: shares.length(grid.local_rank)]
        self._share[len(mine) :] = 0  # whatever the codec inside made of the padding
        return all_reduce_coder(mine, self._plan.codec, node, **self._plan.options)

    def _gather(self, worker: Worker) -> Coder:
        exact = Raw(str(self._plan.tensor.dtype)[6:])
        local = Worker(self._grid.local_rank, self._grid.local, worker.step, worker.threads)
        seed = self._plan.options["seed"]
        return all_gather_coder(self._padded, self._share, exact, local, seed=seed)

    def finish(self) -> None:
        """Copies the result back, where the shares have memory of their own."""
        flat = self._plan.tensor.view(-1)
        if self._shares.padded != flat.numel():
            flat.copy_(self._padded[: flat.numel()])


# --------------------------------------------------------------------------- reduce-scatter


def part_first(place: int, numel: int, codec: Codec) -> int:
    """Place of a part's first element among those that a node's ranks get, for draws and ties.

    Each begins with a block of its own: no two draw alike, and parts of whole blocks are those of a
    flat call of the nodes.
    """
    unit = unit_of(codec)
    return place * -(-numel // unit) * unit


def by_place(data: Tensor, nodes: int, local: int) -> Tensor:
    """Parts [nodes, local, part] as [local, nodes, part]; copied where it must be."""
    return data.view(nodes, local, data.numel() // (nodes * local)).transpose(0, 1).contiguous()


class ReduceScatter:
    """The stages of a reduce-scatter (:class:`pydist.collectives.grid.Stages`).

    Inside, rank l gets the node's sum of the parts of all ranks with place l; across, these ranks
    reduce-scatter the parts. What is not finite at one place is told to all in the last stage.

    Args:
        grid: The groups.
        plan: What to do; its tensor is this rank's part.
        data: A part for every rank, node by node; contiguous.
    """

    def __init__(self, grid: Grid, plan: Plan, data: Tensor) -> None:
        self._grid, self._plan = grid, plan
        self.device, self.threads = data.device, plan.threads
        self._data = by_place(data, grid.nodes, grid.local)
        self._sums = data.new_empty(data.numel() // grid.local, dtype=torch.float32)

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage."""
        grid, plan = self._grid, self._plan
        if stage == INSIDE:
            return plan.inside_coder(grid, self._sums, self._data, worker), REDUCE_SCATTER
        if stage == ACROSS:
            first = part_first(grid.local_rank, plan.tensor.numel(), plan.codec)
            node = across_worker(grid.node, grid.nodes, grid.local, first, worker)
            self._scatter = reduce_scatter_coder(
                plan.tensor, self._sums, plan.codec, node, **plan.options
            )
            return self._scatter, REDUCE_SCATTER
        self._flags = Flags(self.device, self._scatter.not_finite)
        return self._flags, ALL_GATHER

    def finish(self) -> None:
        """Makes the part NaN where something was not finite, at whatever place."""
        fill_nan(self._plan.tensor, self._flags.not_finite)


class Flags(BareCoder):
    """Headers without data: the flags of all ranks.

    Args:
        device: Where the call's data is.
        known: int32, the flags that this rank knows of; ``None``: none so far.

    Attributes:
        not_finite: int32, the flags of all ranks; known when the call is complete.
    """

    codec, bits = wire.CODECS["raw"], 0
    units, unit_bytes = 1, 4

    def __init__(self, device: torch.device, known: Tensor | None = None) -> None:
        self._job = Job(Worker(0, 1, 0), False, 0, device)
        self.flags, self.all_flags = self._job.flags, self._job.all_flags
        if known is not None:
            self.flags.copy_(known.amax())
        self.not_finite = self.flags

    def message_bytes(self, units: int) -> int:
        """No bytes."""
        return 0

    reduced_bytes = message_bytes

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Nothing but the header, which is the exchange's."""

    decode = encode

    def finish(self, flags: Tensor) -> None:
        """Keeps the flags of all ranks."""
        self.not_finite = self._job.merged(flags)
