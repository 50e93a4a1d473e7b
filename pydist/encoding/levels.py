"""A bucket of gradients on two levels: what each rank of a node carries across.

Inside a node every parameter is divided among the node's ranks, block by block, as it is among
owners (:mod:`pydist.encoding.shares`): a rank's *row* is its shares, one parameter after the other,
in float32 (float64 for a bucket of float64)::

    bucket  ─ split ─▶ [local, row] ─ reduce-scatter ─▶ row, the node's sum
    row     ─ all-reduce across nodes, with residuals ─▶ row, the result
    row     ─ all-gather ─▶ [local, row] ─ join ─▶ bucket

Positions stay those in the parameter, so draws, blocks and ties do not depend on the number of
shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.encoding.choose import all_gather_coder
from pydist.encoding.coders import GatherCoder
from pydist.encoding.plans import Layout, Shards
from pydist.encoding.sharded import scatter_coder
from pydist.encoding.shares import Part, share_bounds
from pydist.transport.coder import Coder, Worker


class Rows:
    """How the parameters of a bucket lie in the rows of a node's ranks.

    Args:
        parts: The bucket's parameters.
        raw: Whether each travels as it is, whatever the codec inside a node.
        units: Elements of each that stay together: a multiple of every block that its codecs have.
        dtype: Type of the bucket's buffer.
        local: Ranks of a node.

    Attributes:
        dtype: Type of a row that has been summed.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        raw: Sequence[bool],
        units: Sequence[int],
        dtype: torch.dtype,
        local: int,
    ) -> None:
        self.parts, self.local = list(parts), local
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._bounds = bounds_in_node(parts, units, local)
        numel = self._bounds[:, :, 1] - self._bounds[:, :, 0]
        ends = np.cumsum(numel, axis=0)
        self._offsets = ends - numel
        shards = [
            Shards(part.ordinal, tuple(at.tolist()), tuple(n.tolist()))
            for part, at, n in zip(parts, self._offsets, numel, strict=True)
        ]
        self._layout = Layout(
            int(ends[-1].max(initial=0)) if len(ends) else 0, local,
            tuple(s for s, plain in zip(shards, raw, strict=True) if not plain),
            tuple(s for s, plain in zip(shards, raw, strict=True) if plain),
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Elements of a row; the shorter ones end in zeros."""
        return self._layout.row

    def shares(self, local_rank: int, *, inside: bool = True) -> list[Part]:
        """A rank's shares: as they lie in its row, or in the bucket."""
        bounds, offsets = self._bounds[:, local_rank], self._offsets[:, local_rank].tolist()
        return [
            Part(part.ordinal, at if inside else part.offset + first, last - first, first)
            for part, at, (first, last) in zip(self.parts, offsets, bounds.tolist(), strict=True)
        ]

    def _pairs(self, flat: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every share in the bucket, and in its row."""
        for part, offsets, bounds in zip(self.parts, self._offsets, self._bounds, strict=True):
            for row, at, (first, last) in zip(rows, offsets.tolist(), bounds.tolist(), strict=True):
                if first < last:
                    here = flat[part.offset + first : part.offset + last]
                    yield here, row[at : at + last - first]

    def split(self, flat: Tensor) -> Tensor:
        """A bucket as rows of its type, [local, length]."""
        rows = flat.new_zeros((self.local, self.length))
        if pairs := list(self._pairs(flat, rows)):
            inside, theirs = zip(*pairs, strict=True)
            torch._foreach_copy_(list(theirs), list(inside))
        return rows

    def join(self, rows: Tensor, flat: Tensor) -> None:
        """Rows back into the bucket."""
        if pairs := list(self._pairs(flat, rows)):
            inside, theirs = zip(*pairs, strict=True)
            torch._foreach_copy_(list(inside), list(theirs))

    def scatter_coder(
        self, row: Tensor, rows: Tensor, inner: Codec, worker: Worker, *, seed: int
    ) -> Coder:
        """The coder of the reduce-scatter inside a node: the sum of all ranks' rows."""
        return scatter_coder(row, rows.view(-1), self._layout, inner, worker, mean=False, seed=seed)

    def gather_coder(self, rows: Tensor, row: Tensor, worker: Worker, *, seed: int) -> GatherCoder:
        """The coder of the all-gather inside a node, in the rows' type, bit for bit."""
        exact = Raw() if rows.dtype == row.dtype else Raw(str(rows.dtype)[6:])
        return all_gather_coder(rows.view(-1), row, exact, worker, seed=seed)


def bounds_in_node(parts: Sequence[Part], units: Sequence[int], local: int) -> np.ndarray:
    """First element of each rank's share of each parameter and one past its last.

    Args:
        parts: The parameters.
        units: Elements of each that stay together.
        local: Ranks of a node.

    Returns:
        int64 [parts, local, 2].
    """
    numel = np.array([part.numel for part in parts], dtype=np.int64)
    unit = np.array(units, dtype=np.int64).reshape(len(parts))
    ordinals = np.array([part.ordinal for part in parts], dtype=np.int64)
    bounds = share_bounds(-(-numel // unit), ordinals, local) * unit[:, None, None]
    return np.minimum(bounds, numel[:, None, None])
