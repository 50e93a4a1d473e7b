"""What a bucket holds of each codec: sections, which share its messages.

A section is the parameters that one codec encodes. It writes and reads its own bytes of a message;
where they stand is up to :mod:`pydist.encoding.bucket_coder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.shares import Part, Piece, Shares
from pydist.encoding.signs import VoteRule
from pydist.formats import wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels import block_formats, checks
from pydist.kernels.block_formats import EncodeOptions
from pydist.kernels.checks import FLOATS
from pydist.kernels.launch import LaunchTarget
from pydist.kernels.launch import launch as launch_kernel
from pydist.kernels.raw import sum_args
from pydist.kernels.signs import unpack_args, vote_args
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import Worker

FLOAT32 = FLOATS["float32"]
UNIT = wire.WORD_BITS
"""Elements of a unit of plain values."""


@dataclass
class Feedback:
    """Where a section's residuals are, by part.

    Attributes:
        worker: Address of each part's residual as if its element 0 were there.
        worker_out: Where the new one goes; equal for in place.
        owner: The same of what this rank keeps as the owner of a share; ``None`` without.
        owner_out: Where the new one goes.
        dtype: Storage of all of them.
        used: Whether this rank's gradient is anything but zeros.
        used_by_any: Whether any rank's is; known once all have said so.
        keep: What must stay in memory for the addresses to hold.
        values: Address of what is encoded instead of each part's gradient, of the residuals' type,
            as if its element 0 were there; ``None`` encodes the gradients in the bucket.
        masked: Where those values become zero as soon as a sparse codec has sent them.
    """

    worker: IntArray
    worker_out: IntArray
    owner: IntArray | None
    owner_out: IntArray | None
    dtype: str
    used: np.ndarray
    used_by_any: np.ndarray
    keep: list[Tensor] = field(default_factory=list)
    values: IntArray | None = None
    masked: np.ndarray | None = None

    def input_rows(self, rows: IntArray, part: IntArray, dtype: int) -> tuple[IntArray, int]:
        """The rows with the addresses of what is encoded with residuals, and its type.

        Args:
            rows: Rows that are used, with the addresses of their elements in the bucket.
            part: Which part each row is of.
            dtype: The bucket's type, as kernels count them.
        """
        if self.values is None:
            return rows, dtype
        rows = rows.copy()
        rows[:, wire.X] = self.values[part] + checks.ITEMSIZE[self.dtype] * rows[:, wire.FIRST]
        return rows, FLOATS[self.dtype]

    def place(self, rows: IntArray, part: IntArray, *, owner: bool) -> None:
        """Fills in where the rows' residuals are."""
        source, target = self.worker, self.worker_out
        if owner:
            assert self.owner is not None and self.owner_out is not None
            source, target = self.owner, self.owner_out
        skip = checks.ITEMSIZE[self.dtype] * rows[:, wire.FIRST]
        rows[:, wire.MOMENTUM] = source[part] + skip
        rows[:, wire.MOMENTUM_OUT] = target[part] + skip


@dataclass(frozen=True)
class Bucket:
    """One call's data, for all sections.

    Attributes:
        flat: The bucket's buffer, one-dimensional; read, then overwritten.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding and the tie hash.
        flags: int32[1], raised by what is encoded.
        seen: int32[1], raised by what is decoded, on all ranks alike.
        scalers: By section, this rank's and the shared scaler of each of its parameters, where it
            has any; float32.
    """

    flat: Tensor
    worker: Worker
    mean: bool
    seed: int
    flags: Tensor
    seen: Tensor
    scalers: dict[Section, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def divisor(self) -> int:
        """What sums over ranks are divided by."""
        return self.worker.ranks if self.mean else 1

    @property
    def dtype(self) -> int:
        """The buffer's type as kernels count them."""
        return FLOATS[str(self.flat.dtype)[6:]]

    def target(self, x: Tensor) -> LaunchTarget:
        """Where kernels on ``x`` run."""
        return target_of(x) if x.is_cuda else LaunchTarget(threads=self.worker.threads)

    def addressed(self, rows: IntArray) -> IntArray:
        """The rows, with the addresses of their elements in the buffer."""
        rows = rows.copy()
        rows[:, wire.X] *= self.flat.element_size()
        rows[:, wire.X] += self.flat.data_ptr()
        return rows


class Section(Protocol):
    """Parameters of one codec in a bucket.

    Attributes:
        indices: Which parts of the bucket they are.
        shares: How they are divided among the owners.
        unit_bytes: Bytes of a unit in a message.
        reduced_unit_bytes: Bytes of a unit after the reduction.
    """

    indices: list[int]
    shares: Shares
    unit_bytes: int
    reduced_unit_bytes: int

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """Writes a piece's bytes into ``out``, uint8 [owners, bytes], padding included."""
        ...

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Reduces one owner's ``piece``: uint8 [ranks, bytes] to uint8 [bytes], padding included.

        ``flags``, int32[1], is raised where the result is not finite.
        """
        ...

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """Writes a piece's values, from uint8 [owners, bytes], into the bucket."""
        ...


def launch(
    bucket: Bucket, near: Tensor, kernel: str, rows: IntArray, *args: object, unit: int
) -> None:
    """Calls a kernel on rows of ``unit`` elements a unit of work, where ``near`` is."""
    launch_kernel(bucket.target(near), kernel, wire.number_rows(rows, unit), *args, unit=unit)


# --------------------------------------------------------------------------- blocks


class BlockSection:
    """Blocks with a scale: in a row all codes, then all scales."""

    def __init__(
        self,
        parts: Sequence[Part],
        indices: list[int],
        form: BlockFormat,
        owners: int,
        entropy: str | None = None,
    ) -> None:
        self.indices = indices
        self.entropy = entropy
        self.form = form
        self.shares = Shares([parts[i] for i in indices], form.block, owners)
        self.unit_bytes = self.reduced_unit_bytes = form.block_bytes + SCALE_BYTES

    def _options(self, bucket: Bucket, phase: int) -> EncodeOptions:
        # What an owner has reduced it encodes as rank 0 would, whoever it is.
        rank = 0 if phase else bucket.worker.rank
        step = bucket.worker.step
        return EncodeOptions((rank + step) % 2, bucket.seed, rank, phase, step)

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """Codes and scales of all owners' shares in one pass, then dealt out to their rows."""
        owners, size = len(out), piece.room * self.form.block_bytes
        codes = out.new_zeros((owners, size))
        scales = out.new_zeros((owners, piece.room * SCALE_BYTES))
        room = self._options(bucket, 0).native(
            self.form, codes.data_ptr(), scales.data_ptr(), codes.numel()
        )
        rows, flags = bucket.addressed(piece.rows), bucket.flags.data_ptr()
        plain = rows
        if feedback is not None:
            feedback.place(rows, piece.part, owner=False)
            used = feedback.used[piece.part]
            fed, dtype = feedback.input_rows(rows[used], piece.part[used], bucket.dtype)
            launch(
                bucket, out, "quantize_feedback", fed, dtype,
                FLOATS[feedback.dtype], room, flags, unit=self.form.block,
            )  # fmt: skip
            plain = rows[~used]
        launch(bucket, out, "quantize", plain, bucket.dtype, room, flags, unit=self.form.block)
        out[:, :size] = codes
        out[:, size:] = scales

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Decodes, sums in rank order, divides for a mean, adds the owner's residual, encodes."""
        out.zero_()
        size, block = piece.room * self.form.block_bytes, self.form.block
        source = block_formats.decode_args(self.form, messages.data_ptr(),
            messages.data_ptr() + size, messages.stride(0), len(messages), bucket.divisor,
        )  # fmt: skip
        room = self._options(bucket, 1).native(
            self.form, out.data_ptr(), out.data_ptr() + size, size
        )
        rows, raised = piece.rows.copy(), flags.data_ptr()
        if feedback is None or feedback.owner is None:
            rows[:, wire.X] = 0
            launch(bucket, messages, "reduce_quantized", rows, source, room, raised, unit=block)
            return
        total = messages.new_empty(int(rows[:, wire.N].sum()), dtype=torch.float32)
        wire.dense_addresses(rows, wire.X, total.data_ptr(), total.element_size())
        launch(bucket, messages, "dequantize", rows, FLOAT32, source, unit=block)
        feedback.place(rows, piece.part, owner=True)
        used = feedback.used_by_any[piece.part]
        launch(
            bucket, messages, "quantize_feedback", rows[used], FLOAT32, FLOATS[feedback.dtype],
            room, raised, unit=block,
        )  # fmt: skip
        launch(bucket, messages, "quantize", rows[~used], FLOAT32, room, raised, unit=block)

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """Codes and scales of all owners side by side, then one pass."""
        size = piece.room * self.form.block_bytes
        codes, scales = shards[:, :size].contiguous(), shards[:, size:].contiguous()
        source = block_formats.decode_args(self.form, codes.data_ptr(), scales.data_ptr(), 0, 1, 1)
        rows = bucket.addressed(piece.rows)
        launch(bucket, bucket.flat, "dequantize", rows, bucket.dtype, source, unit=self.form.block)


# --------------------------------------------------------------------------- bare signs


class VoteSection:
    """Bare signs, counted: the mean, or the sum, of ±1. A unit is a payload word."""

    unit_bytes = wire.WORD_BYTES

    def __init__(self, parts: Sequence[Part], indices: list[int], ranks: int, owners: int):
        self.indices = indices
        self.shares = Shares([parts[i] for i in indices], wire.WORD_BITS, owners)
        self.planes = VoteRule(average=True).planes(ranks)
        self.reduced_unit_bytes = self.planes * wire.WORD_BYTES

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """Sign bits; zeros vote by the parity of rank + step."""
        payload = torch.zeros(out.shape, dtype=torch.uint8, device=out.device)
        zero_bit = (bucket.worker.rank + bucket.worker.step) % 2
        launch(
            bucket, out, "pack_signs", bucket.addressed(piece.rows), bucket.dtype,
            payload.data_ptr(), zero_bit, bucket.flags.data_ptr(), unit=wire.WORD_BITS,
        )  # fmt: skip
        out.copy_(payload)

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Counts the votes, as bit planes one behind the other."""
        out.zero_()
        size = piece.room * wire.WORD_BYTES
        args = vote_args(
            messages.data_ptr(), messages.stride(0), len(messages), out.data_ptr(), size,
            checks.TIES["hash"], bucket.seed, bucket.worker.step, 0,
        )  # fmt: skip
        launch(bucket, messages, "count_votes", piece.rows.copy(), args, unit=wire.WORD_BITS)

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """The counts as values."""
        planes = shards.reshape(len(shards), self.planes, -1).transpose(0, 1)
        planes = planes.reshape(self.planes, -1).contiguous()
        args = unpack_args(
            planes.data_ptr(), planes.stride(0), self.planes, bucket.worker.ranks, bucket.divisor
        )
        rows = bucket.addressed(piece.rows)
        launch(bucket, bucket.flat, "unpack_votes", rows, bucket.dtype, args, unit=wire.WORD_BITS)


# --------------------------------------------------------------------------- raw


class RawSection:
    """Values as they are, or in the type of a :class:`pydist.Raw`. A unit is 32 elements.

    Sums are float32, in rank order, divided once, and rounded once to the wire's type.
    """

    def __init__(
        self, parts: Sequence[Part], indices: list[int], dtype: torch.dtype, owners: int
    ) -> None:
        self.indices = indices
        self.shares = Shares([parts[i] for i in indices], UNIT, owners)
        self.dtype = dtype
        self.unit_bytes = self.reduced_unit_bytes = UNIT * dtype.itemsize

    def gathered(self, bucket: Bucket, owners: int, piece: Piece) -> Tensor:
        """A piece's values side by side, [owners, elements], zeros behind each owner's."""
        flat = bucket.flat
        values = flat.new_zeros((owners, piece.room * UNIT))
        line = values.view(-1)
        places = piece.rows[:, [wire.X, wire.N, wire.WORD]].tolist()
        if places:
            torch._foreach_copy_(
                [line[UNIT * word : UNIT * word + n] for _, n, word in places],
                [flat[x : x + n] for x, n, _ in places],
            )
        return values

    def _sum(
        self, bucket: Bucket, source: Tensor, rows: IntArray, to: int, divisor: int, flags: int
    ) -> None:
        """Writes the sum of the rows of ``source``, over ``divisor``, to where ``rows`` say."""
        args = sum_args(source.data_ptr(), source.stride(0), len(source), divisor)
        kinds = FLOATS[str(self.dtype)[6:]], to
        launch(bucket, source, "sum_values", rows, *kinds, args, flags, unit=UNIT)

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """The values, rounded to the wire's type, zeros behind them."""
        values = self.gathered(bucket, len(out), piece)
        sent = torch.empty(values.shape, dtype=self.dtype, device=out.device)
        args = sum_args(values.data_ptr(), 0, 1, 1)
        rows = wire.one_row(sent.data_ptr(), sent.numel())
        kinds = bucket.dtype, FLOATS[str(self.dtype)[6:]]
        flags = bucket.flags.data_ptr()
        launch(bucket, values, "sum_values", rows, *kinds, args, flags, unit=UNIT)
        out.copy_(sent.view(torch.uint8))

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Sums in rank order, divides for a mean, rounds to the wire's type."""
        rows = wire.one_row(out.data_ptr(), out.numel() // self.dtype.itemsize)
        kind = FLOATS[str(self.dtype)[6:]]
        self._sum(bucket, messages, rows, kind, bucket.divisor, flags.data_ptr())

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """The values into their places."""
        line = shards.reshape(1, -1)
        self._sum(bucket, line, bucket.addressed(piece.rows), bucket.dtype, 1, 0)


class DoubleSection(RawSection):
    """float64 values, which no kernel takes: sums are float64, in rank order, divided once."""

    @staticmethod
    def _flag(flags: Tensor, values: Tensor) -> None:
        flags |= (~values.isfinite()).any().to(torch.int32) * wire.FLAG_NON_FINITE

    def encode(self, bucket: Bucket, feedback: Feedback | None, out: Tensor, piece: Piece) -> None:
        """The values, zeros behind them."""
        values = self.gathered(bucket, len(out), piece)
        self._flag(bucket.flags, values)
        out.copy_(values.view(torch.uint8))

    def reduce(
        self,
        bucket: Bucket,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
    ) -> None:
        """Sums in rank order, divides for a mean."""
        total = torch.zeros(0, dtype=torch.float32, device=messages.device)
        for rank, message in enumerate(messages):  # copied: a message's bytes start on 4, not on 8
            values = message.clone().view(self.dtype)
            total = total.add_(values) if rank else values
        total.div_(bucket.divisor)
        self._flag(flags, total)
        out.copy_(total.view(torch.uint8))

    def decode(self, bucket: Bucket, shards: Tensor, piece: Piece) -> None:
        """The values into their places."""
        values = shards.clone(memory_format=torch.contiguous_format).view(-1).view(self.dtype)
        for x, n, word in piece.rows[:, [wire.X, wire.N, wire.WORD]].tolist():
            bucket.flat[x : x + n] = values[UNIT * word : UNIT * word + n]
