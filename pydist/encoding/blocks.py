"""Blocks with a scale on the wire: in a row all codes, then all scales.

What an owner has reduced it encodes as rank 0 would, in phase 1, wherever the shard lies: so the
result depends neither on the number of shards nor on where chunks are cut.
"""

from __future__ import annotations

from torch import Tensor

from pydist.encoding.rows import OWN, REDUCED, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.block_formats import EncodeOptions, decode_args
from pydist.kernels.launch import DeviceRows


class BlockRows(RowCodec):
    """A format with blocks; a unit is a block.

    Args:
        form: The format.
        number: Number of the codec in a header.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            blocks.
    """

    def __init__(self, form: BlockFormat, number: int, numel: int | None = None) -> None:
        self.form, self.number, self.bits = form, number, form.bits
        self.unit = form.block
        self.unit_bytes = self.reduced_unit_bytes = form.block_bytes + SCALE_BYTES
        self._codes = None if numel is None else form.code_bytes(numel)

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of codes, and of scales."""
        codes = units * self.form.block_bytes
        return codes if self._codes is None else min(codes, self._codes), SCALE_BYTES * units

    def _native(self, job: Job, place: Place, phase: int) -> object:
        rank = 0 if phase == REDUCED else job.worker.draws
        step = job.worker.step
        options = EncodeOptions((rank + step) % 2, job.seed, rank, phase, step)
        return options.native(self.form, place.address(0), place.address(1), place.size)

    def _decode_args(self, source: Source, divisor: int) -> object:
        return decode_args(
            self.form, source.address(0), source.address(1), source.stride, source.ranks, divisor
        )

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
        """Codes and scales."""
        kernel, kinds = ("quantize", (dtype,)) if state is None else (
            "quantize_feedback", (dtype, state)
        )  # fmt: skip
        args = self._native(job, place, phase)
        job.launch(x, kernel, rows, *kinds, args, flags.data_ptr(), unit=self.unit)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Decodes, sums in rank order, divides for a mean, encodes again."""
        rows[:, wire.X] = 0
        job.launch(
            source.near, "reduce_quantized", rows, self._decode_args(source, job.divisor),
            self._native(job, place, REDUCED), flags.data_ptr(), unit=self.unit,
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
        """Codes times scales, added in rank order."""
        args = self._decode_args(source, divisor)
        job.launch(x, "dequantize", rows, dtype, args, unit=self.unit)
