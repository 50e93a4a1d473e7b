"""Gradients of sharded parameters as trits; ranks share a scaler of each parameter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.shard_layout import ShardPlan
from pydist.encoding.ternary import TernaryCoder
from pydist.formats import wire
from pydist.formats.ternary import UNIT_BYTES
from pydist.formats.wire import IntArray
from pydist.kernels.ternary import PAYLOADS
from pydist.transport.coder import Worker


class ScatterShardTernaryCoder(TernaryCoder):
    """This rank's row of the sum of all ranks' buffers. A unit is one of every rank's row.

    The scaler is that of the whole parameter, its shards one behind the other: the ranks share
    them before anything is encoded. Trits are added by their owner and never encoded again.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten where there are shards.
        data: A row for every rank, contiguous.
        plan: The parameters, as units of trits.
        clip: Deviations that magnitudes are held to, or ``None``.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        plan: ShardPlan,
        clip: float | None,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
    ) -> None:
        table: IntArray = np.zeros((len(plan.totals), 4), dtype=np.int64)
        table[:, 1] = plan.totals
        super().__init__(
            data, table, clip, worker, units=plan.units, mean=mean, seed=seed, result=output
        )
        self.unit_bytes *= worker.ranks
        self.plan = plan
        self.flat = output.view(-1)
        self.inputs = data.view(worker.ranks, output.numel())

    def message_bytes(self, units: int) -> int:
        """Bytes of the trits of ``units`` units."""
        return units * UNIT_BYTES

    def reduced_bytes(self, units: int) -> int:
        """Nothing is reduced on the way."""
        return 0

    def find_scalers(self) -> None:
        """Runs the kernel over all parameters, whose shards are brought together for it."""
        whole = self.data.new_empty(int(self.plan.totals.sum()))
        starts = np.cumsum(self.plan.totals) - self.plan.totals
        ours, theirs = [], []
        for x, rows, index in zip(self.inputs, self.plan.rows, self.plan.index, strict=True):
            places = rows[:, [wire.X, wire.N]].tolist()
            for (at, numel), to in zip(places, starts[index].tolist(), strict=True):
                ours.append(x[at : at + numel])
                theirs.append(whole[to : to + numel])
            starts[index] += rows[:, wire.N]
        torch._foreach_copy_(theirs, ours)
        wire.dense_addresses(self.rows, wire.X, whole.data_ptr(), whole.element_size())
        super().find_scalers()

    def _rows(self, rank: int, x: Tensor) -> IntArray:
        """A rank's rows with the addresses of their elements in ``x``, and of their scalers."""
        rows, scalers = self.plan.addressed(rank, x), self.rows[self.plan.index[rank]]
        rows[:, wire.MOMENTUM] = scalers[:, wire.MOMENTUM]
        rows[:, wire.MOMENTUM_OUT] = scalers[:, wire.MOMENTUM_OUT]
        return rows

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's shards into the row that goes there."""
        for rank, (x, message) in enumerate(zip(self.inputs, shards, strict=True)):
            if self.plan.gaps:
                message.zero_()
            self.pack(self._rows(rank, x), message, begin, end)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Adds trits, times the scaler, divided for a mean."""
        messages, width = shards.to(self.flat.device), self.flat.element_size()
        rows = self.plan.cut(self._rows(self.worker.rank, self.flat), begin, end, (width, 0))
        self.unpack(
            "ternary_unpack", messages, self.flat, rows, self.message_bytes(units), PAYLOADS
        )
