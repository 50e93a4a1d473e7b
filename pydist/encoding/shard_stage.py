"""Blocks of sharded gradients on the wire as Elias codes; see ``Stage`` in transport."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.blocks import BlockCoder
from pydist.encoding.shard_layout import ShardPlan
from pydist.formats import elias, wire
from pydist.formats.wire import IntArray
from pydist.kernels.elias import native_args
from pydist.kernels.launch import launch
from pydist.transport.coder import Span


class ShardStage:
    """Makes rows of blocks of levels as short as their codes allow, in a reduce-scatter.

    What is sent is a row for every rank, what arrives are rows of this rank's own shards. Blocks
    that only some rows have do not travel.

    Args:
        coder: Whose rows they are.
        plan: Its parameters.
    """

    def __init__(self, coder: BlockCoder, plan: ShardPlan) -> None:
        self.coder, self.form, self.plan = coder, coder.form, plan

    def _blocks(self, rank: int, span: Span) -> tuple[IntArray, IntArray]:
        """A rank's rows in some units, and their lengths as a segment table."""
        rows = self.plan.cut(self.plan.rows[rank], *span)
        table: IntArray = np.zeros((len(rows), 4), dtype=np.int64)
        table[:, 1] = rows[:, wire.N]
        return rows, table

    def bounds(self, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of a message that arrives here."""
        _, table = self._blocks(self.coder.worker.rank, span)
        return elias.head_bytes(table, self.form), elias.longest_bytes(table, self.form)

    def _launch(
        self,
        kernel: str,
        row: Tensor,
        units: int,
        message: Tensor,
        blocks: tuple[IntArray, IntArray],
        result: Tensor,
    ) -> None:
        rows, table = blocks
        if not len(rows):
            return
        args = native_args(
            self.form, (row.data_ptr(), self.coder.code_bytes(units)), message.data_ptr(),
            message.numel(), elias.count_blocks(table, self.form), result.data_ptr(),
        )  # fmt: skip
        launch(self.coder.target(row), kernel, rows, args, unit=self.form.block)

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The rows as they travel; on CUDA this waits for the device, to learn their lengths."""
        blocks = [self._blocks(rank, span) for rank, span in enumerate(spans)]
        rooms = [rows.new_empty(elias.longest_bytes(table, self.form)) for _, table in blocks]
        results = torch.zeros(len(rooms), dtype=torch.int64, device=rows.device)
        for i, (row, room, one) in enumerate(zip(rows, rooms, blocks, strict=True)):
            self._launch("elias_encode", row, units, room, one, results[i])
        return [
            room[: elias.payload_bytes(table, self.form, streams)]
            for room, (_, table), streams in zip(rooms, blocks, results.tolist(), strict=True)
        ]

    def unpack(
        self, messages: Sequence[Tensor], rows: Tensor, units: int, spans: Sequence[Span]
    ) -> tuple[int, str] | None:
        """Restores the rows; says which message is malformed, and why. Waits for the device."""
        results = torch.full((len(rows),), elias.NO_FAULT, dtype=torch.int64, device=rows.device)
        mine = self._blocks(self.coder.worker.rank, spans[0])
        for row, message, result in zip(rows, messages, results, strict=True):
            row.zero_()
            self._launch("elias_decode", row, units, message, mine, result)
        return elias.first_fault(results.tolist())
