"""Top-k blocks on the wire.

The owner of a shard adds the entries of all ranks and selects from the sum as many again, so that a
rank sends 2 · (n - 1) / n payloads however many ranks there are. What it drops there is an owner's
to keep. A short block has the room of a whole one, and zeros behind its bytes.
"""

from __future__ import annotations

from torch import Tensor

from pydist.encoding.rows import OWN, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.topk import TopKFormat
from pydist.formats.wire import IntArray
from pydist.kernels.launch import DeviceRows
from pydist.kernels.topk import Payloads, encode_args, run_decoder


class TopKRows(RowCodec):
    """The largest entries of every block, and where they are; a unit is a block.

    Args:
        form: The format.
        number: Number of the codec in a header.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            blocks.
    """

    def __init__(self, form: TopKFormat, number: int, numel: int | None = None) -> None:
        self.form, self.number, self.bits = form, number, form.bits
        self.unit = form.block
        self.unit_bytes = self.reduced_unit_bytes = form.block_bytes
        self._bytes = None if numel is None else form.payload_bytes(numel)

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of the blocks."""
        size = units * self.unit_bytes
        return (size if self._bytes is None else min(size, self._bytes),)

    def _native(self, job: Job, place: Place) -> object:
        step = job.worker.step
        return encode_args(self.form, place.address(), place.size, seed=job.seed, step=step)

    def _payloads(self, address: int, stride: int, ranks: int, rows: IntArray) -> Payloads:
        """Every rank's payload, of the blocks that ``rows`` say."""
        table = rows[:, [wire.WORD, wire.N, wire.ORDINAL, wire.FIRST]]
        table[:, 0] *= self.form.block
        return Payloads(address, stride, ranks, self.form, table, rows[:, wire.MESSAGE])

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray | DeviceRows,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """The largest entries."""
        kernel, kinds = ("topk_select", (dtype,)) if state is None else (
            "topk_feedback", (dtype, state)
        )  # fmt: skip
        args = self._native(job, place)
        job.launch(x, kernel, rows, *kinds, args, flags.data_ptr(), unit=self.unit)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Adds in rank order, divides for a mean, selects again."""
        rows[:, wire.X] = 0
        payloads = self._payloads(source.address(), source.stride, source.ranks, rows)
        run_decoder(
            job.target(source.near), "topk_reduce", rows,
            payloads.native(divisor=job.divisor), self._native(job, place),
            payloads=payloads, flags=flags.data_ptr(), sums=True,
        )  # fmt: skip

    def decode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        source: Source,
        divisor: int,
        flags: Tensor,
    ) -> None:
        """Adds entries in rank order; zeros between them."""
        payloads = self._payloads(source.address(), source.stride, source.ranks, rows)
        run_decoder(
            job.target(x), "topk_scatter", rows, dtype,
            payloads.native(divisor=divisor), payloads=payloads, flags=flags.data_ptr(),
            sums=payloads.ranks > 1,
        )  # fmt: skip

    def clear_sent(
        self, job: Job, x: Tensor, rows: IntArray, dtype: int, place: Place, flags: Tensor
    ) -> None:
        """Zeros where a place has entries: momentum factor masking."""
        payloads = self._payloads(place.address(), 0, 1, rows)
        run_decoder(
            job.target(x), "topk_scatter", rows, dtype,
            payloads.native(clear=True), payloads=payloads, flags=flags.data_ptr(), sums=False,
        )  # fmt: skip
