"""Ternary values on their way through the road.

Before anything is encoded the ranks exchange the scalers of their own layers (``prologue``) and
take the largest; trits of all ranks then add up to integers, which travel back as they are. So a
sum is exact, and depends on neither algorithm, shards nor chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.formats import ternary, wire
from pydist.formats.ternary import SUM_SEGMENT, UNIT, UNIT_BYTES
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.launch import LaunchTarget, launch
from pydist.kernels.ternary import (
    PAYLOADS,
    SUMS,
    WARP_UNITS,
    launch_reading,
    pack_args,
    scale_args,
    source_args,
)
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import NoPrologue, Worker, spans, spoil

SCALER_BYTES = 4


class TernaryCoder(NoPrologue):
    """Segments of a tensor as trits; what goes where is up to the subclass. A unit is 160 elements.

    Args:
        data: What this rank contributes: float32, float16 or bfloat16, contiguous.
        table: Its segments; each has a scaler of its own.
        clip: Deviations that magnitudes are held to, or ``None``.
        worker: This rank.
        units: Units of the call.
        mean: Divide sums by the number of ranks.
        seed: Seed of the draws.
        result: What the call overwrites, on the data's device.
    """

    codec = wire.CODECS["ternary"]
    repeatable = True

    def __init__(
        self,
        data: Tensor,
        table: IntArray,
        clip: float | None,
        worker: Worker,
        *,
        units: int,
        mean: bool,
        seed: int,
        result: Tensor,
    ) -> None:
        self.data, self.clip, self.worker, self.seed = data, clip or 0.0, worker, seed
        self.units, self.result = units, result
        self.bits = ternary.sum_bits(worker.ranks)
        self.unit_bytes = UNIT_BYTES
        self.divisor = worker.divisor if mean else 1
        self.rows = ternary.rows_of(table)
        self.rows[:, wire.FIRST] += worker.first
        wire.dense_addresses(self.rows, wire.X, data.data_ptr(), data.element_size())
        self.scalers = torch.zeros(len(table), dtype=torch.float32, device=data.device)
        self.shared = self.scalers
        self._place()
        self.flags = torch.zeros(1, dtype=torch.int32, device=data.device)
        self.seen = torch.zeros_like(self.flags)  # by what decodes
        self._cpu = LaunchTarget(threads=worker.threads)

    def _place(self) -> None:
        ternary.place_scalers(self.rows, self.scalers.data_ptr(), self.shared.data_ptr())

    def extra(self) -> Tensor | None:
        """No extra bytes."""
        return None

    def merge_extra(self, extras: Tensor) -> None:
        """Nothing to merge."""

    # ----------------------------------------------------------------- scalers

    def prologue(self) -> Tensor | None:
        """The scalers of this rank's own segments, float32 as bytes."""
        if not self.units:
            return None
        self.find_scalers()
        return self.scalers.view(torch.uint8)

    def merge_prologue(self, prologues: Tensor) -> None:
        """Takes the largest scaler over ranks; NaN where one is."""
        scalers = prologues.view(torch.float32).amax(0)
        self.shared = scalers.to(self.data.device)
        self._place()

    def find_scalers(self) -> None:
        """Runs the kernel over all segments."""
        rows = ternary.scale_rows(self.rows)
        size = ternary.scratch_bytes(rows)
        scratch = torch.empty(size, dtype=torch.uint8, device=self.data.device)
        launch(
            self.target(self.data), "ternary_scale", rows, self.dtype(self.data),
            scale_args(self.clip, scratch.data_ptr()), self.flags.data_ptr(),
            unit=SUM_SEGMENT,
        )  # fmt: skip

    # ----------------------------------------------------------------- kernels

    def target(self, x: Tensor) -> LaunchTarget:
        """Where kernels on ``x`` run, with the caller's number of CPU threads."""
        return target_of(x) if x.is_cuda else self._cpu

    @staticmethod
    def dtype(x: Tensor) -> int:
        """The dtype as kernels take it."""
        return checks.FLOATS[str(x.dtype)[6:]]

    def pack(self, rows: IntArray, message: Tensor, begin: int, end: int) -> None:
        """Encodes units ``begin`` … ``end`` of rows into a message, which is zero otherwise."""
        part = wire.cut_rows(rows, begin, end, (self.data.element_size(), 0), unit=UNIT)
        part[:, wire.WORD] -= begin
        if int((-(-part[:, wire.N] // UNIT)).sum()) * UNIT_BYTES < message.numel():
            message.zero_()  # units past the data, or between segments
        worker = self.worker
        args = pack_args(
            message.data_ptr(), message.numel(),
            seed=self.seed, rank=worker.rank, step=worker.step,
        )  # fmt: skip
        work = WARP_UNITS * UNIT
        launch(
            self.target(self.data), "ternary_pack", wire.number_rows(part, work),
            self.dtype(self.data), args, self.flags.data_ptr(), unit=work,
        )  # fmt: skip

    def unpack(
        self, kernel: str, source: Tensor, out: Tensor, rows: IntArray, size: int, what: str
    ) -> None:
        """Decodes what ``source`` holds, one row a rank or sums, into the rows of ``out``."""
        ranks = len(source) if kernel == "ternary_unpack" else self.worker.ranks
        args = source_args(source.data_ptr(), size, source.stride(0), ranks, self.divisor)
        launch_reading(
            self.target(out), kernel, rows, self.dtype(out), args,
            flags=self.seen.data_ptr(), what=what,
        )  # fmt: skip

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Of an all-reduce alone."""
        raise NotImplementedError

    def finish(self, flags: Tensor) -> None:
        """Overwrites the result with NaN where any rank's input was not finite."""
        spoil(self.result, flags.to(self.seen.device) | self.seen & wire.FLAG_MALFORMED)


class TensorTernaryCoder(TernaryCoder):
    """A tensor that is reduced over all ranks, in its place.

    Args:
        tensor: float32, float16 or bfloat16, contiguous; read, then overwritten.
        clip: Deviations that magnitudes are held to, or ``None``.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of the draws.
        table: Segments of the tensor, each a layer; default all of it is one.
    """

    def __init__(
        self,
        tensor: Tensor,
        clip: float | None,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        table: IntArray | None = None,
    ) -> None:
        table = wire.one_segment(tensor.numel()) if table is None else table
        super().__init__(
            tensor, table, clip, worker,
            units=ternary.table_units(table), mean=mean, seed=seed, result=tensor,
        )  # fmt: skip
        self._bytes = ternary.table_bytes(table)
        self._gaps = ternary.has_gaps(table)

    def message_bytes(self, units: int) -> int:
        """Bytes of the trits of ``units`` units; a tensor of less than a unit is shorter."""
        return min(units * UNIT_BYTES, self._bytes)

    def reduced_bytes(self, units: int) -> int:
        """Bytes of their sums."""
        return units * ternary.sum_unit_bytes(self.worker.ranks)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Each shard's units into its row."""
        for row, (first, last) in zip(shards, spans(len(shards), units, begin, end), strict=True):
            self.pack(self.rows, row, first, last)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Adds trits: exact, whatever the number of ranks."""
        if end - begin < units or self._gaps:
            out.zero_()
        rows = wire.cut_rows(self.rows, begin, end, unit=UNIT)
        rows[:, wire.WORD] -= begin
        source = source_args(
            messages.data_ptr(), self.message_bytes(units), messages.stride(0), len(messages), 1
        )
        launch_reading(
            self.target(messages), "ternary_sum", rows, source, out.data_ptr(),
            flags=flags.data_ptr(), what=PAYLOADS,
        )  # fmt: skip

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Sums times the scaler, divided for a mean."""
        shards = shards.to(self.data.device)
        for i, (first, last) in enumerate(spans(len(shards), units, begin, end)):
            width = (self.data.element_size(), 0)
            rows = wire.cut_rows(self.rows, first, last, width, unit=UNIT)
            rows[:, wire.WORD] -= first
            size = self.reduced_bytes(units)
            self.unpack("ternary_unpack_sums", shards[i : i + 1], self.data, rows, size, SUMS)

    def finish(self, flags: Tensor) -> None:
        """Overwrites everything with NaN where an input, or a value, was not finite."""
        spoil(self.result, flags.to(self.seen.device) | self.seen)


class ScatterTernaryCoder(TernaryCoder):
    """This rank's share of the sum of all ranks' tensors; every share is a segment of its own.

    A unit is one of every share.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: As many elements for every rank, contiguous.
        clip: Deviations that magnitudes are held to, or ``None``.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        output: Tensor,
        data: Tensor,
        clip: float | None,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
    ) -> None:
        self.numel = output.numel()
        table = wire.segments([self.numel] * worker.ranks, block=UNIT)
        super().__init__(
            data, table, clip, worker,
            units=ternary.units_for(self.numel), mean=mean, seed=seed, result=output,
        )  # fmt: skip
        self.unit_bytes = UNIT_BYTES * worker.ranks
        self.rows[:, wire.WORD] = 0  # each share is a message of its own

    def message_bytes(self, units: int) -> int:
        """Bytes of the trits of ``units`` units; a share of less than a unit is shorter."""
        return min(units * UNIT_BYTES, ternary.payload_bytes(self.numel))

    def reduced_bytes(self, units: int) -> int:
        """Nothing is reduced on the way."""
        return 0

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's share into the row that goes there."""
        for i, message in enumerate(shards):
            self.pack(self.rows[i : i + 1], message, begin, end)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Adds trits, times the scaler, divided for a mean."""
        shards = shards.to(self.result.device)
        flat, rank = self.result.view(-1), self.worker.rank
        part = flat[begin * UNIT : end * UNIT]
        rows = wire.one_row(part.data_ptr(), part.numel())
        rows[:, wire.MOMENTUM_OUT] = self.rows[rank, wire.MOMENTUM_OUT]
        size = self.message_bytes(units)
        self.unpack("ternary_unpack", shards, self.result, rows, size, PAYLOADS)


class GatherTernaryCoder(TernaryCoder):
    """All ranks' tensors, one behind the other, each with its own scaler behind its trits.

    A unit is one of every rank.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: This rank's tensor, contiguous.
        clip: Deviations that magnitudes are held to, or ``None``.
        worker: This rank.
        seed: Seed of the draws.
    """

    def __init__(
        self, output: Tensor, data: Tensor, clip: float | None, worker: Worker, *, seed: int
    ) -> None:
        self.numel = data.numel()
        super().__init__(
            data, wire.one_segment(self.numel), clip, worker,
            units=ternary.units_for(self.numel), mean=False, seed=seed, result=output,
        )  # fmt: skip
        self.unit_bytes = UNIT_BYTES * worker.ranks
        self._known = False

    def prologue(self) -> Tensor | None:
        """Nothing is shared."""
        return None

    def _trit_bytes(self, units: int) -> int:
        return min(units * UNIT_BYTES, ternary.payload_bytes(self.numel))

    def message_bytes(self, units: int) -> int:
        """Bytes of the trits of ``units`` units, and of the scaler."""
        return self._trit_bytes(units) + SCALER_BYTES

    def reduced_bytes(self, units: int) -> int:
        """Nothing is reduced on the way."""
        return 0

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's units and its scaler, for everyone."""
        if not self._known:
            self.find_scalers()
            self._known = True
        size = self._trit_bytes(units)
        self.pack(self.rows, shards[0, :size], begin, end)
        shards[0, size:] = self.scalers.view(torch.uint8)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's units into its place."""
        shards, size = shards.to(self.result.device), self._trit_bytes(units)
        for i, share in enumerate(self.result.view(self.worker.ranks, self.numel)):
            part = share[begin * UNIT : end * UNIT]
            rows = wire.one_row(part.data_ptr(), part.numel())
            rows[:, wire.MOMENTUM_OUT] = shards[i].data_ptr() + size
            self.unpack("ternary_unpack", shards[i : i + 1], part, rows, size, PAYLOADS)
