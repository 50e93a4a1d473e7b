"""Sharded parameters on the wire: units and random draws belong to parameters, not to buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.encoding.blocks import BlockRows
from pydist.encoding.choose import (
    all_gather_coder,
    all_reduce_coder,
    reduce_scatter_coder,
    rows_of,
    with_entropy,
)
from pydist.encoding.coders import EveryonesCoder, GatherCoder, ReduceCoder, ScatterCoder
from pydist.encoding.custom import CustomRows
from pydist.encoding.plans import Layout, Plan, Residuals, Shards
from pydist.encoding.raw import RawRows
from pydist.encoding.rows import RowCodec, fill_nan
from pydist.encoding.signs import SignRows
from pydist.transport.coder import Coder, Worker


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
        """What else an exchange may ask of this coder."""
        return getattr(self._coder, name)

    def metadata(self) -> Tensor | None:
        """The raw values, uint8 [rows, bytes]."""
        if self._raw is None:
            return None
        size = self._raw.message_bytes(self._raw.units)
        out = torch.empty((self._rows, size), dtype=torch.uint8, device=self.flags.device)
        self._raw.encode(out, self._raw.units, 0, self._raw.units)
        return out

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """Decodes the raw values that all ranks have sent here, uint8 [ranks, bytes]."""
        assert self._raw is not None
        self._raw.decode(all_metadata, self._raw.units, 0, self._raw.units)

    def finish(self, flags: Tensor) -> None:
        """Everything into its place; NaN everywhere where any rank's input was not finite."""
        self._coder.finish(flags)
        for packed, rank, x, values in self._copy_back:
            packed.give(rank, x, values)
        for part in self._padding:
            part.zero_()
        fill_nan(self._result, flags)


def _by_parameter(coding: RowCodec) -> bool:
    """Whether a codec's units lie by parameter; of the others, parameters are one flat tensor."""
    return not isinstance(coding, RawRows | SignRows)


def _is_coded(codec: Codec) -> bool:
    return getattr(codec, "entropy", None) is not None


def _values(dtype: torch.dtype, numel: int, parts: int) -> tuple[RawRows, Plan]:
    """Values as they are, of so many parts."""
    coding = RawRows(dtype, numel)
    return coding, Plan.dense(numel, coding.unit, parts)


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

    coding = rows_of(codec, data.dtype, n)
    inner: Coder
    if _by_parameter(coding):
        coder = ScatterCoder(
            output, data, coding, layout.plan(coding.unit), worker, mean=mean, seed=seed,
            residuals=residuals,
        )  # fmt: skip
        inner = with_entropy(coder, codec)
    else:
        inner = reduce_scatter_coder(*apart(coded), codec, worker, op=op, ties="hash", seed=seed)
    beside = None
    if raw.row:
        received, sent = apart(raw)
        beside = ScatterCoder(
            received, sent, *_values(data.dtype, raw.row, n), worker, mean=mean, seed=seed
        )
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

    coding = rows_of(codec, data.dtype, n)
    inner: Coder
    if isinstance(coding, BlockRows | CustomRows) and not _is_coded(codec):
        plan = layout.plan(coding.unit)
        inner = GatherCoder(output, data, coding, plan, worker, seed=seed, weights=True)
    else:
        inner = all_gather_coder(*apart(coded), codec, worker, seed=seed)
    beside = None
    if raw.row:
        received, sent = apart(raw)
        beside = GatherCoder(received, sent, *_values(data.dtype, raw.row, n), worker, seed=seed)
    padding = [rows[i, a:b] for i, gaps in enumerate(layout.padding) for a, b in gaps]
    return ShardedCoder(inner, beside, 1, back, padding, output)


def reduce_coder(
    flat: Tensor, row: int, layout: Layout, codec: Codec, worker: Worker, *, seed: int
) -> Coder:
    """The coder of an average of a rank's shards over replicas of the model.

    Args:
        flat: This rank's row: float32, float16 or bfloat16, one-dimensional; overwritten.
        row: Which row of the layout it is.
        layout: What the rows hold.
        codec: That of ``layout.coded``.
        worker: This rank's place among the replicas.
        seed: Seed of stochastic rounding.
    """
    rest = {"op": "mean", "ties": "hash", "seed": seed}
    coded, raw = Packed(layout.coded, layout.ranks), Packed(layout.raw, layout.ranks)
    if not coded.row or (isinstance(codec, Raw) and not raw.row):
        return all_reduce_coder(flat, codec if coded.row else Raw(), worker, **rest)  # type: ignore[arg-type]
    back: list[tuple[Packed, int, Tensor, Tensor]] = []

    def apart(packed: Packed) -> Tensor:
        values = flat.new_empty(packed.row)
        packed.take(row, flat, values)
        back.append((packed, row, flat, values))
        return values

    coding = rows_of(codec, flat.dtype, worker.ranks)
    inner: Coder
    if isinstance(coding, BlockRows | CustomRows) and not _is_coded(codec):
        plan = layout.plan(coding.unit)
        inner = ReduceCoder(flat, coding, plan, worker, mean=True, seed=seed, part=row)
    else:
        inner = all_reduce_coder(apart(coded), codec, worker, **rest)  # type: ignore[arg-type]
    beside = None
    if raw.row:
        values = apart(raw)
        coding, plan = _values(flat.dtype, raw.row, 1)
        beside = EveryonesCoder(values, coding, plan, worker, mean=True, seed=seed)
    padding = [flat[begin:end] for begin, end in layout.padding[row]]
    return ShardedCoder(inner, beside, 1, back, padding, flat)
