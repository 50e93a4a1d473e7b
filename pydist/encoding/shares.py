"""Which rank owns which blocks of which parameter, and where they stand in a message.

The owner of an element is a function of (parameter, element, number of owners) alone: every
parameter is divided evenly among the ranks, block by block. So neither the bucket that a parameter
happens to be in, nor how a bucket is cut into chunks, ever moves an owner's residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pydist.formats import wire
from pydist.formats.wire import IntArray


@dataclass(frozen=True)
class Part:
    """One parameter's gradient in a bucket, or a rank's share of it.

    Attributes:
        ordinal: The parameter's place in ``named_parameters()``.
        offset: First element in the bucket's buffer.
        numel: Elements.
        first: Place of the first one in the parameter; a multiple of the codec's unit.
    """

    ordinal: int
    offset: int
    numel: int
    first: int = 0

    @property
    def last(self) -> int:
        """One past the last element's place in the parameter."""
        return self.first + self.numel


def share_bounds(units: IntArray, ordinals: IntArray, owners: int) -> IntArray:
    """First unit of each owner's share of each parameter, and one past its last.

    Shares differ by one unit at most. Where they do, the larger ones go to owners that depend on
    the parameter, so that many small parameters are spread evenly too.

    Args:
        units: Units (blocks, say) of each parameter.
        ordinals: Places of the parameters in ``named_parameters()``.
        owners: Number of owners.

    Returns:
        int64 [parameters, owners, 2].
    """
    turn = (ordinals.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)) >> np.uint64(16)
    place = (np.arange(owners) + turn.astype(np.int64)[:, None]) % owners
    return np.stack([place, place + 1], axis=2) * units[:, None, None] // owners


def share_of(numel: int, ordinal: int, unit: int, owner: int, owners: int) -> tuple[int, int]:
    """The elements of one parameter that one rank owns: first, and one past the last."""
    units = np.array([-(-numel // unit)])
    low, high = share_bounds(units, np.array([ordinal]), owners)[0, owner].tolist()
    return min(low * unit, numel), min(high * unit, numel)


class Piece(NamedTuple):
    """A piece of every owner's share: what one chunk holds of some parameters.

    Attributes:
        rows: int64 [k, 9] (:mod:`pydist.formats.wire`), sorted by owner: ``X`` is the first element
            in the bucket, ``WORD`` the unit in the message that goes to the row's owner.
        part: Which part each row is of.
        owner: Who owns it.
        room: Units of a message's row; what is past an owner's own units is padding.
    """

    rows: IntArray
    part: IntArray
    owner: IntArray
    room: int

    def of(self, owner: int) -> Piece:
        """One owner's rows alone."""
        mine = self.owner == owner
        return Piece(self.rows[mine], self.part[mine], self.owner[mine], self.room)


class Shares:
    """Every owner's share of a list of parameters, as rows.

    Args:
        parts: The parameters.
        unit: Elements of a unit.
        owners: Number of owners.

    Attributes:
        units: Units of each owner.
        most: The largest of them.
        bounds: int64 [parts, owners, 2]: first element of each share and one past the last, as
            the parameter counts them.
    """

    def __init__(self, parts: Sequence[Part], unit: int, owners: int) -> None:
        self.unit, self.owners = unit, owners
        numel = np.array([part.numel for part in parts], dtype=np.int64)
        ordinals = np.array([part.ordinal for part in parts], dtype=np.int64)
        offsets = np.array([part.offset for part in parts], dtype=np.int64)
        firsts = np.array([part.first for part in parts], dtype=np.int64)
        units = -(-numel // unit)
        low, high = np.moveaxis(share_bounds(units, ordinals, owners), 2, 0)
        inside = np.minimum(np.stack([low, high], axis=2) * unit, numel[:, None, None])
        self.bounds = firsts[:, None, None] + inside
        self.units = (high - low).sum(0)
        self.most = int(self.units.max(initial=0))
        owner, part = np.nonzero((high > low).T)  # owner after owner, part after part
        first, last = inside[part, owner].T
        rows = np.zeros((len(part), wire.COLUMNS), dtype=np.int64)
        rows[:, wire.X] = offsets[part] + first
        rows[:, wire.N] = last - first
        rows[:, wire.ORDINAL] = ordinals[part]
        rows[:, wire.FIRST] = firsts[part] + first
        taken = (high - low)[part, owner]
        before = np.cumsum(self.units) - self.units
        rows[:, wire.WORD] = np.cumsum(taken) - taken - before[owner]
        self._rows, self._part, self._owner = rows, part, owner

    def room(self, pieces: int, of: int) -> int:
        """Units that ``pieces`` neighbours among ``of`` pieces of a share hold at most."""
        return -(-pieces * self.most // of) if of else 0

    def piece(self, begin: int, end: int, of: int) -> Piece:
        """Pieces ``begin`` … ``end`` of every share that is cut into ``of``."""
        room = self.room(end - begin, of)
        low, high = begin * self.units // of, end * self.units // of
        rows, part, owner = self._rows, self._part, self._owner
        word = rows[:, wire.WORD]
        inside = (word + -(-rows[:, wire.N] // self.unit) > low[owner]) & (word < high[owner])
        rows, part, owner = rows[inside].copy(), part[inside], owner[inside]
        skip = np.maximum(low[owner] - rows[:, wire.WORD], 0)
        start = rows[:, wire.WORD] + skip
        drop = skip * self.unit
        rows[:, wire.X] += drop
        rows[:, wire.FIRST] += drop
        rows[:, wire.N] = np.minimum(rows[:, wire.N] - drop, (high[owner] - start) * self.unit)
        rows[:, wire.WORD] = start - low[owner]
        return Piece(rows, part, owner, room)
