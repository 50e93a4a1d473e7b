"""One codec on the wire: from rows of elements to the bytes of messages, and back.

A *row* says where some elements of one parameter lie in memory, and which units of a message are
theirs (:mod:`pydist.formats.wire`). Tensors, buckets of DDP and shards of FSDP differ in their rows
alone: each codec is one class below :class:`RowCodec`, and all three go through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from pydist.formats.wire import IntArray
from pydist.kernels.checks import FLOATS
from pydist.kernels.launch import LaunchTarget, launch
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import Worker

OWN, REDUCED, WEIGHT = 0, 1, 2
"""Phases of random draws: a rank's contribution, what an owner has reduced, a weight."""


def dtype_of(x: Tensor) -> int:
    """A tensor's dtype as kernels take it."""
    return FLOATS[str(x.dtype)[6:]]


@dataclass(frozen=True)
class Job:
    """What the kernels of one call share.

    Attributes:
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of random draws and the tie hash.
        device: Where the data is.
        scalers: By codec, this rank's and the shared scaler of each segment, where it has any;
            float32.
    """

    worker: Worker
    mean: bool
    seed: int
    device: torch.device
    scalers: dict[RowCodec, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def divisor(self) -> int:
        """What sums over ranks are divided by."""
        return self.worker.divisor if self.mean else 1

    @cached_property
    def flags(self) -> Tensor:
        """int32[1], raised by what this rank encodes."""
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    @cached_property
    def seen(self) -> Tensor:
        """int32[1], raised by what this rank decodes."""
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    @cached_property
    def _cpu(self) -> LaunchTarget:
        return LaunchTarget(threads=self.worker.threads)

    def target(self, near: Tensor) -> LaunchTarget:
        """Where kernels beside a tensor run, with the caller's number of CPU threads."""
        return target_of(near) if near.is_cuda else self._cpu

    def launch(self, near: Tensor, kernel: str, rows: IntArray, *args: object, unit: int) -> None:
        """Runs a kernel on rows of ``unit`` elements per unit of work, where ``near`` is."""
        launch(self.target(near), kernel, rows, *args, unit=unit)


class Place:
    """Where an encoder writes the bytes of one or several rows of a message.

    Each row has the same columns, such as codes and scales. Units of row ``i`` begin at ``i`` times
    those of a row, column by column: so one launch serves all rows. Bytes of several rows are
    written side by side and dealt out by :meth:`finish`.

    Args:
        out: uint8 [rows, bytes].
        columns: Bytes of each column of a row.
        zero: Some bytes belong to no element: they are zeroed.
    """

    def __init__(self, out: Tensor, columns: Sequence[int], *, zero: bool) -> None:
        self._out, self._columns, self.size = out, columns, out.shape[0] * columns[0]
        self._beside: Tensor | None = None  # columns of all rows, one behind the other
        target = out
        if out.shape[0] > 1:
            size = out.shape[0] * sum(columns)
            target = self._beside = torch.empty(size, dtype=torch.uint8, device=out.device)
        if zero:
            target.zero_()

    def _begin(self, column: int) -> int:
        return self._out.shape[0] * sum(self._columns[:column])

    def address(self, column: int = 0) -> int:
        """First byte of a column."""
        near = self._out if self._beside is None else self._beside
        return near.data_ptr() + self._begin(column)

    def bytes(self, column: int = 0) -> Tensor:
        """A column of all rows, uint8 [bytes]."""
        near = self._out[0] if self._beside is None else self._beside
        return near.narrow(0, self._begin(column), self._out.shape[0] * self._columns[column])

    def finish(self) -> None:
        """Deals out what was written to the rows."""
        if self._beside is not None:
            begin = 0
            for column, size in enumerate(self._columns):
                self._out[:, begin : begin + size] = self.bytes(column).view(-1, size)
                begin += size


class Source:
    """Where a decoder reads.

    Args:
        messages: uint8 [rows, bytes].
        columns: Bytes of each column of a row.
        joined: The rows hold units one behind the other, as one message; otherwise each is the
            message of a rank, with the same units.
    """

    def __init__(self, messages: Tensor, columns: Sequence[int], *, joined: bool = False) -> None:
        self._columns = columns
        rows = messages.shape[0]
        if joined and rows > 1:
            parts = messages[:, : sum(columns)].split(list(columns), dim=1)
            messages = torch.cat([part.reshape(-1) for part in parts]).unsqueeze(0)
            self._columns = [rows * size for size in columns]
        self.near, self.size = messages, self._columns[0]
        self.ranks, self.stride = messages.shape[0], messages.stride(0)

    def address(self, column: int = 0) -> int:
        """First byte of a column."""
        return self.near.data_ptr() + sum(self._columns[:column])

    def rows(self, column: int = 0) -> Tensor:
        """A column of every rank's message, uint8 [ranks, bytes]."""
        return self.near.narrow(1, sum(self._columns[:column]), self._columns[column])


class RowCodec:
    """One codec on the wire.

    Attributes:
        number: Its number in a header (``wire.CODECS``).
        bits: Bits per element of the reduced message, for the header.
        unit: Elements that stay together: a block, a payload word of signs.
        unit_bytes: Bytes of a unit in a message.
        reduced_unit_bytes: Bytes of a unit after the reduction.
        tail_bytes: Bytes behind a message that everyone gathers.
        agreed: What all ranks must have alike beside the codec's ``repr``.
    """

    number: int
    bits: int
    unit: int
    unit_bytes: int
    reduced_unit_bytes: int
    tail_bytes = 0
    agreed: Mapping[str, object] = MappingProxyType({})

    # ----------------------------------------------------------------- sizes

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of each column of a message of so many units."""
        return (units * self.unit_bytes,)

    def reduced_columns(self, units: int) -> tuple[int, ...]:
        """Bytes of each column after the reduction."""
        return self.columns(units)

    def row_bytes(self, units: int) -> int:
        """Bytes of a message of so many units."""
        return sum(self.columns(units))

    def reduced_bytes(self, units: int) -> int:
        """Bytes of its reduced form."""
        return sum(self.reduced_columns(units))

    def place(self, out: Tensor, units: int, *, zero: bool) -> Place:
        """Where messages of so many units go; with ``zero`` some bytes belong to no element."""
        return Place(out, self.columns(units), zero=zero)

    def reduced_place(self, out: Tensor, units: int, *, zero: bool) -> Place:
        """The same of reduced messages."""
        return Place(out, self.reduced_columns(units), zero=zero)

    def source(self, messages: Tensor, units: int) -> Source:
        """The messages of all ranks, of so many units each."""
        return Source(messages, self.columns(units))

    def reduced_source(self, shards: Tensor, units: int) -> Source:
        """Reduced messages of so many units each, one behind the other."""
        return Source(shards, self.reduced_columns(units), joined=True)

    # ----------------------------------------------------------------- kernels

    def attach(self, job: Job, rows: IntArray, segment: IntArray) -> None:
        """Gives rows what they need of their segments, whose numbers ``segment`` has: scalers."""

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """Writes rows of elements into a place.

        Args:
            job: The call.
            x: The tensor that the rows' addresses are in, or one beside it.
            rows: int64 [k, 8], with addresses.
            dtype: Dtype of the elements, as kernels take it.
            place: Where the bytes go.
            flags: int32[1], raised where an element is not finite.
            state: Dtype of the rows' residuals, which are added before and become what is lost;
                ``None`` without.
            phase: Of random draws.
        """
        raise NotImplementedError

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Combines the messages of all ranks: sums in rank order, divides for a mean.

        Args:
            job: The call.
            rows: int64 [k, 8]; addresses are not used.
            source: The messages.
            place: Where the reduced message goes.
            flags: int32[1], raised where the result is not finite.
        """
        raise NotImplementedError

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
        """Writes the sum of the messages of all ranks, over ``divisor``, into rows of elements.

        ``flags``, int32[1], is raised where a message is malformed, or a value not finite.
        """
        raise NotImplementedError

    def decode_reduced(
        self, job: Job, x: Tensor, rows: IntArray, dtype: int, source: Source, flags: Tensor
    ) -> None:
        """Writes what a reduced message holds into rows of elements."""
        self.decode(job, x, rows, dtype, source, 1, flags)

    def clear_sent(
        self, job: Job, x: Tensor, rows: IntArray, dtype: int, place: Place, flags: Tensor
    ) -> None:
        """Zeros in rows of elements what a place has sent whole; of sparse codecs alone."""
