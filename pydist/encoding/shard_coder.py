"""Sharded parameters on the road: blocks and random draws belong to parameters, not to buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw, Ternary, TopK
from pydist.encoding.blocks import BlockCoder
from pydist.encoding.choose import all_gather_coder, number_of, reduce_scatter_coder
from pydist.encoding.raw import GatherRawCoder, ScatterRawCoder
from pydist.encoding.shard_layout import Layout, Residuals, ShardPlan, Shards
from pydist.encoding.shard_stage import ShardStage
from pydist.encoding.shard_ternary import ScatterShardTernaryCoder
from pydist.encoding.shard_topk import ScatterShardTopKCoder
from pydist.formats.blocks import BlockFormat
from pydist.formats.ternary import UNIT
from pydist.kernels import checks
from pydist.kernels.block_formats import EncodeOptions
from pydist.transport.coder import Coder, Worker, spoil

WEIGHT_PHASE = 2
"""Phase of a weight's draws, so that they differ from those of its gradient."""


class ShardCoder(BlockCoder):
    """What both directions share; a unit is a block of every rank's row.

    Args:
        plan: The parameters, as blocks of the format.
        form: The format.
        codec: Its number in a header.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
        result: What the call overwrites.
    """

    def __init__(
        self,
        plan: ShardPlan,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        result: Tensor,
    ) -> None:
        numel = plan.units * plan.block
        super().__init__(form, codec, worker, numel=numel, mean=mean, seed=seed, result=result)
        self.plan = plan
        self.unit_bytes *= worker.ranks

    def _write(
        self, rank: int, x: Tensor, row: Tensor, units: int, span: tuple[int, int],
        residuals: Residuals | None = None,
    ) -> None:  # fmt: skip
        """Encodes a span of the blocks of ``rank``'s row ``x`` into a row of a message."""
        if self.plan.gaps:
            row.zero_()
        room = self._room(row, units, span[1] - span[0], self._own)
        rows = self.plan.part(rank, x, *span, residuals)
        dtype, flags = checks.FLOATS[str(x.dtype)[6:]], self.flags.data_ptr()
        if residuals is None:
            self._launch("quantize", x, rows, dtype, room, flags)
        else:
            self._launch("quantize_feedback", x, rows, dtype, residuals.dtype, room, flags)

    def _read(
        self, rank: int, messages: Tensor, out: Tensor, units: int, span: tuple[int, int],
        divisor: int,
    ) -> None:  # fmt: skip
        """Decodes the sum of ``messages`` over ``divisor`` into ``rank``'s row ``out``."""
        rows = self.plan.part(rank, out, *span)
        source = self._source(messages, units, divisor)
        self._launch("dequantize", out, rows, checks.FLOATS[str(out.dtype)[6:]], source)


class ScatterShardCoder(ShardCoder):
    """This rank's row of the sum of all ranks' buffers.

    With residuals each rank encodes its gradient plus what was lost before, and keeps what is lost
    now. Nothing is encoded again, so there is nothing for an owner to keep.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten where there are shards.
        data: A row for every rank, contiguous.
        plan: The parameters, as blocks of the format.
        form: The format.
        codec: Its number in a header.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
        residuals: What was lost of the parameters before; ``None`` without error feedback.
        entropy: ``"elias"``: what is sent is Elias coded.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        plan: ShardPlan,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        residuals: Residuals | None = None,
        entropy: str | None = None,
    ) -> None:
        super().__init__(plan, form, codec, worker, mean=mean, seed=seed, result=output)
        self.flat = output.view(-1)
        self.inputs = data.view(worker.ranks, output.numel())
        self.residuals = residuals
        self.repeatable = residuals is None  # else encoding moves them
        if entropy == "elias":
            self.stage = ShardStage(self, plan)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's shards into the row that goes there."""
        for rank, (x, row) in enumerate(zip(self.inputs, shards, strict=True)):
            self._write(rank, x, row, units, (begin, end), self.residuals)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        messages = shards.to(self.flat.device)
        self._read(self.worker.rank, messages, self.flat, units, (begin, end), self._divisor)


class GatherShardCoder(ShardCoder):
    """All ranks' shards as their bytes decode, the own ones too.

    Args:
        output: A row for every rank, float32, float16 or bfloat16, contiguous; overwritten where
            there are shards.
        data: This rank's row, contiguous; may be its row of ``output``.
        plan: The parameters, as blocks of the format.
        form: The format.
        codec: Its number in a header.
        worker: This rank.
        seed: Seed of stochastic rounding.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        plan: ShardPlan,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        seed: int,
    ) -> None:
        super().__init__(plan, form, codec, worker, mean=False, seed=seed, result=output)
        rank, step = worker.rank, worker.step
        self._own = EncodeOptions((rank + step) % 2, seed, rank, WEIGHT_PHASE, step)
        self.flat = data.view(-1)
        self.outputs = output.view(worker.ranks, data.numel())

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's shards, for everyone."""
        self._write(self.worker.rank, self.flat, shards[0], units, (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's shards into its row."""
        messages = shards.to(self.outputs.device)
        for rank, out in enumerate(self.outputs):
            self._read(rank, messages[rank : rank + 1], out, units, (begin, end), 1)


# --------------------------------------------------------------------------- several kinds


class Packed:
    """Some parameters of a buffer side by side in memory of their own.

    Args:
        shards: The parameters.
        ranks: Rows of the buffer.
    """

    def __init__(self, shards: Sequence[Shards], ranks: int) -> None:
        self._places = [
            [(s.offset[rank], s.numel[rank]) for s in shards if s.numel[rank]]
            for rank in range(ranks)
        ]
        self.row = max((sum(n for _, n in places) for places in self._places), default=0)

    def _pairs(self, rank: int, x: Tensor, packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        at, ours, theirs = 0, [], []
        for offset, numel in self._places[rank]:
            ours.append(x[offset : offset + numel])
            theirs.append(packed[at : at + numel])
            at += numel
        return ours, theirs

    def take(self, rank: int, x: Tensor, packed: Tensor) -> None:
        """Copies from ``rank``'s row ``x`` of the buffer into ``packed``, zeros behind them."""
        ours, theirs = self._pairs(rank, x, packed)
        packed.zero_()
        if ours:
            torch._foreach_copy_(theirs, ours)

    def give(self, rank: int, x: Tensor, packed: Tensor) -> None:
        """Copies back."""
        ours, theirs = self._pairs(rank, x, packed)
        if ours:
            torch._foreach_copy_(ours, theirs)


class RawValues(Coder, Protocol):
    """A coder whose flags are also those of another."""

    flags: Tensor


class ShardedCoder:
    """All of a buffer: what is encoded, what travels raw in the first chunk, and padding.

    Args:
        coder: Encodes the first; it has a unit at least, as without one there is no first chunk.
        raw: The coder of the values that travel raw, in memory of their own.
        rows: Rows of its messages: one for each rank, or one for all.
        copy_back: What is in memory of its own: its place, the row of the buffer and whose it is,
            the memory.
        padding: Parts of the result that become zeros.
        result: What the call overwrites.
    """

    def __init__(
        self,
        coder: Coder,
        raw: RawValues | None,
        rows: int,
        copy_back: list[tuple[Packed, int, Tensor, Tensor]],
        padding: list[Tensor],
        result: Tensor,
    ) -> None:
        self._coder, self._raw, self._rows = coder, raw, rows
        self._copy_back, self._padding, self._result = copy_back, padding, result
        self.codec, self.bits = coder.codec, coder.bits
        self.units, self.unit_bytes = coder.units, coder.unit_bytes
        self.repeatable, self.flags = coder.repeatable, coder.flags
        self.message_bytes, self.reduced_bytes = coder.message_bytes, coder.reduced_bytes
        self.encode, self.reduce, self.decode = coder.encode, coder.reduce, coder.decode
        if raw is not None:
            raw.flags = coder.flags

    def __getattr__(self, name: str) -> Any:
        """What the road may ask of this coder beyond that."""
        return getattr(self._coder, name)

    def extra(self) -> Tensor | None:
        """The raw values, uint8 [rows, bytes]."""
        if self._raw is None:
            return None
        size = self._raw.message_bytes(self._raw.units)
        out = torch.empty((self._rows, size), dtype=torch.uint8, device=self.flags.device)
        self._raw.encode(out, self._raw.units, 0, self._raw.units)
        return out

    def merge_extra(self, extras: Tensor) -> None:
        """Decodes the raw values that all ranks have sent here, uint8 [ranks, bytes]."""
        assert self._raw is not None
        self._raw.decode(extras, self._raw.units, 0, self._raw.units)

    def finish(self, flags: Tensor) -> None:
        """Everything into its place; NaN everywhere where any rank's input was not finite."""
        self._coder.finish(flags)
        for packed, rank, x, values in self._copy_back:
            packed.give(rank, x, values)
        for part in self._padding:
            part.zero_()
        spoil(self._result, flags)


def blocks_of(codec: Codec) -> BlockFormat | None:
    """The format of codecs whose blocks lie by parameter; the others see one flat tensor.

    Of weights and of averages over replicas; of gradients all codecs with blocks, entropy coded or
    not, lie by parameter.
    """
    return None if getattr(codec, "entropy", None) is not None else codec.block_format


def scatter_coder(
    output: Tensor,
    data: Tensor,
    layout: Layout,
    codec: Codec,
    worker: Worker,
    *,
    mean: bool,
    seed: int,
    residuals: Residuals | None = None,
) -> Coder:
    """The coder of a reduce-scatter of sharded parameters.

    Args:
        output: This rank's row: float32, float16 or bfloat16, one-dimensional; overwritten.
        data: A row for every rank, of ``output``'s dtype, one-dimensional.
        layout: What the rows hold.
        codec: That of ``layout.coded``.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding.
        residuals: What was lost of ``layout.coded`` before, for codecs that can have some.
    """
    op, rank, n = "mean" if mean else "sum", worker.rank, layout.ranks
    rows = data.view(n, layout.row)
    coded, raw = Packed(layout.coded, n), Packed(layout.raw, n)
    if not coded.row or (isinstance(codec, Raw) and not raw.row):
        codec = codec if coded.row else Raw()
        return reduce_scatter_coder(output, data, codec, worker, op=op, ties="hash", seed=seed)
    back: list[tuple[Packed, int, Tensor, Tensor]] = []

    def apart(packed: Packed) -> tuple[Tensor, Tensor]:
        sent, received = data.new_empty((n, packed.row)), output.new_empty(packed.row)
        for i, (x, values) in enumerate(zip(rows, sent, strict=True)):
            packed.take(i, x, values)
        back.append((packed, rank, output, received))
        return received, sent

    inner: Coder
    if isinstance(codec, Ternary):
        plan = layout.plan(UNIT)
        inner = ScatterShardTernaryCoder(
            output, data, plan, codec.clip, worker, mean=mean, seed=seed
        )  # fmt: skip
    elif isinstance(codec, TopK):
        plan, topk = layout.plan(codec.block), codec.topk_format
        inner = ScatterShardTopKCoder(
            output, data, plan, topk, number_of(codec), worker, mean=mean, seed=seed,
            residuals=residuals,
        )  # fmt: skip
    elif (form := codec.block_format) is not None:
        inner = ScatterShardCoder(
            output, data, layout.plan(form.block), form, number_of(codec), worker, mean=mean,
            seed=seed, residuals=residuals, entropy=getattr(codec, "entropy", None),
        )  # fmt: skip
    else:
        inner = reduce_scatter_coder(*apart(coded), codec, worker, op=op, ties="hash", seed=seed)
    beside = None
    if raw.row:
        received, sent = apart(raw)
        beside = ScatterRawCoder(received, sent, str(data.dtype)[6:], worker, mean=mean)
    padding = [output[begin:end] for begin, end in layout.padding[rank]]
    return ShardedCoder(inner, beside, n, back, padding, output)


def gather_coder(
    output: Tensor, data: Tensor, layout: Layout, codec: Codec, worker: Worker, *, seed: int
) -> Coder:
    """The coder of an all-gather of sharded parameters; all ranks decode the same bytes.

    Args:
        output: A row for every rank: float32, float16 or bfloat16, one-dimensional; overwritten.
        data: This rank's row, one-dimensional; may be its row of ``output``.
        layout: What the rows hold.
        codec: That of ``layout.coded``.
        worker: This rank.
        seed: Seed of stochastic rounding.
    """
    rank, n = worker.rank, layout.ranks
    rows = output.view(n, layout.row)
    coded, raw = Packed(layout.coded, n), Packed(layout.raw, n)
    if not coded.row or (isinstance(codec, Raw) and not raw.row):
        codec = codec if coded.row else Raw()
        return all_gather_coder(output, data, codec, worker, seed=seed)
    back: list[tuple[Packed, int, Tensor, Tensor]] = []

    def apart(packed: Packed) -> tuple[Tensor, Tensor]:
        received, sent = output.new_empty((n, packed.row)), data.new_empty(packed.row)
        packed.take(rank, data, sent)
        back.extend((packed, i, x, received[i]) for i, x in enumerate(rows))
        return received, sent

    inner: Coder
    if (form := blocks_of(codec)) is not None:
        inner = GatherShardCoder(
            output, data, layout.plan(form.block), form, number_of(codec), worker, seed=seed
        )
    else:
        inner = all_gather_coder(*apart(coded), codec, worker, seed=seed)
    beside = None
    if raw.row:
        received, sent = apart(raw)
        beside = GatherRawCoder(received, sent, str(data.dtype)[6:], worker)
    padding = [rows[i, a:b] for i, gaps in enumerate(layout.padding) for a, b in gaps]
    return ShardedCoder(inner, beside, 1, back, padding, output)
