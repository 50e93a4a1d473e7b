"""A bucket of gradients on the road: parameters of several codecs, and raw ones, in one message.

A unit on the road is a *slice*: one of equally many pieces of every owner's share of every section.
A message's row for an owner holds, section after section, the section's bytes of as many slices,
padded to the same length for all owners.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw, Sign, Ternary, TopK
from pydist.encoding.bucket_sections import (
    BlockSection,
    Bucket,
    DoubleSection,
    Feedback,
    RawSection,
    Section,
    VoteSection,
)
from pydist.encoding.bucket_stage import BucketStage, is_coded
from pydist.encoding.shares import Part, Piece
from pydist.encoding.ternary_section import TernarySection
from pydist.encoding.topk_section import TopKSection
from pydist.formats import ternary, wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.transport.coder import Worker, spoil


@dataclass(frozen=True)
class Slot:
    """A section's place in a row of a message."""

    section: Section
    number: int
    piece: Piece
    begin: int
    end: int


def check_bucket_codec(codec: Codec) -> None:
    """Raises TypeError unless parameters of this codec can share a bucket's messages."""
    known = isinstance(codec, Sign | Raw | Ternary | TopK) or isinstance(
        codec.block_format, BlockFormat
    )
    if not known:
        raise TypeError(f"codec {codec} cannot share the messages of a bucket of gradients")


def bytes_in_bucket(codec: Codec, numel: int) -> int:
    """Bytes of the messages of one parameter's whole units; 0 of codecs that are always smaller."""
    if isinstance(codec, TopK):
        return codec.topk_format.blocks(numel) * codec.topk_format.block_bytes
    if isinstance(codec, Ternary):
        return ternary.units_for(numel) * ternary.UNIT_BYTES
    form = codec.block_format
    return 0 if form is None else form.blocks(numel) * (form.block_bytes + SCALE_BYTES)


class BucketPlan:
    """How the parameters of a bucket share its messages; the same for many calls.

    Args:
        parts: The bucket's parameters.
        codecs: Each part's codec; ``None`` travels raw.
        feedback: Whether each part keeps residuals; parts of one section agree.
        dtype: Type of the bucket's buffer.
        ranks: Ranks that take part.
        owners: ``ranks`` where each reduces a share, 1 where everyone reduces everything.

    Attributes:
        slices: Pieces that every owner's share is cut into.
        sections: The sections, in the order of their bytes.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        codecs: Sequence[Codec | None],
        feedback: Sequence[bool],
        dtype: torch.dtype,
        ranks: int,
        owners: int,
    ) -> None:
        self.parts, self.feedback = list(parts), list(feedback)
        self.dtype, self.ranks, self.owners = dtype, ranks, owners
        groups: dict[tuple[Codec | None, bool], list[int]] = {}
        for i, key in enumerate(zip(codecs, feedback, strict=True)):
            groups.setdefault(key, []).append(i)
        self.sections: list[Section] = [
            self._section(codec, indices) for (codec, _), indices in groups.items()
        ]
        self.with_feedback = [keeps for _, keeps in groups]
        self.slices = max((section.shares.most for section in self.sections), default=0)
        self._slots: dict[tuple[int, int, bool], list[Slot]] = {}

    def _section(self, codec: Codec | None, indices: list[int]) -> Section:
        if codec is None and self.dtype == torch.float64:
            return DoubleSection(self.parts, indices, self.dtype, self.owners)
        if codec is None or isinstance(codec, Raw):
            name = codec.dtype if codec is not None else None
            dtype = getattr(torch, name) if name else self.dtype
            return RawSection(self.parts, indices, dtype, self.owners)
        check_bucket_codec(codec)
        if isinstance(codec, TopK):
            return TopKSection(self.parts, indices, codec.topk_format, self.owners)
        if isinstance(codec, Ternary):
            return TernarySection(self.parts, indices, codec.clip, self.ranks, self.owners)
        if codec.block_format is None:
            return VoteSection(self.parts, indices, self.ranks, self.owners)
        entropy = getattr(codec, "entropy", None)
        return BlockSection(self.parts, indices, codec.block_format, self.owners, entropy)

    @property
    def units(self) -> int:
        """Slices of all owners' shares."""
        return self.slices * self.owners

    def message_bytes(self, units: int) -> int:
        """Bytes of one owner's row of ``units`` slices."""
        return self._row_bytes(units, reduced=False)

    def reduced_bytes(self, units: int) -> int:
        """Bytes of a reduced row of ``units`` slices."""
        return self._row_bytes(units, reduced=True)

    def _row_bytes(self, slices: int, *, reduced: bool) -> int:
        total = 0
        for section in self.sections:
            unit = section.reduced_unit_bytes if reduced else section.unit_bytes
            size = section.shares.room(slices, self.slices) * unit
            total += -(-size // wire.WORD_BYTES) * wire.WORD_BYTES
        return total

    def slots(self, begin: int, end: int, *, reduced: bool) -> list[Slot]:
        """Where each section's bytes of slices ``begin`` … ``end`` stand in a row."""
        key = (begin, end, reduced)
        if key not in self._slots:
            self._slots[key] = list(self._lay_out(begin, end, reduced))
        return self._slots[key]

    def _lay_out(self, begin: int, end: int, reduced: bool) -> Iterator[Slot]:
        at = 0
        for number, section in enumerate(self.sections):
            piece = section.shares.piece(begin, end, self.slices)
            unit = section.reduced_unit_bytes if reduced else section.unit_bytes
            size = piece.room * unit
            yield Slot(section, number, piece, at, at + size)
            at += -(-size // wire.WORD_BYTES) * wire.WORD_BYTES


class BucketCoder:
    """A bucket's gradients, reduced over all ranks in their place.

    Args:
        plan: The bucket's layout.
        flat: Its buffer: one-dimensional, contiguous; read, then overwritten.
        worker: This rank.
        mean: Divide sums by the number of ranks.
        seed: Seed of stochastic rounding and the tie hash.
        feedback: The residuals of each section that keeps any.
        staged: New residuals go elsewhere, so encoding may be done in vain.

    Attributes:
        seconds: Time spent encoding, reducing and decoding (on CUDA: launching).
        stage: What shortens the sections that are entropy coded; ``None`` where none is.
        not_finite: int32[1], the flags of all ranks; known when the call is complete.
    """

    codec = wire.CODECS["bucket"]
    bits = 0  # of several codecs

    def __init__(
        self,
        plan: BucketPlan,
        flat: Tensor,
        worker: Worker,
        *,
        mean: bool,
        seed: int,
        feedback: Sequence[Feedback | None],
        staged: bool,
    ) -> None:
        self.plan, self.feedback = plan, list(feedback)
        self.flags = torch.zeros(1, dtype=torch.int32, device=flat.device)
        self.bucket = Bucket(flat, worker, mean, seed, self.flags, torch.zeros_like(self.flags))
        coded = any(is_coded(section) for section in plan.sections)
        self.stage = BucketStage(plan, self.bucket) if coded else None
        self.together = plan.owners
        self.units = plan.units
        self.message_bytes, self.reduced_bytes = plan.message_bytes, plan.reduced_bytes
        row = plan.message_bytes(plan.slices)
        self.unit_bytes = max(1, -(-row // max(1, plan.slices)))
        self.repeatable = staged or not any(feedback)
        self.seconds = {"encode": 0.0, "reduce": 0.0, "decode": 0.0}
        self.not_finite = self.flags

    # ----------------------------------------------------------------- who has a gradient

    def _listed(self) -> Iterator[tuple[Feedback, slice]]:
        """Feedback of the sections that keep residuals, and their place in the usage bits."""
        at = 0
        for section, feedback in zip(self.plan.sections, self.feedback, strict=True):
            if feedback is not None and feedback.owner is not None:
                yield feedback, slice(at, at + len(section.indices))
                at += len(section.indices)

    def extra(self) -> Tensor | None:
        """One bit for each parameter with an owner's residual: is its gradient not all zeros?"""
        bits = [torch.from_numpy(feedback.used) for feedback, _ in self._listed()]
        if not bits:
            return None
        return _packed(torch.cat(bits))

    def merge_extra(self, extras: Tensor) -> None:
        """A parameter is used where any rank's gradient is not all zeros."""
        bits = _unpacked(extras.cpu()).amax(0).bool().numpy()
        for feedback, place in self._listed():
            feedback.used_by_any = bits[place]

    # ----------------------------------------------------------------- scalers

    def prologue(self) -> Tensor | None:
        """This rank's scalers of all parameters that travel as trits, float32 as bytes."""
        sections = [s for s in self.plan.sections if isinstance(s, TernarySection)]
        for section in sections:
            own = section.scalers(self.bucket)
            self.bucket.scalers[section] = own, own
        if not sections:
            return None
        return torch.cat([own for own, _ in self.bucket.scalers.values()]).view(torch.uint8)

    def merge_prologue(self, prologues: Tensor) -> None:
        """Takes the largest scaler over ranks; NaN where one is."""
        shared = prologues.view(torch.float32).amax(0).to(self.flags.device)
        at = 0
        for section, (own, _) in self.bucket.scalers.items():
            self.bucket.scalers[section] = own, shared[at : at + len(own)]
            at += len(own)

    # ----------------------------------------------------------------- on the way

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's bytes of slices ``begin`` … ``end``, a row for every owner."""
        with _Timed(self.seconds, "encode"):
            first = begin // self.plan.owners
            for slot in self.plan.slots(first, first + units, reduced=False):
                out = shards[:, slot.begin : slot.end]
                if out.numel():
                    feedback = self.feedback[slot.number]
                    slot.section.encode(self.bucket, feedback, out, slot.piece)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Sums in rank order, divides for a mean, adds the owner's residuals, encodes again."""
        with _Timed(self.seconds, "reduce"):
            owners = self.plan.owners
            mine = self.bucket.worker.rank if owners > 1 else 0
            first = (begin - mine * units) // owners
            sent = self.plan.slots(first, first + units, reduced=False)
            for slot, to in zip(
                sent, self.plan.slots(first, first + units, reduced=True), strict=True
            ):
                rows, part = messages[:, slot.begin : slot.end], out[to.begin : to.end]
                if part.numel():
                    slot.section.reduce(
                        self.bucket, self.feedback[slot.number], rows, part, slot.piece.of(mine),
                        flags,
                    )  # fmt: skip

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into the bucket."""
        with _Timed(self.seconds, "decode"):
            shards = shards.to(self.bucket.flat.device)
            first = begin // self.plan.owners
            for slot in self.plan.slots(first, first + units, reduced=True):
                part = shards[:, slot.begin : slot.end]
                if part.numel():
                    slot.section.decode(self.bucket, part, slot.piece)

    def finish(self, flags: Tensor) -> None:
        """Overwrites the bucket with NaN where any rank's input, or a value, was not finite."""
        self.not_finite = flags | self.bucket.seen.to(flags.device)
        spoil(self.bucket.flat, self.not_finite)


class _Timed:
    """Adds the time spent inside to one of several counters."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.began


def _packed(bits: Tensor) -> Tensor:
    """Booleans as bits, the first one lowest, padded to 4 bytes."""
    size = wire.payload_bytes(bits.numel()) * 8
    padded = torch.zeros(size, dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << _places(bits.device)).sum(1, dtype=torch.uint8)


def _unpacked(rows: Tensor) -> Tensor:
    """The inverse, row by row."""
    bits = (rows.unsqueeze(2) >> _places(rows.device)) & 1
    return bits.view(len(rows), -1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
