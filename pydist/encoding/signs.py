"""Signs reduced by vote, on their way through the road."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.launch import LaunchTarget, launch
from pydist.kernels.signs import unpack_args, vote_args
from pydist.kernels.torch_tensors import target_of
from pydist.transport.coder import NoPrologue, Worker, spans, spoil

OPS = ("vote", "mean", "sum")


@dataclass(frozen=True)
class VoteRule:
    """How votes become a result.

    Attributes:
        average: Keep the count of the votes (for a mean or a sum) instead of the majority.
        ties: ``"hash"``, ``"zero"`` or ``"positive"``; for majorities.
        seed: Seed of the tie hash.
    """

    average: bool = False
    ties: str = "hash"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_ties(self.ties)
        checks.check_seed(self.seed)

    def planes(self, ranks: int) -> int:
        """Bit planes of a reduced message of ``ranks`` voters."""
        if self.average:
            return wire.planes_for(ranks)
        return 2 if self.ties == "zero" else 1


class VoteCoder(NoPrologue):
    """Votes on their way through the road; what is voted on is up to the subclass.

    Unless a subclass decodes them, the result is kept as bit planes, uint8 [planes, bytes], in
    ``self.planes``. A unit is a payload word.
    """

    codec = wire.CODECS["sign"]
    unit_bytes = wire.WORD_BYTES
    repeatable = True
    flags: Tensor

    def __init__(
        self, rule: VoteRule, table: IntArray, worker: Worker, device: torch.device
    ) -> None:
        self.rule = rule
        self.rows = wire.rows_of(table)
        self.units = wire.segments_words(table)
        self.worker = worker
        self._cpu = LaunchTarget(threads=worker.threads)
        self.bits = rule.planes(worker.ranks)
        self.device = device

    def target(self, x: Tensor) -> LaunchTarget:
        """Where kernels on ``x`` run, with the caller's number of CPU threads."""
        return target_of(x) if x.is_cuda else self._cpu

    def message_bytes(self, units: int) -> int:
        """Bytes of the votes of ``units`` payload words."""
        return units * wire.WORD_BYTES

    def reduced_bytes(self, units: int) -> int:
        """Bytes of the reduced planes of ``units`` payload words."""
        return self.bits * units * wire.WORD_BYTES

    def extra(self) -> Tensor | None:
        """No extra bytes."""
        return None

    def merge_extra(self, extras: Tensor) -> None:
        """Nothing to merge."""

    def packed(self, begin: int, end: int) -> Tensor:
        """This rank's votes in words ``begin`` … ``end``, raising ``self.flags``."""
        raise NotImplementedError

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Packs the votes at once and deals them out to the shards."""
        payload = self.packed(begin, end)
        for row, (first, last) in zip(
            shards, spans(len(shards), units, 0, end - begin), strict=True
        ):
            size = (last - first) * wire.WORD_BYTES
            row[:size] = payload[first * wire.WORD_BYTES :][:size]
            row[size:] = 0

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Counts the votes of a shard, or finds the majority."""
        out.zero_()  # words past the data belong to no row
        size = units * wire.WORD_BYTES
        rows = wire.cut_rows(self.rows, begin, end)
        rows[:, wire.WORD] -= begin
        args = vote_args(
            messages.data_ptr(), messages.stride(0), len(messages), out.data_ptr(), size,
            checks.TIES[self.rule.ties], self.rule.seed, self.worker.step, 0,
        )  # fmt: skip
        kernel = "count_votes" if self.rule.average else "majority_vote"
        launch(self.target(messages), kernel, rows, args)

    def joined(self, shards: Tensor, begin: int, end: int) -> Tensor:
        """The shards' planes side by side: uint8 [planes, bytes of ``begin`` … ``end``]."""
        planes = shards.view(len(shards), self.bits, -1).transpose(0, 1).reshape(self.bits, -1)
        return planes[:, : (end - begin) * wire.WORD_BYTES]

    @cached_property
    def planes(self) -> Tensor:
        """The voted planes of the whole call."""
        shape = (self.bits, self.units * wire.WORD_BYTES)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Keeps the planes."""
        part = slice(begin * wire.WORD_BYTES, end * wire.WORD_BYTES)
        self.planes[:, part].copy_(self.joined(shards, begin, end), non_blocking=True)

    def finish(self, flags: Tensor) -> None:
        """Nothing more; the planes are complete."""


def words_of(x: Tensor, begin: int, end: int) -> Tensor:
    """The elements behind payload words ``begin`` … ``end`` of a flat tensor."""
    return x[begin * wire.WORD_BITS : end * wire.WORD_BITS]


class TensorVoteCoder(VoteCoder):
    """Votes with the signs of one tensor and leaves the result in its place.

    Args:
        tensor: float32, float16 or bfloat16, contiguous; read, then overwritten.
        rule: How votes become a result.
        mean: Divide the sum of the votes by the number of ranks.
        worker: This rank; zeros vote by the parity of rank + step.
    """

    def __init__(self, tensor: Tensor, rule: VoteRule, worker: Worker, *, mean: bool) -> None:
        super().__init__(rule, wire.one_segment(tensor.numel()), worker, tensor.device)
        self.rows[:, wire.FIRST] = worker.first
        self.flat = tensor.view(-1)
        self.mean = mean
        self.flags = torch.zeros(1, dtype=torch.int32, device=tensor.device)

    def pack(self, x: Tensor, payload: Tensor) -> None:
        """Writes the signs of ``x`` into ``payload``."""
        rows = wire.one_row(x.data_ptr(), x.numel())
        zero_bit = (self.worker.rank + self.worker.step) % 2
        launch(
            self.target(x), "pack_signs", rows, checks.FLOATS[str(x.dtype)[6:]],
            payload.data_ptr(), zero_bit, self.flags.data_ptr(),
        )  # fmt: skip

    def unpack(self, planes: Tensor, out: Tensor) -> None:
        """Writes what the reduced ``planes`` say into ``out``."""
        ranks = self.worker.ranks if self.rule.average else 0
        divisor = self.worker.ranks if self.mean else 1
        args = unpack_args(planes.data_ptr(), planes.stride(0), len(planes), ranks, divisor)
        rows = wire.one_row(out.data_ptr(), out.numel())
        launch(self.target(out), "unpack_votes", rows, checks.FLOATS[str(out.dtype)[6:]], args)

    def packed(self, begin: int, end: int) -> Tensor:
        """The signs of the elements behind words ``begin`` … ``end``."""
        x = words_of(self.flat, begin, end)
        payload = x.new_empty((end - begin) * wire.WORD_BYTES, dtype=torch.uint8)
        self.pack(x, payload)
        return payload

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Overwrites the elements with the result of their vote."""
        out = words_of(self.flat, begin, end)
        self.unpack(self.joined(shards, begin, end).to(out.device), out)

    def finish(self, flags: Tensor) -> None:
        """Overwrites everything with NaN where any rank's input was not finite."""
        spoil(self.flat, flags)


class ScatterVoteCoder(TensorVoteCoder):
    """The votes on this rank's share of a tensor; each rank's share is a segment of its own.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: As many elements for every rank, contiguous.
        rule: How votes become a result.
        mean: Divide the sum of the votes by the number of ranks.
        worker: This rank.
    """

    def __init__(
        self, output: Tensor, data: Tensor, rule: VoteRule, worker: Worker, *, mean: bool
    ) -> None:
        super().__init__(output, rule, worker, mean=mean)
        self.shares = data.view(worker.ranks, -1) if data.numel() else data.view(worker.ranks, 0)
        self.rows[:, wire.ORDINAL] = worker.rank
        self.unit_bytes = wire.WORD_BYTES * worker.ranks

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's share into the row that goes there."""
        for share, row in zip(self.shares, shards, strict=True):
            self.pack(words_of(share, begin, end), row)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Votes, and writes the result."""
        planes = shards.new_empty(self.reduced_bytes(units))
        self.reduce(shards, planes, units, begin, end, self.flags)
        out = words_of(self.flat, begin, end)
        self.unpack(planes.view(self.bits, -1).to(out.device), out)


class GatherVoteCoder(TensorVoteCoder):
    """The signs of all ranks' tensors, one behind the other.

    Args:
        output: float32, float16 or bfloat16, contiguous; overwritten.
        data: This rank's tensor, contiguous.
        worker: This rank.
    """

    def __init__(self, output: Tensor, data: Tensor, worker: Worker) -> None:
        super().__init__(data, VoteRule(), worker, mean=False)
        self.unit_bytes = wire.WORD_BYTES * worker.ranks
        self.output = output.view(worker.ranks, data.numel())

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Every rank's signs into its place."""
        shards = shards.to(self.output.device)
        for row, out in zip(shards, self.output, strict=True):
            self.unpack(row.unsqueeze(0), words_of(out, begin, end))

    def finish(self, flags: Tensor) -> None:
        """Overwrites everything with NaN where any rank's input was not finite."""
        spoil(self.output, flags)
