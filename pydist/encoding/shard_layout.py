"""Where the shards of parameters lie in a buffer of FSDP's, and where their blocks go in messages.

A buffer has a row for every rank, all of one length. A rank's row holds its shard of one parameter
after another; what belongs to no shard is padding and is never sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks


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
    """What a buffer holds, and how it travels.

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
    _plans: dict[int, ShardPlan] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, block: int) -> ShardPlan:
        """The encoded parameters as blocks of so many elements; made once."""
        if block not in self._plans:
            self._plans[block] = ShardPlan(self.coded, block, self.ranks)
        return self._plans[block]

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


class ShardPlan:
    """Parameters as blocks of a message; the same for many calls.

    Every shard has blocks of its own. Its draws are those of elements r · b · block on of its
    parameter, for rank r and b the most blocks that a shard of the parameter has: so they differ
    from the draws of other shards, and do not depend on what else is in the buffer.

    Args:
        shards: The parameters.
        block: Elements that stay together.
        ranks: Number of rows.

    Attributes:
        units: Blocks of a row of a message; rows with fewer end in zeros.
        rows: For every rank a table of its shards (:mod:`pydist.formats.wire`), addresses in
        elements. index: Which of the parameters each of these rows is of. totals: Elements of each
        parameter. gaps: Whether some bytes of some message belong to no element.
    """

    def __init__(self, shards: Sequence[Shards], block: int, ranks: int) -> None:
        self.block = block
        self.rows: list[IntArray] = []
        self.index: list[IntArray] = []
        shape = (len(shards), ranks)
        numel = np.array([s.numel for s in shards], dtype=np.int64).reshape(shape)
        offset = np.array([s.offset for s in shards], dtype=np.int64).reshape(shape)
        most = -(-numel.max(axis=1, initial=0) // block)
        self.totals = numel.sum(axis=1)
        self._before = np.cumsum(numel, axis=1) - numel
        for rank in range(ranks):
            index = np.flatnonzero(numel[:, rank])
            rows = np.zeros((len(index), 8), dtype=np.int64)
            rows[:, wire.X] = offset[index, rank]
            rows[:, wire.N] = numel[index, rank]
            rows[:, wire.ORDINAL] = [shards[int(i)].ordinal for i in index]
            rows[:, wire.FIRST] = rank * most[index] * block
            rows = wire.number_rows(rows, block)
            rows[:, wire.WORD] = rows[:, wire.WORDS_BEFORE]
            self.rows.append(rows)
            self.index.append(index)
        self.units = int((-(-numel // block)).sum(axis=0).max(initial=0))
        self.gaps = bool((numel.sum(axis=0) != self.units * block).any())

    def part(
        self, rank: int, x: Tensor, begin: int, end: int, residuals: Residuals | None = None
    ) -> IntArray:
        """A rank's rows in blocks ``begin`` … ``end``, which become blocks 0 …, with addresses.

        Args:
            rank: Whose shards.
            x: Its row of the buffer, contiguous.
            begin: First block.
            end: One past the last block.
            residuals: What was lost of the parameters before.
        """
        rows, width, kept = self.addressed(rank, x), x.element_size(), 0
        if residuals is not None:
            kept = residuals.width
            first = residuals.addresses + kept * self._before[:, rank]
            rows[:, wire.MOMENTUM] = first[self.index[rank]]
            rows[:, wire.MOMENTUM_OUT] = rows[:, wire.MOMENTUM]
        return self.cut(rows, begin, end, (width, kept))

    def addressed(self, rank: int, x: Tensor) -> IntArray:
        """All of a rank's rows, with the addresses of their elements in its row ``x``."""
        rows = self.rows[rank].copy()
        rows[:, wire.X] = x.data_ptr() + rows[:, wire.X] * x.element_size()
        return rows

    def cut(
        self, rows: IntArray, begin: int, end: int, widths: tuple[int, int] | None = None
    ) -> IntArray:
        """The parts of rows in blocks ``begin`` … ``end``, which become blocks 0 …."""
        rows = wire.cut_rows(rows, begin, end, widths, unit=self.block)
        rows[:, wire.WORD] -= begin
        return wire.number_rows(rows, self.block)


class Residuals:
    """What was lost of the parameters of a plan; overwritten in place.

    Args:
        tensors: For every parameter of the plan all ranks' shards, one behind the other, without
            padding; contiguous, of one dtype.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        name = str(self.tensors[0].dtype)[6:] if self.tensors else "float32"
        self.dtype, self.width = checks.FLOATS[name], checks.ITEMSIZE[name]
        self.addresses = np.array([x.data_ptr() for x in self.tensors], dtype=np.int64)
