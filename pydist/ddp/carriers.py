"""How buckets travel: over one group of ranks, or on two levels of groups.

A carrier knows who encodes: on one level every rank its own gradients, on two levels every rank its
share of its node's sum. So a bucket is encoded by a function, which the carrier calls once what is
to be encoded is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.collectives.grid import ACROSS, INSIDE, Grid, HierarchicalCall, new_call_groups
from pydist.collectives.hierarchical import across_worker, inside_worker
from pydist.collectives.nodes import Groups
from pydist.ddp.layout import Layout
from pydist.encoding.bucket import BucketCoder
from pydist.encoding.levels import Rows
from pydist.training.kept import InNodes
from pydist.transport.call_group import CallGroup
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, Exchange, Route

Encode = Callable[[Tensor, Worker], BucketCoder]
"""From a buffer in a layout's plan, and who encodes it, to its coder."""


class Flagged(Protocol):
    """What knows after a call whether something was not finite."""

    @property
    def not_finite(self) -> Tensor:
        """int32, the flags of all ranks."""
        ...


OF_SHARES = {"loaded state"}
"""Fields of a bucket's call that the ranks of one node do not have alike."""


@dataclass(frozen=True)
class Sending:
    """A bucket on its way.

    Attributes:
        call: The call.
        flagged: Knows whether the bucket was finite on all ranks, once the call has ended.
    """

    call: Exchange | HierarchicalCall
    flagged: Flagged


class OneLevel:
    """Buckets over one group.

    Args:
        comm: Its communicator.

    Attributes:
        ranks: All ranks.
        levels: This rank's place; every rank is a node.
        key: What it was made of.
    """

    def __init__(self, comm: Communicator) -> None:
        self.key = self._comm = comm
        self.ranks = comm.world_size
        self.levels = InNodes(comm.rank, comm.world_size, 0, 1)

    def messages_on(self, device: torch.device) -> torch.device:
        """Where messages about data on a device are reduced."""
        return self._comm.device(device)

    def call_groups(self) -> list[CallGroup]:
        """Those of a new step."""
        return [CallGroup()]

    def start(
        self, call: Call, layout: Layout, flat: Tensor, encode: Encode, groups: list[CallGroup]
    ) -> Sending:
        """Encodes a bucket and sends it on its way."""
        comm, threads = self._comm, torch.get_num_threads()
        coder = encode(flat, Worker(comm.rank, comm.world_size, call.step, threads))
        exchange = Exchange(comm, coder, call, layout.algorithm, flat.device, groups[0])
        comm.submit(exchange)
        return Sending(exchange, coder)

    def refuse(self, call: Call, groups: list[CallGroup]) -> None:
        """Takes part in a bucket's agreement with its problem, so that every rank raises.

        Raises:
            PydistError: What all ranks raise.
        """
        self._comm.refuse(call, call_group=groups[0]).result()

    def catch_up(self) -> None:
        """See :meth:`Communicator.catch_up`."""
        self._comm.catch_up()


class TwoLevels:
    """Buckets on two levels.

    Args:
        grid: The groups.
        inner: The codec inside a node; ``None``: the bucket's own values.
        seed: Seed of its random draws.

    Attributes:
        ranks: All ranks.
        levels: This rank's place.
        key: What it was made of.
    """

    def __init__(self, grid: Grid, inner: Codec | None, seed: int) -> None:
        self.key = self._grid = grid
        self._inner, self._seed = inner or Raw(), seed
        self.ranks = grid.ranks
        self.levels = InNodes(grid.node, grid.nodes, grid.local_rank, grid.local)

    def messages_on(self, device: torch.device) -> torch.device:
        """Where messages about data on a device are reduced."""
        return self._grid.messages_on(device)

    def call_groups(self) -> list[CallGroup]:
        """Those of a new step, one for each stage."""
        return new_call_groups()

    def start(
        self, call: Call, layout: Layout, flat: Tensor, encode: Encode, groups: list[CallGroup]
    ) -> Sending:
        """Sends a bucket on its way; it is encoded when the node's sum is there."""
        stages = _Stages(self._grid, layout, flat, encode, (self._inner, self._seed))
        fields = dict(call.fields)
        across = {name: fields.pop(name) for name in OF_SHARES & fields.keys()}
        sent = HierarchicalCall(
            self._grid, call.name, fields, call.step, stages,
            across=across, known=call.known, call_groups=groups,
        )  # fmt: skip
        self._grid.start(sent)
        return Sending(sent, stages)

    def refuse(self, call: Call, groups: list[CallGroup]) -> None:
        """Takes part in all stages' agreements with a problem, so that every rank raises.

        Raises:
            PydistError: What all ranks raise.
        """
        refusing = HierarchicalCall(
            self._grid, call.name, {}, call.step, None, call.problem, call_groups=groups
        )
        self._grid.start(refusing)
        refusing.wait()

    def catch_up(self) -> None:
        """See :meth:`Communicator.catch_up`."""
        self._grid.catch_up()


Carrier = OneLevel | TwoLevels


def place_in(levels: Groups) -> InNodes:
    """This rank's place in two levels of groups."""
    across, inside = levels
    return InNodes(dist.get_rank(across), across.size(), dist.get_rank(inside), inside.size())


class _Stages:
    """What a bucket does in each stage (:class:`pydist.collectives.grid.Stages`).

    Args:
        grid: The groups.
        layout: The bucket's layout.
        flat: Its buffer; read, then overwritten.
        encode: Makes the coder of this rank's row.
        inner: The codec inside a node, and the seed of its draws.
    """

    def __init__(
        self, grid: Grid, layout: Layout, flat: Tensor, encode: Encode, inner: tuple[Codec, int]
    ) -> None:
        assert layout.rows is not None
        self._grid, self._encode, self._inner = grid, encode, inner
        self._flat, self._algorithm = flat, layout.algorithm
        self._plan: Rows = layout.rows
        self.device, self.threads = flat.device, torch.get_num_threads()
        self._rows = self._plan.split(flat)
        self._row = flat.new_empty(self._plan.length, dtype=self._plan.dtype)

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage."""
        grid, (inner, seed) = self._grid, self._inner
        if stage == INSIDE:
            inside = inside_worker(grid.node, grid.local_rank, grid.nodes, grid.local, worker)
            coder = self._plan.scatter_coder(self._row, self._rows, inner, inside, seed=seed)
            return coder, REDUCE_SCATTER
        if stage == ACROSS:
            node = across_worker(grid.node, grid.nodes, grid.local, 0, worker)
            return self._encode(self._row, node), self._algorithm
        local = Worker(grid.local_rank, grid.local, worker.step, worker.threads)
        self._gather = self._plan.gather_coder(self._rows, self._row, local, seed=seed)
        return self._gather, ALL_GATHER

    @property
    def not_finite(self) -> Tensor:
        """int32, the flags of all ranks; known when the call is complete.

        What was not finite anywhere has become NaN in some share of every node, so those who gather
        the shares know.
        """
        return self._gather.not_finite

    def finish(self) -> None:
        """Puts the shares back into the bucket, and lets go of them."""
        self._plan.join(self._rows, self._flat)
        del self._rows, self._row, self._encode
