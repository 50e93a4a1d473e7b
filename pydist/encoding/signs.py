"""Bare signs on the wire: one bit per element, and votes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pydist.encoding.rows import OWN, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.launch import DeviceRows
from pydist.kernels.signs import unpack_args, vote_args

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


class SignRows(RowCodec):
    """Signs, and the planes of a vote; a unit is a payload word.

    Args:
        rule: How votes become a result.
        ranks: Number of voters.
    """

    number = wire.CODECS["sign"]
    unit = wire.WORD_BITS
    unit_bytes = wire.WORD_BYTES

    def __init__(self, rule: VoteRule, ranks: int) -> None:
        self.rule = rule
        self.bits = rule.planes(ranks)
        self.reduced_unit_bytes = self.bits * wire.WORD_BYTES

    def reduced_columns(self, units: int) -> tuple[int, ...]:
        """Bytes of each plane."""
        return (units * wire.WORD_BYTES,) * self.bits

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
        """Sign bits; zeros vote by the parity of rank + step."""
        zero_bit = (job.worker.draws + job.worker.step) % 2
        job.launch(
            x, "pack_signs", rows, dtype, place.address(), zero_bit, flags.data_ptr(),
            unit=self.unit,
        )  # fmt: skip

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Counts the votes, or finds the majority, as bit planes one behind the other."""
        rule = self.rule
        args = vote_args(
            source.address(), source.stride, source.ranks, place.address(), place.size,
            checks.TIES[rule.ties], rule.seed, job.worker.step,
        )  # fmt: skip
        kernel = "count_votes" if rule.average else "majority_vote"
        job.launch(source.near, kernel, rows, args, unit=self.unit)

    def _values(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        source: Source,
        planes: int,
        voters: int,
    ) -> None:
        """Writes what so many planes say of so many voters (0: of a majority)."""
        divisor = job.worker.ranks if job.mean else 1
        args = unpack_args(source.address(), source.size, planes, voters, divisor)
        job.launch(x, "unpack_votes", rows, dtype, args, unit=self.unit)

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
        """Votes, and writes the result."""
        if source.ranks == 1 and not self.rule.average:
            self._values(job, x, rows, dtype, source, 1, 0)
            return
        units = source.size // wire.WORD_BYTES
        reduced = source.near.new_zeros((1, self.reduced_bytes(units)))
        place = self.reduced_place(reduced, units, zeroed=True)
        self.reduce(job, rows.copy(), source, place, flags)
        self.decode_reduced(job, x, rows, dtype, self.reduced_source(reduced, units), flags)

    def decode_reduced(
        self, job: Job, x: Tensor, rows: IntArray, dtype: int, source: Source, flags: Tensor
    ) -> None:
        """What the planes of a vote say."""
        voters = job.worker.ranks if self.rule.average else 0
        self._values(job, x, rows, dtype, source, self.bits, voters)
