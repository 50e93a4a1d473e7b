"""Ternary values on the wire, and their exact sums.

Before anything is encoded the ranks exchange the scalers of their own segments and take the
largest; trits of all ranks then add up to integers, which travel back as they are. So a sum is
exact, and depends on neither algorithm, shards nor chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.encoding.rows import OWN, Job, Place, RowCodec, Source, dtype_of
from pydist.formats import ternary, wire
from pydist.formats.ternary import SUM_SEGMENT, UNIT, UNIT_BYTES
from pydist.formats.wire import IntArray
from pydist.kernels.launch import DeviceRows
from pydist.kernels.ternary import (
    PAYLOADS,
    SUMS,
    WARP_UNITS,
    launch_reading,
    pack_args,
    scale_args,
    source_args,
)

SCALER_BYTES = 4


class TernaryRows(RowCodec):
    """Trits; a unit is 160 elements.

    Args:
        clip: Deviations that magnitudes are held to, or ``None``.
        ranks: Ranks that take part.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            units.
    """

    number = wire.CODECS["ternary"]
    unit, unit_bytes = UNIT, UNIT_BYTES
    tail_bytes = SCALER_BYTES

    def __init__(self, clip: float | None, ranks: int, numel: int | None = None) -> None:
        self.clip = clip
        self.bits = ternary.sum_bits(ranks)
        self.reduced_unit_bytes = ternary.sum_unit_bytes(ranks)
        self._bytes = None if numel is None else ternary.payload_bytes(numel)

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of the trits."""
        size = units * UNIT_BYTES
        return (size if self._bytes is None else min(size, self._bytes),)

    def reduced_columns(self, units: int) -> tuple[int, ...]:
        """Bytes of the sums."""
        return (units * self.reduced_unit_bytes,)

    # ----------------------------------------------------------------- scalers

    def find_scalers(
        self, job: Job, x: Tensor, rows: IntArray, segment: IntArray, segments: int
    ) -> Tensor:
        """This rank's own scaler of every segment, float32 [segments]; shared by none yet.

        Args:
            job: The call.
            x: What this rank contributes.
            rows: int64 [k, 9]: all of each segment, with addresses.
            segment: Which segment each row is.
            segments: How many there are.
        """
        own = torch.zeros(segments, dtype=torch.float32, device=x.device)
        job.scalers[self] = own, own
        rows[:, wire.MOMENTUM] = own.data_ptr() + own.element_size() * segment
        rows = ternary.scale_rows(rows)
        size = ternary.scratch_bytes(rows)
        scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
        args = scale_args(self.clip, scratch.data_ptr())
        job.launch(
            x, "ternary_scale", rows, dtype_of(x), args, job.flags.data_ptr(), unit=SUM_SEGMENT
        )
        return own

    def share_scalers(self, job: Job, everyones: Tensor) -> None:
        """Takes the largest scaler over ranks, float32 [ranks, segments]; NaN where one is."""
        own, _ = job.scalers[self]
        job.scalers[self] = own, everyones.amax(0).to(own.device)

    def attach(self, job: Job, rows: IntArray, segment: IntArray) -> None:
        """The addresses of the segments' scalers."""
        own, shared = job.scalers[self]
        rows[:, wire.MOMENTUM] = own.data_ptr() + own.element_size() * segment
        rows[:, wire.MOMENTUM_OUT] = shared.data_ptr() + shared.element_size() * segment

    # ----------------------------------------------------------------- kernels

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray | DeviceRows,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """Trits."""
        worker = job.worker
        args = pack_args(
            place.address(), place.size, seed=job.seed, rank=worker.draws, step=worker.step
        )
        job.launch(x, "ternary_pack", rows, dtype, args, flags.data_ptr(), unit=WARP_UNITS * UNIT)

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Adds trits: exact, whatever the number of ranks."""
        args = source_args(source.address(), source.size, source.stride, source.ranks, 1)
        launch_reading(
            job.target(source.near), "ternary_sum", rows, args,
            place.address(), flags=flags.data_ptr(), what=PAYLOADS,
        )  # fmt: skip

    def decode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        source: Source,
        divisor: int,
        flags: Tensor,
    ) -> None:
        """Sums of trits times the scaler."""
        args = source_args(source.address(), source.size, source.stride, source.ranks, divisor)
        launch_reading(
            job.target(x), "ternary_unpack", rows, dtype, args,
            flags=flags.data_ptr(), what=PAYLOADS,
        )  # fmt: skip

    def decode_reduced(
        self, job: Job, x: Tensor, rows: IntArray, dtype: int, source: Source, flags: Tensor
    ) -> None:
        """Sums times the scaler, divided for a mean."""
        ranks = job.worker.ranks
        args = source_args(source.address(), source.size, source.stride, ranks, job.divisor)
        launch_reading(
            job.target(x), "ternary_unpack_sums", rows, dtype, args,
            flags=flags.data_ptr(), what=SUMS,
        )  # fmt: skip
