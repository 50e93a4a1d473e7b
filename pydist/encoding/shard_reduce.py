"""A rank's shards, reduced over replicas of the model: all-reduce across nodes."""

from __future__ import annotations

from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.encoding.choose import all_reduce_coder, number_of
from pydist.encoding.raw import RawCoder
from pydist.encoding.shard_coder import Packed, ShardCoder, ShardedCoder, blocks_of
from pydist.encoding.shard_layout import Layout, ShardPlan
from pydist.formats import wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.transport.coder import Coder, Worker, spans


class ReduceShardCoder(ShardCoder):
    """One row of sharded parameters, averaged over replicas in its place. A unit is a block.

    Args:
        flat: float32, float16 or bfloat16, contiguous; read, then overwritten.
        row: Which row of the plan it is: this rank's place among those that share the model.
        plan: The parameters, as blocks of the format.
        form: The format.
        codec: Its number in a header.
        worker: This rank's place among the replicas.
        seed: Seed of stochastic rounding.
    """

    def __init__(
        self,
        flat: Tensor,
        row: int,
        plan: ShardPlan,
        form: BlockFormat,
        codec: int,
        worker: Worker,
        *,
        seed: int,
    ) -> None:
        super().__init__(plan, form, codec, worker, mean=True, seed=seed, result=flat)
        self.unit_bytes = form.block_bytes + SCALE_BYTES
        self.flat, self.row = flat, row

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Each owner's blocks into the row that goes there."""
        for row, span in zip(shards, spans(len(shards), units, begin, end), strict=True):
            self._write(self.row, self.flat, row, units, span)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Decodes, sums in rank order, divides, encodes again."""
        if self.plan.gaps:
            out.zero_()
        room = self._room(out, units, end - begin, self._reduced)
        rows = self.plan.rows[self.row].copy()
        rows[:, wire.X] = 0
        rows = self.plan.cut(rows, begin, end)
        source = self._source(messages, units, self._divisor)
        self._launch("reduce_quantized", messages, rows, source, room, flags.data_ptr())

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced blocks into their places."""
        shards = shards.to(self.flat.device)
        for i, span in enumerate(spans(len(shards), units, begin, end)):
            self._read(self.row, shards[i : i + 1], self.flat, units, span, 1)


class SharedRawCoder(RawCoder):
    """Values that everyone sends to everyone, and averages itself.

    Args:
        values: Read, then overwritten.
        worker: This rank.
    """

    def __init__(self, values: Tensor, worker: Worker) -> None:
        super().__init__(
            str(values.dtype)[6:], worker, numel=values.numel(), mean=True, result=values
        )
        self.values = values

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The values, for everyone."""
        self.write(self.values, shards[0], (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides."""
        self.read(shards.to(self.values.device), self.values, (begin, end), self._divisor)


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

    inner: Coder
    if (form := blocks_of(codec)) is not None:
        plan = layout.plan(form.block)
        inner = ReduceShardCoder(flat, row, plan, form, number_of(codec), worker, seed=seed)
    else:
        inner = all_reduce_coder(apart(coded), codec, worker, **rest)  # type: ignore[arg-type]
    beside = SharedRawCoder(apart(raw), worker) if raw.row else None
    padding = [flat[begin:end] for begin, end in layout.padding[row]]
    return ShardedCoder(inner, beside, 1, back, padding, flat)
