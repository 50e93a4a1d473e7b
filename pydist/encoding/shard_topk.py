"""Gradients of sharded parameters as top-k blocks: every shard has blocks of its own."""

from __future__ import annotations

from torch import Tensor

from pydist.encoding.shard_layout import Residuals, ShardPlan
from pydist.encoding.topk import TopKCoder
from pydist.formats import wire
from pydist.formats.topk import TopKFormat
from pydist.kernels import checks
from pydist.kernels.topk import Payloads, run_decoder
from pydist.transport.coder import Worker


class ScatterShardTopKCoder(TopKCoder):
    """This rank's row of the sum of all ranks' buffers. A unit is a block of every rank's row.

    A short block, the last one of a shard, has the room of a whole one, and zeros behind its bytes.
    Nothing is selected again, so there is nothing for an owner to keep.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten where there are shards.
        data: A row for every rank, contiguous.
        plan: The parameters, as blocks of the format.
        form: The format.
        codec: Its number in a header.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of the order of ties.
        residuals: What was not sent of the parameters before; ``None`` without error feedback.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        plan: ShardPlan,
        form: TopKFormat,
        codec: int,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        residuals: Residuals | None = None,
    ) -> None:
        numel = plan.units * form.block
        super().__init__(form, codec, worker, numel=numel, mean=mean, seed=seed, result=output)
        self.unit_bytes *= worker.ranks
        self.plan, self.residuals = plan, residuals
        self.flat = output.view(-1)
        self.inputs = data.view(worker.ranks, output.numel())
        self.repeatable = residuals is None  # else encoding moves them

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's shards into the row that goes there."""
        raised, kept = self.flags.data_ptr(), self.residuals
        for rank, (x, row) in enumerate(zip(self.inputs, shards, strict=True)):
            if self.plan.gaps:
                row.zero_()
            place = self._place(row, units, end - begin)
            rows = self.plan.part(rank, x, begin, end, kept)
            dtype = checks.FLOATS[str(x.dtype)[6:]]
            if kept is None:
                self._launch("topk_select", x, rows, dtype, place, raised)
            else:
                self._launch("topk_feedback", x, rows, dtype, kept.dtype, place, raised)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Adds entries in rank order, divides for a mean; zeros between them."""
        messages = shards.to(self.flat.device)
        rows = self.plan.part(self.worker.rank, self.flat, begin, end)
        table = rows[:, [wire.WORD, wire.N, wire.ORDINAL, wire.FIRST]]
        table[:, 0] *= self.form.block
        source = Payloads(messages.data_ptr(), messages.stride(0), len(messages), self.form, table)
        run_decoder(
            self.target(self.flat), "topk_scatter", rows,
            checks.FLOATS[str(self.flat.dtype)[6:]], source.native(divisor=self._divisor),
            payloads=source, flags=self.flags.data_ptr(), sums=source.ranks > 1,
        )  # fmt: skip
