"""Votes on two levels: counted inside a node, the counts added across, the result gathered inside.

The words of all parameters are divided evenly among the ranks of a node::

    inside   reduce-scatter   votes of a share, one bit from every rank: counted by its rank
    across   all-reduce       the counts of that share from all nodes: added, and decided
    inside   all-gather       the planes of the result

Counts are exact, so the result is that of the vote of all ranks on one level, bit for bit. Between
nodes a rank sends ``ceil(log2(ranks of a node + 1)) / ranks of a node`` bits per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pydist.collectives.grid import ACROSS, INSIDE, Grid
from pydist.encoding.rows import Job, Source
from pydist.encoding.signs import SignRows
from pydist.formats import wire
from pydist.kernels.signs import count_votes
from pydist.kernels.torch_tensors import moved, on_device_of
from pydist.optim.layout import any_rank_has, which_has
from pydist.optim.lion_coder import LionCoder
from pydist.transport.coder import BareCoder, Coder, Worker, spans
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, Route, choose_algorithm

WORD = wire.WORD_BYTES


class VoteStages:
    """The stages of a vote (:class:`pydist.collectives.grid.Stages`).

    Args:
        grid: The groups.
        votes: This rank's votes, as for one level.
        algorithm: That across nodes.
    """

    def __init__(self, grid: Grid, votes: LionCoder, algorithm: str) -> None:
        self.device, self.threads = votes.device, votes.worker.threads
        self._grid, self._votes, self._algorithm = grid, votes, algorithm
        self._share = _Share(grid, votes)

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage."""
        if stage == INSIDE:
            return _Inside(self._share), REDUCE_SCATTER
        if stage == ACROSS:
            across = _Across(self._share)
            return across, choose_algorithm(self._algorithm, across, self._grid.nodes)
        return _Gather(self._share), ALL_GATHER

    def finish(self) -> None:
        """Hands the flags of all ranks to the votes."""
        self._votes.finish(self._share.flags)


class _Share:
    """A rank's share of the words of a vote, and what becomes of it.

    Attributes:
        words: Words of every share; the last ones may reach past the votes.
        first: This rank's first word.
        counts: How many ranks of the node voted +1, as bit planes, uint8 [planes, bytes].
        result: The planes of the result, uint8 [planes, bytes].
        flags: int32[1], those of all ranks that were heard so far.
    """

    def __init__(self, grid: Grid, votes: LionCoder) -> None:
        self.grid, self.votes = grid, votes
        self.words = -(-votes.units // grid.local)
        self.first = grid.local_rank * self.words
        self.counts = self._planes(wire.planes_for(grid.local))
        self.result = self._planes(votes.bits)
        self.flags = votes.flags

    def _planes(self, planes: int) -> Tensor:
        return torch.zeros((planes, self.words * WORD), dtype=torch.uint8, device=self.votes.device)

    def parts(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Words ``begin`` … ``end`` of every rank's share, as the votes count them."""
        for rank in range(self.grid.local):
            first = rank * self.words
            last = min(first + end, self.votes.units)
            yield min(first + begin, last), last


class _Stage(BareCoder):
    """What the coders of all stages share; a unit is a word of each message.

    Args:
        share: This rank's share.
        planes: Bit planes of a message.
    """

    codec = SignRows.number

    def __init__(self, share: _Share, planes: int) -> None:
        votes = share.votes
        self.share, self.votes, self._planes = share, votes, planes
        self.job = Job(votes.worker, False, votes.rule.seed, votes.device)
        self.flags, self.all_flags = self.job.flags, self.job.all_flags
        self.flags.copy_(share.flags)
        self.bits, self.units = planes, share.words
        self.unit_bytes = planes * WORD

    def message_bytes(self, units: int) -> int:
        """Bytes of the planes of so many words."""
        return units * self._planes * WORD

    reduced_bytes = message_bytes

    def finish(self, flags: Tensor) -> None:
        """Keeps the flags of all ranks for the next stage."""
        self.share.flags = moved(self.job.merged(flags).amax().view(1), self.votes.device)


class _Inside(_Stage):
    """Votes to the ranks of the node that count them."""

    repeatable = False  # packing moves the momenta

    def __init__(self, share: _Share) -> None:
        super().__init__(share, 1)
        self.flags = share.votes.flags  # raised by packing
        self.unit_bytes *= share.grid.local

    def metadata(self) -> Tensor | None:
        """One bit per parameter: does this rank have a gradient for it?"""
        return self.votes.metadata()

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """A parameter is used where any rank of the node has a gradient for it."""
        self.votes.merge_metadata(all_metadata)

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every share's votes into the row that goes to its rank."""
        for row, (first, last) in zip(shards, self.share.parts(begin, end), strict=True):
            size = (last - first) * WORD
            row[:size] = self.votes.packed(first, last)
            row[size:] = 0

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Counts the votes of this rank's share."""
        here = slice(begin * WORD, end * WORD)
        with on_device_of(self.votes.flags):
            sent = shards[:, : (end - begin) * WORD].contiguous()
            self.share.counts[:, here] = count_votes(sent, threads=self.votes.worker.threads)


class _Across(_Stage):
    """The counts of a share to its owners, who add and decide."""

    def __init__(self, share: _Share) -> None:
        super().__init__(share, len(share.counts))
        self.bits = share.votes.bits

    def reduced_bytes(self, units: int) -> int:
        """Bytes of the planes of the result."""
        return units * self.bits * WORD

    def metadata(self) -> Tensor | None:
        """One bit per parameter: does any rank of this node have a gradient for it?"""
        return which_has(self.votes.used) if self.votes.scalars.ask_usage else None

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """A parameter is used where any node has a gradient for it."""
        self.votes.used = any_rank_has(all_metadata, len(self.votes.entries))

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The count planes, a row for every owner."""
        shards.zero_()
        for row, (first, last) in zip(shards, spans(len(shards), units, begin, end), strict=True):
            planes = row.view(self._planes, -1)
            planes[:, : (last - first) * WORD] = self.share.counts[:, first * WORD : last * WORD]

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Adds the counts of all nodes, and decides.

        A plane of weight 2^j is as many votes, r of all planes. Their majority, with r - n more
        for +1, is that of all n ranks: ``2 (count + r - n) > r + (r - n)`` says ``2 count > n``,
        and a tie is a tie.
        """
        rule, n = self.votes.rule, self.votes.worker.ranks
        planes = messages.reshape(-1, units * WORD)
        weights = [1 << j for j in range(self._planes)] * len(messages)
        copies = torch.tensor(weights, dtype=torch.int64, device="cpu")
        number = len(messages) * ((1 << self._planes) - 1)
        votes = planes.repeat_interleave(moved(copies, planes.device), dim=0, output_size=number)
        out.zero_()
        if rule.average:
            with on_device_of(messages):
                counted = count_votes(votes, threads=self.votes.worker.threads)
            out.view(self.bits, -1).copy_(counted[: self.bits])
            return
        more = votes.new_full((len(votes) - n, units * WORD), 255)
        votes = torch.cat([votes, more])
        first = self.share.first
        rows = wire.cut_rows(self.votes.rows, first + begin, first + end)
        rows[:, wire.WORD] -= first + begin
        place = self.votes.signs.reduced_place(out.unsqueeze(0), units, zeroed=True)
        source = Source(votes, (units * WORD,))
        self.votes.signs.reduce(self.job, rows, source, place, flags)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Keeps the planes of this rank's share."""
        planes = shards.reshape(len(shards), self.bits, -1).transpose(0, 1).reshape(self.bits, -1)
        self.share.result[:, begin * WORD : end * WORD] = planes[:, : (end - begin) * WORD]


class _Gather(_Stage):
    """The planes of all shares to everyone in the node."""

    def __init__(self, share: _Share) -> None:
        super().__init__(share, share.votes.bits)
        self.unit_bytes *= share.grid.local

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's share, for everyone."""
        planes = self.share.result[:, begin * WORD : end * WORD]
        shards[0].view(self.bits, -1).copy_(planes)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every share into its place."""
        for row, (first, last) in zip(shards, self.share.parts(begin, end), strict=True):
            planes = row.view(self.bits, -1)[:, : (last - first) * WORD]
            self.votes.planes[:, first * WORD : last * WORD] = planes
