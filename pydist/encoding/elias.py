"""Rows of blocks on the wire as Elias codes; see :class:`pydist.transport.coder.Stage`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydist.encoding.blocks import BlockCoder
from pydist.formats import blocks, elias, wire
from pydist.formats.wire import IntArray
from pydist.kernels.elias import native_args
from pydist.kernels.launch import launch
from pydist.transport.coder import Span


class EliasStage:
    """Makes rows of blocks of levels as short as their codes allow.

    A row of no blocks has no bytes. What an encoder leaves in its buffers is restored to the bit.

    Args:
        coder: Whose rows they are.
    """

    def __init__(self, coder: BlockCoder) -> None:
        self.coder, self.form = coder, coder.form

    def _table(self, span: Span) -> IntArray:
        begin, end = span
        block = self.form.block
        return wire.one_segment(max(min(end * block, self.coder.numel) - begin * block, 0))

    def bounds(self, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of a message of blocks ``begin`` … ``end``."""
        table = self._table(span)
        return elias.head_bytes(table, self.form), elias.longest_bytes(table, self.form)

    def _launch(
        self, kernel: str, row: Tensor, units: int, message: Tensor, span: Span, result: Tensor
    ) -> None:
        begin, end = span
        if begin == end:
            return
        rows = blocks.rows_of(self._table(span), self.form)
        args = native_args(
            self.form, (row.data_ptr(), self.coder.code_bytes(units)), message.data_ptr(),
            message.numel(), end - begin, result.data_ptr(),
        )  # fmt: skip
        launch(self.coder.target(row), kernel, rows, args, unit=self.form.block)

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The rows as they travel; on CUDA this waits for the device, to learn their lengths."""
        rooms = [rows.new_empty(self.bounds(span)[1]) for span in spans]
        results = torch.zeros(len(rooms), dtype=torch.int64, device=rows.device)
        for i, (row, room, span) in enumerate(zip(rows, rooms, spans, strict=True)):
            self._launch("elias_encode", row, units, room, span, results[i])
        return [
            room[: elias.payload_bytes(self._table(span), self.form, streams)]
            for room, span, streams in zip(rooms, spans, results.tolist(), strict=True)
        ]

    def unpack(
        self, messages: Sequence[Tensor], rows: Tensor, units: int, spans: Sequence[Span]
    ) -> tuple[int, str] | None:
        """Restores the rows; says which message is malformed, and why. Waits for the device."""
        results = torch.full((len(rows),), elias.NO_FAULT, dtype=torch.int64, device=rows.device)
        for i, (row, message, span) in enumerate(zip(rows, messages, spans, strict=True)):
            self.coder.clear(row, units, span[1] - span[0])
            self._launch("elias_decode", row, units, message, span, results[i])
        return elias.first_fault(results.tolist())
