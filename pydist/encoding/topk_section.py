"""Parameters of a bucket that travel as top-k blocks (:mod:`pydist.encoding.bucket_sections`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydist.encoding.bucket_sections import FLOAT32, Bucket, Feedback, launch
from pydist.encoding.shares import Part, Piece, Shares
from pydist.formats import wire
from pydist.formats.topk import TopKFormat
from pydist.formats.wire import IntArray
from pydist.kernels.checks import FLOATS
from pydist.kernels.topk import Payloads, encode_args, run_decoder


class TopKSection:
    """The largest entries of every block, and where they are. A unit is a block.

    A short block has the room of a whole one, and zeros behind its bytes.
    """

    def __init__(self, parts: Sequence[Part], indices: list[int], form: TopKFormat, owners: int):
        self.indices = indices
        self.form = form
        self.shares = Shares([parts[i] for i in indices], form.block, owners)
        self.unit_bytes = self.reduced_unit_bytes = form.block_bytes

    def _place(self, bucket: Bucket, out: Tensor) -> object:
        return encode_args(
            self.form, out.data_ptr(), out.numel(), seed=bucket.seed, step=bucket.worker.step
        )

    def _payloads(self, messages: Tensor, rows: IntArray) -> Payloads:
        """The rows of ``messages``, one a rank, which hold the blocks that ``rows`` say."""
        table = rows[:, [wire.WORD, wire.N, wire.ORDINAL, wire.FIRST]]
        table[:, 0] *= self.form.block
        return Payloads(messages.data_ptr(), messages.stride(0), len(messages), self.form, table)

    def _select(
        self,
        bucket: Bucket,
        near: Tensor,
        dtype: int,
        rows: IntArray,
        feedback: Feedback | None,
        place: object,
        flags: Tensor,
    ) -> None:
        """Encodes rows, with their residuals where there is ``feedback``."""
        block, raised = self.form.block, flags.data_ptr()
        if feedback is None:
            launch(bucket, near, "topk_select", rows, dtype, place, raised, unit=block)
            return
        kinds = dtype, FLOATS[feedback.dtype]
        launch(bucket, near, "topk_feedback", rows, *kinds, place, raised, unit=block)

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """The entries of all owners' shares in one pass, then dealt out to their rows."""
        blocks = torch.zeros(out.shape, dtype=torch.uint8, device=out.device)
        rows, place = bucket.addressed(piece.rows), self._place(bucket, blocks)
        if feedback is not None:
            feedback.place(rows, piece.part, owner=False)
            used = feedback.used[piece.part]
            fed, dtype = feedback.input_rows(rows[used], piece.part[used], bucket.dtype)
            self._select(bucket, out, dtype, fed, feedback, place, bucket.flags)
            rows = rows[~used]
            if feedback.masked is not None:
                masked = feedback.masked[piece.part[used]]
                self._clear(bucket, blocks, fed[masked], dtype)
        self._select(bucket, out, bucket.dtype, rows, None, place, bucket.flags)
        out.copy_(blocks)

    def _clear(self, bucket: Bucket, blocks: Tensor, rows: IntArray, dtype: int) -> None:
        """Zeros in the rows' elements where ``blocks`` have entries (momentum factor masking)."""
        rows = wire.number_rows(rows, self.form.block)
        payloads = self._payloads(blocks.view(1, -1), rows)
        run_decoder(
            bucket.target(blocks), "topk_scatter", rows, dtype, payloads.native(clear=True),
            payloads=payloads, flags=bucket.flags.data_ptr(), sums=False,
        )  # fmt: skip

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Adds entries in rank order, divides for a mean, adds the owner's residual, selects."""
        out.zero_()
        rows, place = piece.rows.copy(), self._place(bucket, out)
        payloads = self._payloads(messages, rows)
        source = payloads.native(divisor=bucket.divisor)
        target, raised = bucket.target(messages), flags.data_ptr()
        rows = wire.number_rows(rows, self.form.block)
        if feedback is None or feedback.owner is None:
            rows[:, wire.X] = 0
            run_decoder(
                target, "topk_reduce", rows, source, place,
                payloads=payloads, flags=raised, sums=True,
            )  # fmt: skip
            return
        total = messages.new_empty(int(rows[:, wire.N].sum()), dtype=torch.float32)
        wire.dense_addresses(rows, wire.X, total.data_ptr(), total.element_size())
        run_decoder(
            target, "topk_scatter", rows, FLOAT32, source,
            payloads=payloads, flags=raised, sums=payloads.ranks > 1,
        )  # fmt: skip
        feedback.place(rows, piece.part, owner=True)
        used = feedback.used_by_any[piece.part]
        self._select(bucket, messages, FLOAT32, rows[used], feedback, place, flags)
        self._select(bucket, messages, FLOAT32, rows[~used], None, place, flags)

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """The entries into their places, zeros between them."""
        line = shards.reshape(1, -1)
        rows = wire.number_rows(bucket.addressed(piece.rows), self.form.block)
        payloads = self._payloads(line, piece.rows)
        run_decoder(
            bucket.target(bucket.flat), "topk_scatter", rows, bucket.dtype, payloads.native(),
            payloads=payloads, flags=bucket.seen.data_ptr(), sums=False,
        )  # fmt: skip
