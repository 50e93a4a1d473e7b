"""Plain values on the wire: float sums in rank order, divided once, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.encoding.rows import OWN, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
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

    def _side_by_side(self, x: Tensor, rows: IntArray, n: int) -> Tensor:
        """The rows' elements in their units, ``n`` in all; zeros between them."""
        line, base = x.new_zeros(n), x.data_ptr()
        places = rows[:, [wire.X, wire.N, wire.WORD]].tolist()
        begins = [(address - base) // x.element_size() for address, _, _ in places]
        if places:
            torch._foreach_copy_(
                [line[UNIT * word : UNIT * word + n] for _, n, word in places],
                [x[b : b + n] for b, (_, n, _) in zip(begins, places, strict=True)],
            )
        return line

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """The values, rounded to the wire's dtype, zeros behind them."""
        n, base = place.size // self.width, int(rows[0, wire.X]) if len(rows) else 0
        if len(rows) == 1 and rows[0, wire.WORD] == 0:
            n = int(rows[0, wire.N])
            place.bytes()[n * self.width :] = 0
        else:
            line = self._side_by_side(x, rows, n)
            base = line.data_ptr()
        to = wire.one_row(place.address(), n)
        args = sum_args(base, 0, 1, 1)
        job.launch(x, "sum_values", to, dtype, self._kind, args, flags.data_ptr(), unit=UNIT)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Sums in rank order, divides for a mean, rounds to the wire's dtype."""
        n = place.size // self.width
        if not rows[:, wire.WORD].any():  # one run of elements, or none
            n = int(rows[:, wire.N].sum())
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
    def _flag(flags: Tensor, values: Tensor) -> None:
        flags |= (~values.isfinite()).any().to(torch.int32) * wire.FLAG_NON_FINITE

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """The values, zeros behind them."""
        values = self._side_by_side(x, rows, place.size // self.width)
        self._flag(flags, values)
        place.bytes().copy_(values.view(torch.uint8))

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Sums in rank order, divides for a mean."""
        total = torch.zeros(0, dtype=torch.float32, device=source.near.device)
        for rank, message in enumerate(source.rows()):  # bytes of a message start on 4, not on 8
            values = message.clone().view(self.dtype)
            total = total.add_(values) if rank else values
        total.div_(job.divisor)
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
        """Reduced values into their places."""
        values = source.rows().reshape(-1).clone().view(self.dtype)
        for address, n, word in rows[:, [wire.X, wire.N, wire.WORD]].tolist():
            begin = (address - x.data_ptr()) // x.element_size()
            x[begin : begin + n] = values[UNIT * word : UNIT * word + n]
