"""Rows of blocks on the wire as Elias codes; see :class:`pydist.transport.coder.EntropyCoder`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.blocks import BlockRows
from pydist.encoding.coders import PlanCoder
from pydist.encoding.rows import Job
from pydist.formats import elias, wire
from pydist.formats.blocks import BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.elias import native_args
from pydist.transport.coder import Span


class CodedBlocks:
    """Some blocks of a row, and the kernels between their fixed and their Elias-coded form.

    Args:
        form: Their format.
        rows: int64 [k, 9]; addresses are not used.
        code_bytes: Bytes of codes in the row; the scales follow.
    """

    def __init__(self, form: BlockFormat, rows: IntArray, code_bytes: int) -> None:
        self.form, self.code_bytes = form, code_bytes
        self.rows = wire.number_rows(rows.copy(), form.block)  # the table of streams goes by it
        self.table: IntArray = np.zeros((len(rows), 4), dtype=np.int64)
        self.table[:, 1] = rows[:, wire.N]

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most bytes of the Elias payload."""
        least = elias.head_bytes(self.table, self.form)
        return least, elias.longest_bytes(self.table, self.form)

    def payload_bytes(self, streams: int) -> int:
        """Bytes of the Elias payload whose streams have so many."""
        return elias.payload_bytes(self.table, self.form, streams)

    def launch(self, job: Job, kernel: str, row: Tensor, payload: Tensor, result: Tensor) -> None:
        """Runs ``elias_encode`` or ``elias_decode`` between a row and a payload."""
        if not len(self.rows):
            return
        args = native_args(
            self.form, (row.data_ptr(), self.code_bytes), payload.data_ptr(), payload.numel(),
            elias.count_blocks(self.table, self.form), result.data_ptr(),
        )  # fmt: skip
        job.launch(row, kernel, self.rows, args, unit=self.form.block)


class EliasCoder:
    """Makes rows of blocks of levels as short as their codes allow.

    A row of no blocks has no bytes; blocks that only some rows have do not travel. What an encoder
    leaves in its buffers is restored bit by bit.

    Args:
        coder: Whose rows they are.
        blocks: Its codec.
    """

    def __init__(self, coder: PlanCoder, blocks: BlockRows) -> None:
        self.coder, self.blocks = coder, blocks

    def _coded(self, rows: IntArray, units: int) -> CodedBlocks:
        return CodedBlocks(self.blocks.form, rows, self.blocks.columns(units)[0])

    def bounds(self, row: int, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of the ``row``-th message that arrives here."""
        return self._coded(self.coder.arriving(row, span), 0).bounds

    def most(self, row: int, span: Span) -> int:
        """Most bytes of the ``row``-th message that leaves."""
        return self._coded(self.coder.leaving(row, span), 0).bounds[1]

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The rows as they travel; on CUDA this waits for the device, to learn their lengths."""
        coded = [self._coded(self.coder.leaving(i, span), units) for i, span in enumerate(spans)]
        rooms = [rows.new_empty(one.bounds[1]) for one in coded]
        results = torch.zeros(len(rooms), dtype=torch.int64, device=rows.device)
        for one, row, room, result in zip(coded, rows, rooms, results, strict=True):
            one.launch(self.coder.job, "elias_encode", row, room, result)
        return [
            room[: one.payload_bytes(streams)]
            for one, room, streams in zip(coded, rooms, results.tolist(), strict=True)
        ]

    def unpack(
        self, messages: Sequence[Tensor], rows: Tensor, units: int, spans: Sequence[Span]
    ) -> tuple[int, str] | None:
        """Restores the rows; says which message is malformed, and why. Waits for the device."""
        results = torch.full((len(rows),), elias.NO_FAULT, dtype=torch.int64, device=rows.device)
        for i, (row, message, span) in enumerate(zip(rows, messages, spans, strict=True)):
            row.zero_()
            coded = self._coded(self.coder.arriving(i, span), units)
            coded.launch(self.coder.job, "elias_decode", row, message, results[i])
        return elias.first_fault(results.tolist())
