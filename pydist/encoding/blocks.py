"""Blocks with a scale, on their way through the road.

What an owner has reduced it encodes as rank 0 would, in phase 1, wherever the shard lies: so the
result depends neither on the number of shards nor on where chunks are cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.formats import wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.kernels import block_formats, checks
from pydist.kernels.block_formats import EncodeOptions
from pydist.kernels.launch import LaunchTarget, launch
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import NoPrologue, Stage, Worker, spans, spoil


class BlockCoder(NoPrologue):
    """A tensor as blocks; which blocks go where is up to the subclass. A unit is a block.

    Args:
        form: The format.
        codec: Number of the codec in a header.
        worker: This rank.
        numel: Elements of a segment; every segment has its own blocks.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
        result: What the call overwrites, on the data's device.
    """

    repeatable = True
    stage: Stage | None = None

    def __init__(
        self,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        numel: int,
        mean: bool,
        seed: int,
        result: Tensor,
    ) -> None:
        self.form = form
        self.codec = codec
        self.bits = form.bits
        self.worker = worker
        self.numel = numel
        self.units = form.blocks(numel)
        self.unit_bytes = form.block_bytes + SCALE_BYTES
        self.result = result
        self.flags = torch.zeros(1, dtype=torch.int32, device=result.device)
        self._cpu = LaunchTarget(threads=worker.threads)
        self._divisor = worker.divisor if mean else 1
        rank, step = worker.rank, worker.step
        self._own = EncodeOptions((rank + step) % 2, seed, rank, 0, step)
        self._reduced = EncodeOptions(step % 2, seed, 0, 1, step)

    def code_bytes(self, units: int) -> int:
        """Bytes of codes in a row of ``units`` blocks; the scales follow."""
        # A tensor of less than a block travels as short as it is.
        return min(units * self.form.block_bytes, self.form.code_bytes(self.numel))

    def message_bytes(self, units: int) -> int:
        """Bytes of ``units`` blocks."""
        return self.code_bytes(units) + SCALE_BYTES * units

    def reduced_bytes(self, units: int) -> int:
        """Reduced blocks have the same format."""
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

    def target(self, x: Tensor) -> LaunchTarget:
        """Where kernels on ``x`` run."""
        return target_of(x) if x.is_cuda else self._cpu

    def clear(self, row: Tensor, units: int, used: int) -> None:
        """Zeros what a row of ``units`` blocks has beyond its first ``used``."""
        if used < units:
            codes = self.code_bytes(units)
            row[used * self.form.block_bytes : codes] = 0
            row[codes + SCALE_BYTES * used :] = 0

    def _part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """The elements of blocks ``begin`` … ``end`` of a flat segment."""
        return x[begin * self.form.block : end * self.form.block]

    def _room(self, out: Tensor, units: int, used: int, options: EncodeOptions) -> object:
        """Where an encoder writes ``used`` of a row's ``units`` blocks; the others become zeros."""
        codes = self.code_bytes(units)
        self.clear(out, units, used)
        return options.native(self.form, out.data_ptr(), out.data_ptr() + codes, codes)

    def _source(self, messages: Tensor, units: int, divisor: int) -> object:
        """Where decoders find the rows of ``messages``, one a rank."""
        address = messages.data_ptr()
        return block_formats.decode_args(self.form, address, address + self.code_bytes(units),
            messages.stride(0), len(messages), divisor,
        )  # fmt: skip

    def _launch(self, kernel: str, x: Tensor, rows: wire.IntArray, *args: object) -> None:
        launch(self.target(x), kernel, rows, *args, unit=self.form.block)

    def quantize(
        self, x: Tensor, row: Tensor, units: int, span: tuple[int, int], ordinal: int = 0
    ) -> None:
        """Encodes a span of the blocks of segment ``x`` into a row of ``units`` blocks."""
        begin, end = span
        part = self._part(x, begin, end)
        room = self._room(row, units, end - begin, self._own)
        if part.numel():
            first = self.worker.first + begin * self.form.block
            rows = wire.one_row(part.data_ptr(), part.numel(), ordinal=ordinal, first=first)
            dtype = checks.FLOATS[str(x.dtype)[6:]]
            self._launch("quantize", x, rows, dtype, room, self.flags.data_ptr())

    def dequantize(
        self, rows_of_ranks: Tensor, out: Tensor, units: int, span: tuple[int, int], divisor: int
    ) -> None:
        """Decodes a span of blocks, the sum of all rows over ``divisor``, into segment ``out``."""
        part = self._part(out, *span)
        if part.numel():
            rows = wire.one_row(part.data_ptr(), part.numel())
            source = self._source(rows_of_ranks, units, divisor)
            self._launch("dequantize", out, rows, checks.FLOATS[str(out.dtype)[6:]], source)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Decodes, sums in rank order, divides for a mean, encodes again."""
        room = self._room(out, units, end - begin, self._reduced)
        if end > begin:
            first = begin * self.form.block
            n = min(end * self.form.block, self.numel) - first
            rows = wire.one_row(0, n, first=self.worker.first + first)
            source = self._source(messages, units, self._divisor)
            self._launch("reduce_quantized", messages, rows, source, room, flags.data_ptr())


class TensorBlockCoder(BlockCoder):
    """A tensor that is reduced over all ranks, in its place.

    Args:
        tensor: float32, float16 or bfloat16, contiguous; read, then overwritten.
        form: The format.
        codec: Number of the codec in a header.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
    """

    def __init__(
        self,
        tensor: Tensor,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
    ) -> None:
        super().__init__(
            form, codec, worker, numel=tensor.numel(), mean=mean, seed=seed, result=tensor
        )
        self.flat = tensor.view(-1)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Each shard's blocks into its row."""
        for row, span in zip(shards, spans(len(shards), units, begin, end), strict=True):
            self.quantize(self.flat, row, units, span)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into their places."""
        shards = shards.to(self.flat.device)
        for i, span in enumerate(spans(len(shards), units, begin, end)):
            self.dequantize(shards[i : i + 1], self.flat, units, span, 1)


class ScatterBlockCoder(BlockCoder):
    """This rank's share of the sum of all ranks' tensors; every share is a segment of its own.

    A unit is a block of every share.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: As many elements for every rank, contiguous.
        form: The format.
        codec: Number of the codec in a header.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
    ) -> None:
        super().__init__(
            form, codec, worker, numel=output.numel(), mean=mean, seed=seed, result=output
        )
        self.unit_bytes *= worker.ranks
        self.flat, self.shares = output.view(-1), data.view(worker.ranks, output.numel())

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's share into the row that goes there."""
        for rank, (share, row) in enumerate(zip(self.shares, shards, strict=True)):
            self.quantize(share, row, units, (begin, end), ordinal=rank)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        shards = shards.to(self.flat.device)
        self.dequantize(shards, self.flat, units, (begin, end), self._divisor)


class GatherBlockCoder(BlockCoder):
    """All ranks' tensors, one behind the other, as their bytes decode, the own one too.

    A unit is a block of every rank.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: This rank's tensor, contiguous.
        form: The format.
        codec: Number of the codec in a header.
        worker: This rank.
        seed: Seed of stochastic rounding.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        seed: int,
    ) -> None:
        super().__init__(
            form, codec, worker, numel=data.numel(), mean=False, seed=seed, result=output
        )
        self.unit_bytes *= worker.ranks
        self.flat, self.shares = data.view(-1), output.view(worker.ranks, data.numel())

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's blocks, for everyone."""
        self.quantize(self.flat, shards[0], units, (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's blocks into its place."""
        shards = shards.to(self.shares.device)
        for i, share in enumerate(self.shares):
            self.dequantize(shards[i : i + 1], share, units, (begin, end), 1)
