"""One call's data through a codec: reduced in place, scattered, or gathered.

Each is a coder (:class:`pydist.transport.coder.Coder`) of any codec on the wire
(:class:`pydist.encoding.rows.RowCodec`) and any plan (:class:`pydist.encoding.plans.Plan`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydist.encoding.plans import Plan, Residuals
from pydist.encoding.rows import OWN, WEIGHT, Job, RowCodec, dtype_of
from pydist.encoding.ternary import TernaryRows
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.transport.coder import EntropyCoder, NoScales, Span, Worker, fill_nan, spans


class PlanCoder(NoScales):
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
    """

    repeatable = True
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
        self.flags, self.agreed = self.job.flags, rows.agreed
        self.message_bytes, self.reduced_bytes = rows.row_bytes, rows.reduced_bytes

    def metadata(self) -> Tensor | None:
        """No metadata bytes."""
        return None

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """Nothing to merge."""

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
        self, part: int, x: Tensor, row: Tensor, units: int, span: Span,
        residuals: Residuals | None = None, phase: int = OWN,
    ) -> None:  # fmt: skip
        """Encodes a span of a part's units into a row of ``units`` units, uint8 [bytes]."""
        begin, end = span
        rows, width, kept = self.plan.addressed(part, x), x.element_size(), 0
        if residuals is not None:
            self.plan.place_residuals(part, rows, residuals)
            kept = residuals.width
        self.rows.attach(self.job, rows, self.plan.segment[part])
        rows = self.plan.cut(rows, begin, end, (width, kept))
        zero = end - begin < units or self.plan.gaps
        place = self.rows.place(row.unsqueeze(0), units, zero=zero)
        self.rows.encode(
            self.job, x, rows, dtype_of(x), place, self.flags,
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

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Of an all-reduce alone."""
        raise NotImplementedError

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where any rank's input was not finite."""
        seen = self.job.seen & wire.FLAG_MALFORMED  # a share alone may overflow: it stays infinite
        fill_nan(self.result, flags.to(seen.device) | seen)


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
        rows = shards.unbind()
        for row, span in zip(rows, spans(len(rows), units, begin, end), strict=True):
            self.write(self.part, self.flat, row, units, span)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Combines all ranks' messages of a shard."""
        rows = self.arriving(0, (begin, end))
        place = self.rows.reduced_place(
            out.unsqueeze(0), units, zero=end - begin < units or self.plan.gaps
        )
        self.rows.reduce(self.job, rows, self.rows.source(messages, units), place, flags)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into their places."""
        shards = shards.to(self.flat.device)
        for i, span in enumerate(spans(shards.shape[0], units, begin, end)):
            source = self.rows.reduced_source(shards[i : i + 1], units)
            rows = self.placed(self.part, self.flat, span)
            self.rows.decode_reduced(
                self.job, self.flat, rows, dtype_of(self.flat), source, self.job.seen
            )

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where an input, or a value, was not finite."""
        fill_nan(self.result, flags.to(self.job.seen.device) | self.job.seen)


class EveryonesCoder(ReduceCoder):
    """One part that everyone sends to everyone, and reduces itself."""

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The part, for everyone."""
        self.write(self.part, self.flat, shards[0], units, (begin, end))

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        self.read(self.part, self.flat, shards.to(self.flat.device), units, (begin, end))


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
        for part, (x, row) in enumerate(zip(self.inputs, shards, strict=True)):
            self.write(part, x, row, units, (begin, end), self.residuals)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums in rank order, divides for a mean."""
        messages = shards.to(self.flat.device)
        self.read(self.worker.rank, self.flat, messages, units, (begin, end))


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
        rank, row = self.worker.rank, shards[0]
        if isinstance(self.rows, TernaryRows):
            if self.rows not in self.job.scalers:
                rows, segment = self.plan.addressed(rank, self.flat), self.plan.segment[rank]
                segments = len(self.plan.totals)
                self.rows.find_scalers(self.job, self.flat, rows, segment, segments)
            row = row[: self.rows.row_bytes(units)]
            own = self.job.scalers[self.rows][0][rank : rank + 1]
            shards[0, len(row) :] = own.view(torch.uint8)
        self.write(rank, self.flat, row, units, (begin, end), phase=self._phase)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's units into its part."""
        messages = shards.to(self.outputs.device)
        for part, out in enumerate(self.outputs):
            message = messages[part : part + 1]
            source = self.rows.source(message, units)
            rows, widths = self.plan.addressed(part, out), (out.element_size(), 0)
            rows = self.plan.cut(rows, begin, end, widths)
            if self.rows.tail_bytes:  # a copy: it may lie at any address
                scaler = message[0, self.rows.row_bytes(units) :].clone()
                rows[:, wire.MOMENTUM_OUT] = scaler.data_ptr()
            self.rows.decode(self.job, out, rows, dtype_of(out), source, 1, self.job.seen)
