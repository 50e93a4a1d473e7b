"""Signs reduced by vote, on their way through the road."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pydist import _C, checks, kernels, wire
from pydist.operators import target_of
from pydist.wire import IntArray

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


class VoteCoder:
    """Votes on their way through the road; what is voted on is up to the subclass.

    Unless a subclass decodes them, the result is kept as bit planes, uint8 [planes, bytes], in
    ``self.planes``.
    """

    codec = wire.CODECS["sign"]
    block_words = 1
    repeatable = True

    def __init__(
        self,
        rule: VoteRule,
        table: IntArray,
        *,
        ranks: int,
        step: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.rule = rule
        self.rows = wire.rows_of(table)
        self.words = wire.segments_words(table)
        self.ranks = ranks
        self.step = step
        self._cpu = kernels.Target(threads=threads)
        self.bits = rule.planes(ranks)
        self.device = device

    def target(self, x: Tensor) -> kernels.Target:
        """Where kernels on ``x`` run, with the caller's number of CPU threads."""
        return target_of(x) if x.is_cuda else self._cpu

    def reduced_bytes(self, words: int) -> int:
        """Bytes of the reduced planes of ``words`` payload words."""
        return self.bits * words * wire.WORD_BYTES

    def extra(self) -> Tensor | None:
        """No extra bytes."""
        return None

    def merge_extra(self, extras: Tensor) -> None:
        """Nothing to merge."""

    def encode(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """This rank's votes; see the subclass."""
        raise NotImplementedError

    def reduce(self, messages: Tensor, offset: int, begin: int, end: int) -> Tensor:
        """Counts the votes of a shard, or finds the majority."""
        size = (end - begin) * wire.WORD_BYTES
        planes = messages.new_zeros((self.bits, size))
        rows = wire.cut_rows(self.rows, begin, end)
        rows[:, wire.WORD] -= begin
        args = _C.VoteArgs(
            messages.data_ptr() + offset, messages.stride(0), self.ranks, planes.data_ptr(), size,
            checks.TIES[self.rule.ties], self.rule.seed, self.step, 0,
        )  # fmt: skip
        kernel = "count_votes" if self.rule.average else "majority_vote"
        kernels.launch(self.target(messages), kernel, rows, args)
        return planes.view(-1)

    def joined(self, shards: Tensor, begin: int, end: int) -> Tensor:
        """The shards' planes side by side: uint8 [planes, bytes of ``begin`` … ``end``]."""
        planes = shards.view(len(shards), self.bits, -1).transpose(0, 1).reshape(self.bits, -1)
        return planes[:, : (end - begin) * wire.WORD_BYTES]

    @cached_property
    def planes(self) -> Tensor:
        """The voted planes of the whole call."""
        shape = (self.bits, self.words * wire.WORD_BYTES)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def decode(self, shards: Tensor, begin: int, end: int) -> None:
        """Keeps the planes."""
        part = slice(begin * wire.WORD_BYTES, end * wire.WORD_BYTES)
        self.planes[:, part].copy_(self.joined(shards, begin, end), non_blocking=True)

    def finish(self, flags: Tensor) -> None:
        """Nothing more; the planes are complete."""


class TensorVoteCoder(VoteCoder):
    """Votes with the signs of one tensor and leaves the result in its place.

    Args:
        tensor: float32, float16 or bfloat16, contiguous; read, then overwritten.
        rule: How votes become a result.
        mean: Divide the sum of the votes by the number of ranks.
        rank: This rank; zeros vote by the parity of rank + step.
        ranks: Number of voters.
        step: Step of the call.
        threads: CPU threads.
    """

    def __init__(
        self,
        tensor: Tensor,
        rule: VoteRule,
        *,
        mean: bool,
        rank: int,
        ranks: int,
        step: int,
        threads: int,
    ) -> None:
        table = wire.one_segment(tensor.numel())
        super().__init__(rule, table, ranks=ranks, step=step, device=tensor.device, threads=threads)
        self.flat = tensor.view(-1)
        self.zero_bit = (rank + step) % 2
        self.mean = mean
        self._dtype = checks.FLOATS[str(tensor.dtype)[6:]]
        self.flags = torch.zeros(1, dtype=torch.int32, device=tensor.device)

    def _part(self, begin: int, end: int) -> Tensor:
        return self.flat[begin * wire.WORD_BITS : end * wire.WORD_BITS]

    def encode(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The signs of the elements behind words ``begin`` … ``end``."""
        x = self._part(begin, end)
        payload = x.new_empty((end - begin) * wire.WORD_BYTES, dtype=torch.uint8)
        rows = wire.one_row(x.data_ptr(), x.numel())
        kernels.launch(
            self.target(x), "pack_signs", rows, self._dtype, payload.data_ptr(), self.zero_bit,
            self.flags.data_ptr(),
        )  # fmt: skip
        return payload, self.flags

    def decode(self, shards: Tensor, begin: int, end: int) -> None:
        """Overwrites the elements with the result of their vote."""
        out = self._part(begin, end)
        planes = self.joined(shards, begin, end).to(out.device)
        ranks = self.ranks if self.rule.average else 0
        divisor = self.ranks if self.mean else 1
        args = _C.Unpack(planes.data_ptr(), planes.stride(0), self.bits, ranks, divisor)
        rows = wire.one_row(out.data_ptr(), out.numel())
        kernels.launch(self.target(out), "unpack_votes", rows, self._dtype, args)

    def finish(self, flags: Tensor) -> None:
        """Overwrites everything with NaN where any rank's input was not finite."""
        bad = flags & wire.FLAG_NON_FINITE
        if bad.is_cuda:  # no host synchronisation
            self.flat.masked_fill_(bad.bool(), float("nan"))
        elif bad.item():
            self.flat.fill_(float("nan"))
