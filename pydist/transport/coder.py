"""What the exchange of a collective asks of a codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Worker:
    """Who takes part in a call, and when.

    Attributes:
        rank: This rank's place in the group.
        ranks: Ranks of the group.
        step: Step of the call.
        threads: CPU threads of its kernels.
        first: Place of its data's first element in the whole, on which draws and ties depend; a
            multiple of the codec's unit.
        behind: Ranks whose sum each contribution is; a mean divides by all of them.
        draws_as: Rank in its random draws, where that is another than its place in the group.
    """

    rank: int
    ranks: int
    step: int
    threads: int = 1
    first: int = 0
    behind: int = 1
    draws_as: int | None = None

    @property
    def draws(self) -> int:
        """The rank in random draws, which no other rank of the job has."""
        return self.rank if self.draws_as is None else self.draws_as

    @property
    def divisor(self) -> int:
        """By what a mean divides the sum of all contributions."""
        return self.ranks * self.behind


class Usage(Protocol):
    """Words in device memory that messages tell of, a bit for each (``kernels/device.py``)."""

    @property
    def told(self) -> int:
        """How many words messages tell of."""
        ...

    def address(self, *, everyones: bool) -> int:
        """Of the words of this rank, or of those that all ranks' become."""
        ...


class Coder(Protocol):
    """One call's data on its way through a codec: local bytes, their reduction, the result.

    Positions are *units*, what must stay together: a payload word of 32 signs, or a block with its
    scale. Chunks and shards start on units, so every range of them can be coded on its own. A
    shard's bytes stand in one row; the last shards may reach past the data, where they are zeros.

    Attributes:
        codec: Number of the codec in a header (``wire.CODECS``).
        bits: Bits per element of the reduced message, for the header.
        units: Units of the whole call.
        unit_bytes: Bytes of a unit in phase 1: of all shares in a scatter, all ranks in a gather.
        repeatable: Encoding changes nothing but buffers of its own, so it may be done in vain.
        flags: int32[1] on the data's device, raised by what was encoded so far.
        all_flags: int32[1] zero on the data's device, for the flags of all ranks.
    """

    codec: int
    bits: int
    units: int
    unit_bytes: int
    repeatable: bool
    flags: Tensor
    all_flags: Tensor

    @property
    def usage(self) -> Usage | None:
        """Which parameters have a gradient, where the data's device knows it."""
        ...

    def message_bytes(self, units: int) -> int:
        """Bytes of a shard of ``units`` units in phase 1; a multiple of 4."""
        ...

    def reduced_bytes(self, units: int) -> int:
        """Bytes of its reduced form; a multiple of 4."""
        ...

    def metadata(self) -> Tensor | None:
        """Bytes that travel once a call, from every rank to every rank.

        Returns:
            uint8 [bytes], or [rows, bytes] with a row for each of the first chunk's messages; a
            multiple of 4. ``None`` where there are none.
        """
        ...

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """Takes the metadata bytes that all ranks have sent here, uint8 [ranks, bytes]."""
        ...

    def scales(self) -> Tensor | None:
        """Bytes (uint8) that every rank must have of every rank before it can encode.

        Called once, while the agreement travels; ``None`` on all ranks or on none.
        """
        ...

    def merge_scales(self, all_scales: Tensor) -> None:
        """Takes those of all ranks, uint8 [ranks, bytes]."""
        ...

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Writes this rank's bytes of units ``begin`` … ``end`` and raises ``flags``.

        Args:
            shards: uint8 [rows, ``message_bytes(units)``] on the data's device, uninitialised.
            units: Units of each row.
            begin: First unit of the first row.
            end: One past the last unit of the chunk.
        """
        ...

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Combines all ranks' bytes of a shard.

        Args:
            messages: uint8 [ranks, ``message_bytes(units)``].
            out: uint8 [``reduced_bytes(units)``], uninitialised, on the messages' device.
            units: Units of each row, and of ``out``.
            begin: First unit of the shard.
            end: One past its last unit; ``begin`` where there are none.
            flags: int32[1], raised where the result is not finite.
        """
        ...

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Takes the result of units ``begin`` … ``end``.

        Args:
            shards: uint8 [rows, bytes]: what :meth:`reduce` made of the shards, in order; in a
                collective without a second phase what all ranks encoded, in rank order.
            units: Units of each row.
            begin: First unit of the first row.
            end: One past the last unit of the chunk.
        """
        ...

    def finish(self, flags: Tensor) -> None:
        """Ends the call: everything is decoded; int32[1] ``flags`` are those of all ranks."""
        ...


Span = tuple[int, int]
"""First unit, and one past the last; equal where there are none."""


class EntropyCoder(Protocol):
    """Shortens a coder's rows on the wire, to lengths that depend on the data; loses nothing.

    A coder that wants one has it as its attribute ``entropy_coder``. Its own methods see rows of
    the lengths that ``message_bytes`` and ``reduced_bytes`` say, by which the algorithm is chosen
    too.
    """

    def bounds(self, row: int, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of the ``row``-th message that arrives here."""
        ...

    def most(self, row: int, span: Span) -> int:
        """Most bytes of the ``row``-th message that leaves, by the bounds where it arrives."""
        ...

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The messages of rows of ``units`` units that hold these; each a multiple of 4 bytes."""
        ...

    def unpack(
        self, messages: Sequence[Tensor], rows: Tensor, units: int, spans: Sequence[Span]
    ) -> tuple[int, str] | None:
        """Writes the rows that messages were made of; or which is malformed, and why."""
        ...


def entropy_coder_of(coder: Coder) -> EntropyCoder | None:
    """What shortens a coder's rows, if anything does."""
    return getattr(coder, "entropy_coder", None)


class BareCoder:
    """What most coders do without: scales, metadata, usage words, a second phase."""

    repeatable = True
    usage: Usage | None = None

    def metadata(self) -> Tensor | None:
        """No metadata bytes."""
        return None

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """Nothing to merge."""

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Of an all-reduce alone."""
        raise NotImplementedError

    def scales(self) -> Tensor | None:
        """No bytes."""
        return None

    def merge_scales(self, all_scales: Tensor) -> None:
        """Nothing to merge."""


def spans(rows: int, units: int, begin: int, end: int) -> Iterator[Span]:
    """First and last unit of each of the rows that share ``begin`` … ``end``; empty ones too."""
    for row in range(rows):
        yield min(begin + row * units, end), min(begin + (row + 1) * units, end)
