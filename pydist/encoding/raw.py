"""Plain values on the wire: float sums in rank order, divided once, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.rows import OWN, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.launch import DeviceRows
from pydist.kernels.raw import sum_args

UNIT = wire.WORD_BITS
"""Elements that stay together; the rows of a message then start on 4 bytes."""


class RawRows(RowCodec):
    """Values as floats of one dtype; a unit is 32 elements.

    Args:
        dtype: Dtype on the wire: float32, float16 or bfloat16.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            units.
    """

    number = wire.CODECS["raw"]
    unit = UNIT

    def __init__(self, dtype: torch.dtype, numel: int | None = None) -> None:
        self.dtype, self.width = dtype, dtype.itemsize
        self.bits = 8 * self.width
        self.unit_bytes = self.reduced_unit_bytes = UNIT * self.width
        self._bytes = None if numel is None else 4 * wire.words_for(8 * numel * self.width)

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of the values."""
        size = units * self.unit_bytes
        return (size if self._bytes is None else min(size, self._bytes),)

    @property
    def _kind(self) -> int:
        return checks.FLOATS[str(self.dtype)[6:]]

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
        """The values, rounded to the wire's dtype, zeros behind them."""
        assert not isinstance(rows, DeviceRows)  # nothing is lost, so there are no residuals
        for message in [] if place.zeroed else np.unique(rows[:, wire.MESSAGE]).tolist():
            numel = int(rows[rows[:, wire.MESSAGE] == message, wire.N].sum())
            if numel * self.width < place.size:  # full but for its padding
                place.bytes(message)[numel * self.width :] = 0
        args = sum_args(0, out=place.address())
        job.launch(x, "sum_values", rows, dtype, self._kind, args, flags.data_ptr(), unit=UNIT)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Sums in rank order, divides for a mean, rounds to the wire's dtype."""
        n = place.size // self.width
        if not rows[:, wire.WORD].any():  # one run of elements, or none
            n = int(rows[:, wire.N].sum())
            if not place.zeroed:
                place.bytes()[n * self.width :] = 0
        to = wire.one_row(place.address(), n)
        args = sum_args(source.address(), source.stride, source.ranks, job.divisor)
        job.launch(
            source.near, "sum_values", to, self._kind, self._kind, args, flags.data_ptr(),
            unit=UNIT,
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
        """Sums in rank order, into their places."""
        args = sum_args(source.address(), source.stride, source.ranks, divisor)
        job.launch(x, "sum_values", rows, self._kind, dtype, args, 0, unit=UNIT)


class DoubleRows(RawRows):
    """float64 values, which no kernel takes; sums are float64."""

    @staticmethod
    def _runs(x: Tensor, rows: IntArray) -> Iterator[tuple[Tensor, int, int]]:
        """Every row's elements, where they begin in their message, and where that begins."""
        for address, n, word, message in rows[
            :, [wire.X, wire.N, wire.WORD, wire.MESSAGE]
        ].tolist():
            begin = (address - x.untyped_storage().data_ptr()) // 8
            yield x.as_strided((n,), (1,), begin), 8 * UNIT * word, message

    def _sum(self, messages: Iterable[Tensor], divisor: int) -> Tensor:
        """The sum of the values of messages, in order, divided."""
        total = torch.zeros(0, dtype=self.dtype, device="cpu")
        for i, message in enumerate(messages):  # their bytes start on 4, not on 8
            values = message.clone().view(self.dtype)
            total = total.add_(values) if i else values
        return total.div_(divisor)

    @staticmethod
    def _flag(flags: Tensor, values: Tensor) -> None:
        flags |= (~values.isfinite()).any().to(torch.int32) * wire.FLAG_NON_FINITE

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
        """The values, zeros behind them."""
        assert not isinstance(rows, DeviceRows)
        for values, at, message in self._runs(x, rows):
            self._flag(flags, values)
            place.bytes(message)[at : at + 8 * len(values)] = values.view(torch.uint8)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Sums in rank order, divides for a mean."""
        total = self._sum(source.rows(), job.divisor)
        self._flag(flags, total)
        place.bytes().copy_(total.view(torch.uint8))

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
        """Sums in rank order, into their places."""
        for values, at, message in self._runs(x, rows):
            read = source.rows() if source.ranks > 1 else source.bytes(message).unsqueeze(0)
            values.copy_(self._sum(read[:, at : at + 8 * len(values)], divisor))
