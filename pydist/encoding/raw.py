"""Plain values on their way through the road: float32 sums in rank order, by the owner."""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.launch import LaunchTarget, launch
from pydist.kernels.raw import sum_args
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import NoPrologue, Worker, spans, spoil

UNIT = wire.WORD_BITS
"""Elements that stay together; the rows of a message then start on 4 bytes."""


class RawCoder(NoPrologue):
    """A tensor as floats of one dtype; which of them go where is up to the subclass.

    Args:
        dtype: Dtype on the wire.
        worker: This rank.
        numel: Elements of a segment.
        mean: Divide sums by the number of ranks.
        result: What the call overwrites, on the data's device.
    """

    codec = wire.CODECS["raw"]
    repeatable = True

    def __init__(
        self, dtype: str, worker: Worker, *, numel: int, mean: bool, result: Tensor
    ) -> None:
        self.worker = worker
        self.numel = numel
        self.units = -(-numel // UNIT)
        self.dtype = checks.FLOATS[dtype]
        self.width = checks.ITEMSIZE[dtype]
        self.bits = 8 * self.width
        self.unit_bytes = UNIT * self.width
        self.result = result
        self.flags = torch.zeros(1, dtype=torch.int32, device=result.device)
        self._cpu = LaunchTarget(threads=worker.threads)
        self._divisor = worker.divisor if mean else 1

    def message_bytes(self, units: int) -> int:
        """Bytes of ``units`` units; a tensor of less than that travels as short as it is."""
        whole = -(-self.numel * self.width // wire.WORD_BYTES) * wire.WORD_BYTES
        return min(units * UNIT * self.width, whole)

    def reduced_bytes(self, units: int) -> int:
        """Reduced values have the same dtype."""
        return self.message_bytes(units)

    def extra(self) -> Tensor | None:
        """No extra bytes."""
        return None

    def merge_extra(self, extras: Tensor) -> None:
        """Nothing to merge."""

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where any rank's input was not finite."""
        spoil(self.result, flags)

    # ----------------------------------------------------------------- kernels

    def _sum(
        self, values: Tensor, source: int, out: int, to: int, n: int, divisor: int, flags: int
    ) -> None:
        """Writes the sum of the rows of ``values`` over ``divisor`` to address ``out``."""
        if n:
            args = sum_args(values.data_ptr(), values.stride(0), len(values), divisor)
            target = target_of(values) if values.is_cuda else self._cpu
            launch(target, "sum_values", wire.one_row(out, n), source, to, args, flags)

    def _elements(self, span: tuple[int, int]) -> slice:
        """The elements of a span of units."""
        return slice(span[0] * UNIT, min(span[1] * UNIT, self.numel))

    def write(self, x: Tensor, row: Tensor, span: tuple[int, int]) -> None:
        """Rounds a span of the units of segment ``x`` into a row, the rest of which becomes 0."""
        part = x[self._elements(span)].unsqueeze(0)
        n = part.numel()
        row[n * self.width :] = 0
        dtype = checks.FLOATS[str(x.dtype)[6:]]
        self._sum(part, dtype, row.data_ptr(), self.dtype, n, 1, self.flags.data_ptr())

    def read(self, rows: Tensor, out: Tensor, span: tuple[int, int], divisor: int) -> None:
        """Writes the sum of all rows over ``divisor`` into a span of the units of ``out``."""
        part = out[self._elements(span)]
        dtype = checks.FLOATS[str(out.dtype)[6:]]
        self._sum(rows, self.dtype, part.data_ptr(), dtype, part.numel(), divisor, 0)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Sums in rank order, divides for a mean, rounds to the wire's dtype."""
        part = self._elements((begin, end))
        n = max(0, part.stop - part.start)
        out[n * self.width :] = 0
        self._sum(
            messages, self.dtype, out.data_ptr(), self.dtype, n, self._divisor, flags.data_ptr()
        )


class TensorRawCoder(RawCoder):
    """A tensor that is reduced over all ranks, in its place.

    Args:
        tensor: float32, float16 or bfloat16, contiguous; read, then overwritten.
        dtype: Dtype on the wire.
        worker: This rank.
        mean: Divide sums by the number of ranks.
    """

    def __init__(self, tensor: Tensor, dtype: str, worker: Worker, *, mean: bool) -> None:
        super().__init__(dtype, worker, numel=tensor.numel(), mean=mean, result=tensor)
        self.flat = tensor.view(-1)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Each shard's values into its row."""
        for row, span in zip(shards, spans(len(shards), units, begin, end), strict=True):
            self.write(self.flat, row, span)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into their places."""
        shards = shards.to(self.flat.device)
        for i, span in enumerate(spans(len(shards), units, begin, end)):
            self.read(shards[i : i + 1], self.flat, span, 1)


class ScatterRawCoder(RawCoder):
    """This rank's share of the sum of all ranks' tensors. A unit is that of every share.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: As many elements for every rank, contiguous.
        dtype: Dtype on the wire.
        worker: This rank.
        mean: Divide sums by the number of ranks.
    """

    def __init__(
        self, output: Tensor, data: Tensor, dtype: str, worker: Worker, *, mean: bool
    ) -> None:
        super().__init__(dtype, worker, numel=output.numel(), mean=mean, result=output)
        self.unit_bytes *= worker.ranks
        self.flat, self.shares = output.view(-1), data.view(worker.ranks, output.numel())

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's share into the row that goes there."""
        for share, row in zip(self.shares, shards, strict=True):
            self.write(share, row, (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        self.read(shards.to(self.flat.device), self.flat, (begin, end), self._divisor)


class GatherRawCoder(RawCoder):
    """All ranks' tensors, one behind the other. A unit is that of every rank.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: This rank's tensor, contiguous.
        dtype: Dtype on the wire.
        worker: This rank.
    """

    def __init__(self, output: Tensor, data: Tensor, dtype: str, worker: Worker) -> None:
        super().__init__(dtype, worker, numel=data.numel(), mean=False, result=output)
        self.unit_bytes *= worker.ranks
        self.flat, self.shares = data.view(-1), output.view(worker.ranks, data.numel())

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's values, for everyone."""
        self.write(self.flat, shards[0], (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's values into their place."""
        shards = shards.to(self.shares.device)
        for i, share in enumerate(self.shares):
            self.read(shards[i : i + 1], share, (begin, end), 1)
