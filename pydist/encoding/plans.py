"""Which elements travel in which row of a message, as units of a codec.

A *plan* has a table of rows for each rank's part of a buffer (:mod:`pydist.formats.wire`). A tensor
that is reduced in place is one part; the shares of a reduce-scatter are a part for each rank; a
buffer of FSDP's holds in each rank's part its shard of one parameter after another, and what
belongs to no shard is padding and is never sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks


class Plan:
    """Parts of a buffer as units of a codec; the same for many calls.

    Args:
        unit: Elements of a unit.
        rows: For every part a table, addresses in elements.
        segment: Which segment (a parameter, or a part of its own) each of these rows is of.
        totals: Elements of each segment.

    Attributes:
        units: Units of a message's row; parts with fewer end in zeros.
        numel: Elements of a part, where all have as many in one row and travel as short as they
            are.
        gaps: Some bytes of some message belong to no element.
    """

    def __init__(
        self, unit: int, rows: list[IntArray], segment: list[IntArray], totals: IntArray
    ) -> None:
        self.unit, self.rows, self.segment, self.totals = unit, rows, segment, totals
        sizes = np.array([int(table[:, wire.N].sum()) for table in rows], dtype=np.int64)
        units = [int((-(-table[:, wire.N] // unit)).sum()) for table in rows]
        self.units = max(units, default=0)
        self.numel: int | None = None
        self.gaps = bool((sizes != self.units * unit).any())

    @classmethod
    @lru_cache(maxsize=64)
    def dense(
        cls, numel: int, unit: int, parts: int = 1, first: int = 0, *, alike: bool = False
    ) -> Plan:
        """Parts of ``numel`` elements each, every one a segment of its own; kept for later calls.

        Args:
            numel: Elements of a part.
            unit: Elements of a unit.
            parts: How many there are.
            first: Place of a part's first element in the whole.
            alike: Their draws differ by rank alone; otherwise by part too.
        """
        rows = [
            np.array([[0, 0, 0, numel, 0, 0 if alike else part, first, 0, 0]], dtype=np.int64)[
                : min(numel, 1)
            ]
            for part in range(parts)
        ]
        segment = [np.full(len(table), part) for part, table in enumerate(rows)]
        plan = cls(unit, rows, segment, np.full(parts, numel, dtype=np.int64))
        plan.numel, plan.gaps = numel, False
        return plan

    @classmethod
    def of_shards(cls, shards: Sequence[Shards], unit: int, ranks: int) -> Plan:
        """Parameters shard by shard; each shard has units of its own.

        Its draws are those of elements r · u · unit on of its parameter, for rank r and u the most
        units that a shard of the parameter has: so they differ from the draws of other shards, and
        do not depend on what else is in the buffer.
        """
        shape = (len(shards), ranks)
        numel = np.array([s.numel for s in shards], dtype=np.int64).reshape(shape)
        offset = np.array([s.offset for s in shards], dtype=np.int64).reshape(shape)
        most = -(-numel.max(axis=1, initial=0) // unit)
        tables, segments = [], []
        for rank in range(ranks):
            index = np.flatnonzero(numel[:, rank])
            rows = np.zeros((len(index), wire.COLUMNS), dtype=np.int64)
            rows[:, wire.X] = offset[index, rank]
            rows[:, wire.N] = numel[index, rank]
            rows[:, wire.ORDINAL] = [shards[int(i)].ordinal for i in index]
            rows[:, wire.FIRST] = rank * most[index] * unit
            rows = wire.number_rows(rows, unit)
            rows[:, wire.WORD] = rows[:, wire.WORDS_BEFORE]
            tables.append(rows)
            segments.append(index)
        return cls(unit, tables, segments, numel.sum(axis=1))

    @cached_property
    def _before(self) -> list[IntArray]:
        """For every row, elements of its segment in parts before."""
        taken, before = np.zeros(len(self.totals), dtype=np.int64), []
        for table, segment in zip(self.rows, self.segment, strict=True):
            before.append(taken[segment])
            taken[segment] += table[:, wire.N]
        return before

    def addressed(self, part: int, x: Tensor) -> IntArray:
        """All rows of a part, with the addresses of their elements in its memory ``x``."""
        rows = self.rows[part].copy()
        rows[:, wire.X] = x.data_ptr() + rows[:, wire.X] * x.element_size()
        return rows

    def place_residuals(self, part: int, rows: IntArray, residuals: Residuals) -> None:
        """Gives all rows of a part the addresses of their residuals."""
        at = residuals.addresses[self.segment[part]] + residuals.width * self._before[part]
        rows[:, wire.MOMENTUM] = rows[:, wire.MOMENTUM_OUT] = at

    def cut(
        self, rows: IntArray, begin: int, end: int, widths: tuple[int, int] | None = None
    ) -> IntArray:
        """The parts of rows in units ``begin`` … ``end``, which become units 0 ….

        Args:
            rows: All rows of a part.
            begin: First unit.
            end: One past the last unit.
            widths: Bytes of an element, and of a residual, to advance their addresses.
        """
        rows = wire.cut_rows(rows, begin, end, widths, unit=self.unit)
        rows[:, wire.WORD] -= begin
        return rows

    def whole(self, inputs: Sequence[Tensor]) -> tuple[Tensor, IntArray, IntArray]:
        """All of every segment in one row: memory, rows with addresses, their segments.

        Shards of one segment are brought together in memory of their own.

        Args:
            inputs: The parts' memory.
        """
        if self.numel is not None:
            rows = [self.addressed(part, x) for part, x in enumerate(inputs)]
            return inputs[0], np.concatenate(rows), np.concatenate(self.segment)
        together = inputs[0].new_empty(int(self.totals.sum()))
        starts = np.cumsum(self.totals) - self.totals
        ours, theirs = [], []
        for part, (x, table) in enumerate(zip(inputs, self.rows, strict=True)):
            to = (starts[self.segment[part]] + self._before[part]).tolist()
            for (at, numel), begin in zip(table[:, [wire.X, wire.N]].tolist(), to, strict=True):
                ours.append(x[at : at + numel])
                theirs.append(together[begin : begin + numel])
        if ours:
            torch._foreach_copy_(theirs, ours)
        rows_of_all = np.zeros((len(self.totals), wire.COLUMNS), dtype=np.int64)
        rows_of_all[:, wire.N] = self.totals
        wire.dense_addresses(rows_of_all, wire.X, together.data_ptr(), together.element_size())
        return together, rows_of_all, np.arange(len(self.totals))


# --------------------------------------------------------------------------- shards of FSDP


@dataclass(frozen=True)
class Shards:
    """One parameter, shard by shard.

    Attributes:
        ordinal: Its place in ``named_parameters()``.
        offset: First element of each rank's shard in that rank's row.
        numel: Elements of each rank's shard; may be 0.
    """

    ordinal: int
    offset: tuple[int, ...]
    numel: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a buffer of FSDP's holds, and how it travels.

    Attributes:
        row: Elements of a row.
        ranks: Number of rows.
        coded: Parameters that are encoded.
        raw: Parameters that travel as they are.
    """

    row: int
    ranks: int
    coded: tuple[Shards, ...]
    raw: tuple[Shards, ...] = ()
    _plans: dict[int, Plan] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, unit: int) -> Plan:
        """The encoded parameters as units of so many elements; made once."""
        if unit not in self._plans:
            self._plans[unit] = Plan.of_shards(self.coded, unit, self.ranks)
        return self._plans[unit]

    @cached_property
    def padding(self) -> list[list[tuple[int, int]]]:
        """For every rank, the parts of its row that belong to no shard: begin, end."""
        return [list(self._padding(rank)) for rank in range(self.ranks)]

    def _padding(self, rank: int) -> Iterator[tuple[int, int]]:
        at = 0
        for begin, numel in sorted((s.offset[rank], s.numel[rank]) for s in self.coded + self.raw):
            if begin > at:
                yield at, begin
            at = max(at, begin + numel)
        if at < self.row:
            yield at, self.row


class Residuals:
    """What was lost of the segments of a plan; overwritten in place.

    Args:
        tensors: For every segment all its elements, part after part, without padding; contiguous,
            of one dtype.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        name = str(self.tensors[0].dtype)[6:] if self.tensors else "float32"
        self.dtype, self.width = checks.FLOATS[name], checks.ITEMSIZE[name]
        self.addresses = np.array([x.data_ptr() for x in self.tensors], dtype=np.int64)
