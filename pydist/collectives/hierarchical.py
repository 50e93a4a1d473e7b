"""All-reduce on two levels: sums inside a node, compressed across nodes, gathered inside.

The stages of a call are those of :mod:`pydist.collectives.grid`; here a tensor is cut into shares
of equal length, whole blocks, one for each rank of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.collectives.grid import ACROSS, INSIDE, Grid
from pydist.encoding.choose import all_gather_coder, all_reduce_coder, reduce_scatter_coder, unit_of
from pydist.transport.coder import Coder, Worker
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


class AllReduce:
    """The stages of an all-reduce (:class:`pydist.collectives.grid.Stages`)."""

    def __init__(self, grid: Grid, plan: Plan) -> None:
        self._grid, self._plan = grid, plan
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
            return self._scatter(worker), REDUCE_SCATTER
        if stage == ACROSS:
            return self._across(worker), self._plan.algorithm
        return self._gather(worker), ALL_GATHER

    def _scatter(self, worker: Worker) -> Coder:
        grid, plan = self._grid, self._plan
        inside = inside_worker(grid.node, grid.local_rank, grid.nodes, grid.local, worker)
        options = {**plan.options, "op": "sum"}
        return reduce_scatter_coder(self._share, self._padded, plan.inner, inside, **options)

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
