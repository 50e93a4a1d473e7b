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

from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import device
from pydist.kernels.checks import FLOATS
from pydist.kernels.launch import DeviceRows, LaunchTarget, Rows, launch
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import Worker

OWN, REDUCED, WEIGHT = 0, 1, 2
"""Phases of random draws: a rank's contribution, what an owner has reduced, a weight."""


JOB_WORDS = 3
"""Flags of a :class:`Job`."""


def dtype_of(x: Tensor) -> int:
    """A tensor's dtype as kernels take it; 0 for float64, which they do not."""
    return FLOATS.get(str(x.dtype)[6:], 0)


@dataclass(frozen=True)
class Job:
    """What the kernels of one call share.

    Attributes:
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of random draws and the tie hash.
        device: Where the data is.
        memory: int32, :data:`JOB_WORDS` zeros or more on this device, for flags; ``None``: makes
            them.
        scalers: By codec, this rank's and the shared scaler of each segment, where it has any;
            float32.
    """

    worker: Worker
    mean: bool
    seed: int
    device: torch.device
    memory: Tensor | None = None
    scalers: dict[RowCodec, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def divisor(self) -> int:
        """What sums over ranks are divided by."""
        return self.worker.divisor if self.mean else 1

    @cached_property
    def _words(self) -> Tensor:
        if self.memory is not None:
            return self.memory[:JOB_WORDS]
        return torch.zeros(JOB_WORDS, dtype=torch.int32, device=self.device)

    @cached_property
    def flags(self) -> Tensor:
        """int32[1], raised by what this rank encodes."""
        return self._words[0:1]

    @cached_property
    def seen(self) -> Tensor:
        """int32[1], raised by what this rank decodes."""
        return self._words[1:2]

    @cached_property
    def all_flags(self) -> Tensor:
        """int32[1], for the flags of all ranks, where messages are exchanged on this device."""
        return self._words[2:3]

    def merged(self, flags: Tensor, seen: int = -1) -> Tensor:
        """What all ranks encoded, and this one decoded: int32, any of whose words may be raised.

        Args:
            flags: int32[1], the flags of all ranks.
            seen: Which flags of what was decoded count.
        """
        if not self._words.is_cuda:
            return flags | self.seen & seen
        if seen != -1:
            self.seen.bitwise_and_(seen)
        if not flags.is_cuda and (raised := int(flags)):
            self.all_flags.fill_(raised)
        return self._words

    @cached_property
    def _cpu(self) -> LaunchTarget:
        return LaunchTarget(threads=self.worker.threads)

    def target(self, near: Tensor) -> LaunchTarget:
        """Where kernels beside a tensor run, with the caller's number of CPU threads."""
        return target_of(near) if near.is_cuda else self._cpu

    def launch(self, near: Tensor, kernel: str, rows: Rows, *args: object, unit: int) -> None:
        """Runs a kernel on rows of ``unit`` elements per unit of work, where ``near`` is."""
        launch(self.target(near), kernel, rows, *args, unit=unit)


def fill_nan(out: Tensor, flags: Tensor) -> None:
    """Overwrites a result with NaN where any rank's input was not finite.

    Args:
        out: float32, float16, bfloat16 or float64.
        flags: int32, on the same device, where nothing waits for it; or on the CPU.
    """
    if flags.is_cuda and out.is_contiguous():
        name = str(out.dtype)[6:]
        device.fill_nan(
            target_of(out), out.data_ptr(), out.numel(), name, flags.data_ptr(), flags.numel()
        )
        return
    bad = flags & (wire.FLAG_NON_FINITE | wire.FLAG_MALFORMED)
    if bad.is_cuda:
        out.masked_fill_(bad.any(), float("nan"))
    elif bad.any():
        out.fill_(float("nan"))


class Place:
    """Where an encoder writes the bytes of one or several messages.

    Each message has the same columns, such as codes and scales, and units from 0 on; ``MESSAGE`` of
    a row says where the message begins that the row is in.

    Args:
        out: uint8 [messages, bytes].
        columns: Bytes of each column of a message.
        zeroed: All bytes are zero: those that belong to no element need not be written.

    Attributes:
        size: Bytes of the first column.
    """

    def __init__(self, out: Tensor, columns: Sequence[int], *, zeroed: bool) -> None:
        self._out, self._columns, self.zeroed = out, columns, zeroed
        self.size = columns[0]

    def address(self, column: int = 0) -> int:
        """First byte of a column of the first message."""
        return self._out.data_ptr() + sum(self._columns[:column])

    def bytes(self, message: int = 0) -> Tensor:
        """The first column of the message that begins at byte ``message``, uint8 [bytes]."""
        return _at(self._out, message)[: self.size]


class Source:
    """Where a decoder reads.

    Args:
        messages: uint8 [messages, bytes].
        columns: Bytes of each column of a message.
        joined: The messages hold one part each, as ``MESSAGE`` of a row says; otherwise each is the
            message of a rank, with the same units.
    """

    def __init__(self, messages: Tensor, columns: Sequence[int], *, joined: bool = False) -> None:
        self.near, self._columns = messages, columns
        self.size = columns[0]
        self.ranks = 1 if joined else messages.shape[0]
        self.stride = messages.stride(0)

    def address(self, column: int = 0) -> int:
        """First byte of a column of the first message."""
        return self.near.data_ptr() + sum(self._columns[:column])

    def bytes(self, message: int) -> Tensor:
        """The first column of the message that begins at byte ``message``, uint8 [bytes]."""
        return _at(self.near, message)[: self.size]

    def rows(self) -> Tensor:
        """The first column of every message, uint8 [messages, bytes]."""
        return self.near[:, : self.size]


def _at(messages: Tensor, begin: int) -> Tensor:
    """The message that begins so many bytes behind the first one."""
    return messages[begin // messages.stride(0) if begin else 0]


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
        on_host: It reads the rows of :meth:`encode` itself, here.
    """

    number: int
    bits: int
    unit: int
    unit_bytes: int
    reduced_unit_bytes: int
    tail_bytes = 0
    agreed: Mapping[str, object] = MappingProxyType({})
    on_host = False

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

    def place(self, out: Tensor, units: int, *, zeroed: bool) -> Place:
        """Where messages of so many units go; ``zeroed``: all of it is zero so far."""
        return Place(out, self.columns(units), zeroed=zeroed)

    def reduced_place(self, out: Tensor, units: int, *, zeroed: bool) -> Place:
        """The same of reduced messages."""
        return Place(out, self.reduced_columns(units), zeroed=zeroed)

    def source(self, messages: Tensor, units: int) -> Source:
        """The messages of all ranks, of so many units each."""
        return Source(messages, self.columns(units))

    def joined_source(self, messages: Tensor, units: int) -> Source:
        """Messages of so many units each, a part in each."""
        return Source(messages, self.columns(units), joined=True)

    def reduced_source(self, shards: Tensor, units: int) -> Source:
        """Reduced messages of so many units each, a part in each."""
        return Source(shards, self.reduced_columns(units), joined=True)

    # ----------------------------------------------------------------- kernels

    def attach(self, job: Job, rows: IntArray, segment: IntArray) -> None:
        """Gives rows what they need of their segments, whose numbers ``segment`` has: scalers."""

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
        """Writes rows of elements into a place.

        Args:
            job: The call.
            x: The tensor that the rows' addresses are in, or one beside it.
            rows: int64 [k, 9], with addresses.
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
            rows: int64 [k, 9]; addresses are not used.
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
