"""Parameters of a bucket that travel as trits (:mod:`pydist.encoding.bucket_sections`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydist.encoding.bucket_sections import Bucket, Feedback, launch
from pydist.encoding.shares import Part, Piece, Shares
from pydist.formats import ternary, wire
from pydist.formats.ternary import SUM_SEGMENT, UNIT, UNIT_BYTES
from pydist.formats.wire import IntArray
from pydist.kernels.ternary import (
    PAYLOADS,
    SUMS,
    WARP_UNITS,
    launch_reading,
    pack_args,
    scale_args,
    source_args,
)


class TernarySection:
    """Trits, and their exact sums; every parameter has a scaler, which the ranks share.

    A unit is 160 elements. The scalers of all the sections of a bucket travel in one prologue.

    Args:
        parts: The parts of the bucket.
        indices: Which of them the section has.
        clip: Deviations that magnitudes are held to, or ``None``.
        ranks: Ranks that take part.
        owners: How many of them own shares.
    """

    unit_bytes = UNIT_BYTES

    def __init__(
        self, parts: Sequence[Part], indices: list[int], clip: float | None, ranks: int, owners: int
    ) -> None:
        self.indices = indices
        self.clip = clip or 0.0
        mine = [parts[i] for i in indices]
        self.shares = Shares(mine, UNIT, owners)
        self.reduced_unit_bytes = ternary.sum_unit_bytes(ranks)
        self._whole = Shares(mine, UNIT, 1)  # scalers are of whole parameters

    def scalers(self, bucket: Bucket) -> Tensor:
        """This rank's own scaler of every parameter, float32."""
        found = torch.zeros(len(self.indices), dtype=torch.float32, device=bucket.flat.device)
        piece = self._whole.piece(0, 1, 1)
        rows = bucket.addressed(piece.rows)
        rows[:, wire.MOMENTUM] = found.data_ptr() + found.element_size() * piece.part
        rows = ternary.scale_rows(rows)
        size = ternary.scratch_bytes(rows)
        scratch = torch.empty(size, dtype=torch.uint8, device=found.device)
        args = scale_args(self.clip, scratch.data_ptr())
        launch(
            bucket, bucket.flat, "ternary_scale", rows, bucket.dtype, args,
            bucket.flags.data_ptr(), unit=SUM_SEGMENT,
        )  # fmt: skip
        return found

    def _rows(self, bucket: Bucket, piece: Piece) -> IntArray:
        """A piece's rows with the addresses of their elements and scalers."""
        rows = bucket.addressed(piece.rows)
        own, shared = bucket.scalers[self]
        rows[:, wire.MOMENTUM] = own.data_ptr() + own.element_size() * piece.part
        rows[:, wire.MOMENTUM_OUT] = shared.data_ptr() + shared.element_size() * piece.part
        return rows

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """The trits of all owners' shares in one pass, then dealt out to their rows."""
        trits = torch.zeros(out.shape, dtype=torch.uint8, device=out.device)
        worker = bucket.worker
        args = pack_args(
            trits.data_ptr(), trits.numel(),
            seed=bucket.seed, rank=worker.rank, step=worker.step,
        )  # fmt: skip
        launch(
            bucket, out, "ternary_pack", self._rows(bucket, piece), bucket.dtype, args,
            bucket.flags.data_ptr(), unit=WARP_UNITS * UNIT,
        )  # fmt: skip
        out.copy_(trits)

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Adds trits: exact, whatever the number of ranks."""
        out.zero_()
        size = piece.room * UNIT_BYTES
        source = source_args(messages.data_ptr(), size, messages.stride(0), len(messages), 1)
        launch_reading(
            bucket.target(messages), "ternary_sum", wire.number_rows(piece.rows.copy(), UNIT),
            source, out.data_ptr(), flags=flags.data_ptr(), what=PAYLOADS,
        )  # fmt: skip

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """Sums times the scaler, divided for a mean."""
        sums = shards.contiguous()
        source = source_args(
            sums.data_ptr(), sums.numel(), sums.numel(), bucket.worker.ranks, bucket.divisor
        )
        launch_reading(
            bucket.target(bucket.flat), "ternary_unpack_sums",
            wire.number_rows(self._rows(bucket, piece), UNIT), bucket.dtype, source,
            flags=bucket.seen.data_ptr(), what=SUMS,
        )  # fmt: skip
