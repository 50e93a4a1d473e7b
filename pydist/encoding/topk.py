"""Top-k blocks on their way through the road.

The owner of a shard adds the entries of all ranks and selects from the sum as many again, so that a
rank sends 2 · (n - 1) / n payloads however many ranks there are. What it drops there is an owner's
to keep.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pydist.encoding.blocks import BlockCoder, GatherBlockCoder, ScatterBlockCoder, TensorBlockCoder
from pydist.formats import wire
from pydist.formats.topk import TopKFormat
from pydist.kernels import checks
from pydist.kernels.topk import Payloads, encode_args, run_decoder
from pydist.transport.coder import spoil


class TopKCoder(BlockCoder):
    """A tensor as top-k blocks; which blocks go where is up to the subclass. A unit is a block.

    Args:
        form: The format.
        codec: Number of the codec in a header.
        worker: This rank.
        **options: As of :class:`BlockCoder`.
    """

    form: TopKFormat  # type: ignore[assignment]

    def __init__(self, form: TopKFormat, codec: int, worker: Any, **options: Any) -> None:
        super().__init__(form, codec, worker, **options)  # type: ignore[arg-type]
        self.unit_bytes = form.block_bytes
        self._seed = options["seed"]

    def code_bytes(self, units: int) -> int:
        """Bytes of a row of ``units`` blocks; a tensor of less than that is as short as it is."""
        return min(units * self.form.block_bytes, self.form.payload_bytes(self.numel))

    def message_bytes(self, units: int) -> int:
        """Bytes of ``units`` blocks."""
        return self.code_bytes(units)

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where any rank's input was not finite."""
        spoil(self.result, flags.to(self.flags.device) | self.flags)

    # ----------------------------------------------------------------- kernels

    def _place(self, out: Tensor, units: int, used: int) -> object:
        """Where an encoder writes ``used`` of a row's ``units`` blocks; the others become zeros."""
        size = self.code_bytes(units)
        end = min(used * self.form.block_bytes, size)
        out[end:] = 0
        return encode_args(self.form, out.data_ptr(), end, seed=self._seed, step=self.worker.step)

    def _payloads(self, messages: Tensor, n: int, first: int) -> Payloads:
        """The rows of ``messages``, one a rank, with n elements from ``first`` on."""
        table = wire.one_segment(n)
        table[:, 3] = first
        return Payloads(messages.data_ptr(), messages.stride(0), len(messages), self.form, table)

    def quantize(
        self, x: Tensor, row: Tensor, units: int, span: tuple[int, int], ordinal: int = 0
    ) -> None:
        """Encodes a span of the blocks of segment ``x`` into a row of ``units`` blocks."""
        begin, end = span
        part = self._part(x, begin, end)
        place = self._place(row, units, end - begin)
        if part.numel():
            first = self.worker.first + begin * self.form.block
            rows = wire.one_row(part.data_ptr(), part.numel(), ordinal=ordinal, first=first)
            dtype = checks.FLOATS[str(x.dtype)[6:]]
            self._launch("topk_select", x, rows, dtype, place, self.flags.data_ptr())

    def dequantize(
        self, rows_of_ranks: Tensor, out: Tensor, units: int, span: tuple[int, int], divisor: int
    ) -> None:
        """Decodes a span of blocks, the sum of all rows over ``divisor``, into segment ``out``."""
        part = self._part(out, *span)
        if part.numel():
            source = self._payloads(rows_of_ranks, part.numel(), span[0] * self.form.block)
            run_decoder(
                self.target(out), "topk_scatter", wire.one_row(part.data_ptr(), part.numel()),
                checks.FLOATS[str(out.dtype)[6:]], source.native(divisor=divisor),
                payloads=source, flags=self.flags.data_ptr(), sums=source.ranks > 1,
            )  # fmt: skip

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Adds in rank order, divides for a mean, selects again."""
        place = self._place(out, units, end - begin)
        if end > begin:
            first = begin * self.form.block
            n = min(end * self.form.block, self.numel) - first
            source = self._payloads(messages, n, first)
            rows = wire.one_row(0, n, first=self.worker.first + first)
            run_decoder(
                self.target(messages), "topk_reduce", rows,
                source.native(divisor=self._divisor), place,
                payloads=source, flags=flags.data_ptr(), sums=True,
            )  # fmt: skip


class TensorTopKCoder(TensorBlockCoder, TopKCoder):
    """A tensor that is reduced over all ranks, in its place."""


class ScatterTopKCoder(ScatterBlockCoder, TopKCoder):
    """This rank's share of the sum of all ranks' tensors; every share is a segment of its own."""


class GatherTopKCoder(GatherBlockCoder, TopKCoder):
    """All ranks' tensors, one behind the other, as their bytes decode, the own one too."""
