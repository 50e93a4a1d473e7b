"""One call's data through a codec: reduced in place, scattered, or gathered.

Each is a coder (:class:`pydist.transport.coder.Coder`) of any codec on the wire
(:class:`pydist.encoding.rows.RowCodec`) and any plan (:class:`pydist.encoding.plans.Plan`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.plans import Plan, Residuals
from pydist.encoding.rows import OWN, WEIGHT, Job, RowCodec, dtype_of, fill_nan
from pydist.encoding.ternary import TernaryRows
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.transport.coder import BareCoder, EntropyCoder, Span, Worker, spans


class PlanCoder(BareCoder):
    """What all three share: sizes, scalers, one row of a message at a time.

    Args:
        rows: The codec on the wire.
        plan: Which elements travel.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of random draws.
        result: What the call overwrites, on the data's device.

    Attributes:
        entropy_coder: What shortens messages; ``None`` where nothing does.
        not_finite: int32, the flags of all ranks; known when the call is complete.
    """

    entropy_coder: EntropyCoder | None = None

    def __init__(
        self,
        rows: RowCodec,
        plan: Plan,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        result: Tensor,
    ) -> None:
        self.rows, self.plan, self.worker, self.result = rows, plan, worker, result
        self.job = Job(worker, mean, seed, result.device)
        self.codec, self.bits = rows.number, rows.bits
        self.units, self.unit_bytes = plan.units, rows.unit_bytes
        self.flags, self.all_flags = self.job.flags, self.job.all_flags
        self.agreed = rows.agreed
        self.message_bytes, self.reduced_bytes = rows.row_bytes, rows.reduced_bytes
        self.not_finite = self.flags

    def arriving(self, row: int, span: Span) -> IntArray:
        """Rows of the ``row``-th message that arrives here, in a span of units."""
        raise NotImplementedError

    def leaving(self, row: int, span: Span) -> IntArray:
        """Rows of the ``row``-th message that leaves, in a span of units."""
        raise NotImplementedError

    # ----------------------------------------------------------------- scalers

    def _inputs(self) -> Sequence[Tensor]:
        """Memory of the plan's parts, of what this rank contributes."""
        raise NotImplementedError

    def scales(self) -> Tensor | None:
        """The scalers of this rank's own segments, float32 as bytes."""
        if not isinstance(self.rows, TernaryRows) or not self.units:
            return None
        x, rows, segment = self.plan.whole(self._inputs())
        own = self.rows.find_scalers(self.job, x, rows, segment, len(self.plan.totals))
        return own.view(torch.uint8)

    def merge_scales(self, all_scales: Tensor) -> None:
        """Takes the largest scaler over ranks."""
        if isinstance(self.rows, TernaryRows):
            everyones = all_scales.view(torch.float32)
            if self.rows not in self.job.scalers:  # one that receives alone
                own = torch.zeros(
                    everyones.shape[1], dtype=torch.float32, device=self.result.device
                )
                self.job.scalers[self.rows] = own, own
            self.rows.share_scalers(self.job, everyones)

    # ----------------------------------------------------------------- messages

    def write(
        self,
        parts: Sequence[tuple[int, Tensor, Span]],
        messages: Tensor,
        units: int,
        residuals: Residuals | None = None,
        phase: int = OWN,
    ) -> None:
        """Encodes spans of parts into messages of ``units`` units, in one launch.

        Args:
            parts: For each message the part, its memory, and a span of its units.
            messages: uint8 [parts, bytes].
            units: Units of each message.
            residuals: What was lost of the parts before.
            phase: Of random draws.
        """
        tables = []
        for i, (part, x, span) in enumerate(parts):
            rows, kept = self.plan.addressed(part, x), 0
            if residuals is not None:
                self.plan.place_residuals(part, rows, residuals)
                kept = residuals.width
            self.rows.attach(self.job, rows, self.plan.segment[part])
            rows = self.plan.cut(rows, *span, (x.element_size(), kept))
            rows[:, wire.MESSAGE] = i * messages.stride(0)
            tables.append(rows)
        gaps = self.plan.gaps or any(end - begin < units for _, _, (begin, end) in parts)
        if gaps:
            messages.zero_()
        x = parts[0][1]
        self.rows.encode(
            self.job, x, np.concatenate(tables), dtype_of(x),
            self.rows.place(messages, units, zeroed=gaps), self.flags,
            state=None if residuals is None else residuals.dtype, phase=phase,
        )  # fmt: skip

    def read(self, part: int, out: Tensor, messages: Tensor, units: int, span: Span) -> None:
        """Decodes the sum of all ranks' messages into a span of a part's units."""
        source = self.rows.source(messages, units)
        rows, divisor = self.placed(part, out, span), self.job.divisor
        self.rows.decode(self.job, out, rows, dtype_of(out), source, divisor, self.job.seen)

    def placed(self, part: int, out: Tensor, span: Span) -> IntArray:
        """A part's rows in a span of units, with addresses."""
        rows = self.plan.addressed(part, out)
        self.rows.attach(self.job, rows, self.plan.segment[part])
        return self.plan.cut(rows, *span, (out.element_size(), 0))

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where any rank's input was not finite."""
        # A share alone may overflow: it stays infinite.
        self.not_finite = self.job.merged(flags, wire.FLAG_MALFORMED)
        fill_nan(self.result, self.not_finite)


class ReduceCoder(PlanCoder):
    """One part, reduced over all ranks in its place.

    Args:
        flat: float32, float16 or bfloat16, one-dimensional, contiguous; read, then overwritten.
        rows: The codec on the wire.
        plan: Which elements travel.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of random draws.
        part: Which part of the plan it is.
    """

    def __init__(
        self,
        flat: Tensor,
        rows: RowCodec,
        plan: Plan,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        part: int = 0,
    ) -> None:
        super().__init__(rows, plan, worker, mean=mean, seed=seed, result=flat)
        self.flat, self.part = flat, part

    def arriving(self, row: int, span: Span) -> IntArray:
        """All messages hold the same part."""
        return self.plan.cut(self.plan.rows[self.part], *span)

    leaving = arriving

    def _inputs(self) -> Sequence[Tensor]:
        return [self.flat]

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Each owner's units into the row that goes there."""
        pieces = spans(len(shards), units, begin, end)
        self.write([(self.part, self.flat, span) for span in pieces], shards, units)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Combines all ranks' messages of a shard."""
        rows = self.arriving(0, (begin, end))
        zero = end - begin < units or self.plan.gaps
        if zero:
            out.zero_()
        place = self.rows.reduced_place(out.unsqueeze(0), units, zeroed=zero)
        self.rows.reduce(self.job, rows, self.rows.source(messages, units), place, flags)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into their places."""
        source, tables = self.rows.reduced_source(shards, units), []
        for i, span in enumerate(spans(len(shards), units, begin, end)):
            rows = self.placed(self.part, self.flat, span)
            rows[:, wire.MESSAGE] = i * source.stride
            tables.append(rows)
        self.rows.decode_reduced(
            self.job, self.flat, np.concatenate(tables), dtype_of(self.flat), source, self.job.seen
        )

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where an input, or a value, was not finite."""
        fill_nan(self.result, self.job.merged(flags))


class EveryonesCoder(ReduceCoder):
    """One part that everyone sends to everyone, and reduces itself."""

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The part, for everyone."""
        self.write([(self.part, self.flat, (begin, end))], shards, units)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        self.read(self.part, self.flat, shards, units, (begin, end))


class ScatterCoder(PlanCoder):
    """This rank's part of the sum of all ranks' buffers.

    A unit is one of every part. Nothing is encoded again, so an owner has nothing to keep.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: A part for every rank, contiguous.
        rows: The codec on the wire.
        plan: Which elements travel, a part for each rank.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of random draws.
        residuals: What was lost of the plan's segments before; ``None`` without error feedback.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        rows: RowCodec,
        plan: Plan,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        residuals: Residuals | None = None,
    ) -> None:
        super().__init__(rows, plan, worker, mean=mean, seed=seed, result=output)
        self.unit_bytes *= worker.ranks
        self.flat = output.view(-1)
        self.inputs = data.view(worker.ranks, output.numel())
        self.residuals = residuals
        self.repeatable = residuals is None  # else encoding moves them

    def arriving(self, row: int, span: Span) -> IntArray:
        """This rank's part, of every rank."""
        return self.plan.cut(self.plan.rows[self.worker.rank], *span)

    def leaving(self, row: int, span: Span) -> IntArray:
        """The part of the rank that a message goes to."""
        return self.plan.cut(self.plan.rows[row], *span)

    def _inputs(self) -> Sequence[Tensor]:
        return list(self.inputs)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's part into the row that goes there."""
        parts = [(part, x, (begin, end)) for part, x in enumerate(self.inputs)]
        self.write(parts, shards, units, self.residuals)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        self.read(self.worker.rank, self.flat, shards, units, (begin, end))


class GatherCoder(PlanCoder):
    """All ranks' parts as their bytes decode, the own one too. A unit is one of every part.

    Args:
        output: A part for every rank: float32, float16 or bfloat16, contiguous; overwritten.
        data: This rank's part, contiguous; may be its part of ``output``.
        rows: The codec on the wire.
        plan: Which elements travel, a part for each rank.
        worker: This rank.
        seed: Seed of random draws.
        weights: They are weights, whose draws differ from those of their gradients.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        rows: RowCodec,
        plan: Plan,
        worker: Worker,
        *,
        seed: int,
        weights: bool = False,
    ) -> None:
        super().__init__(rows, plan, worker, mean=False, seed=seed, result=output)
        self.unit_bytes *= worker.ranks
        self.flat, self.outputs = data.view(-1), output.view(worker.ranks, data.numel())
        self._phase = WEIGHT if weights else OWN
        if rows.tail_bytes:
            self.message_bytes = self._with_tail

    def _with_tail(self, units: int) -> int:
        return self.rows.row_bytes(units) + self.rows.tail_bytes

    def arriving(self, row: int, span: Span) -> IntArray:
        """The part of the rank that a message comes from."""
        return self.plan.cut(self.plan.rows[row], *span)

    def leaving(self, row: int, span: Span) -> IntArray:
        """This rank's part, for everyone."""
        return self.arriving(self.worker.rank, span)

    def scales(self) -> Tensor | None:
        """Nothing is shared: a scaler travels behind what it is of."""
        return None

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's part, for everyone, and behind it its scaler where it has one."""
        rank, message = self.worker.rank, shards[:1]
        if isinstance(self.rows, TernaryRows):
            if self.rows not in self.job.scalers:
                rows, segment = self.plan.addressed(rank, self.flat), self.plan.segment[rank]
                segments = len(self.plan.totals)
                self.rows.find_scalers(self.job, self.flat, rows, segment, segments)
            message = message[:, : self.rows.row_bytes(units)]
            own = self.job.scalers[self.rows][0][rank : rank + 1]
            shards[0, message.shape[1] :] = own.view(torch.uint8)
        self.write([(rank, self.flat, (begin, end))], message, units, phase=self._phase)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's units into its part."""
        source, tables = self.rows.joined_source(shards, units), []
        tail = self.rows.row_bytes(units)
        # Scalers behind messages, in memory of their own: they may lie at any address there.
        scalers = shards[:, tail:].contiguous() if self.rows.tail_bytes else shards[:, :0]
        for part, out in enumerate(self.outputs):
            rows, widths = self.plan.addressed(part, out), (out.element_size(), 0)
            rows = self.plan.cut(rows, begin, end, widths)
            rows[:, wire.MESSAGE] = part * source.stride
            if self.rows.tail_bytes:
                rows[:, wire.MOMENTUM_OUT] = scalers[part].data_ptr()
            tables.append(rows)
        out = self.outputs[0]
        self.rows.decode(
            self.job, out, np.concatenate(tables), dtype_of(out), source, 1, self.job.seen
        )
