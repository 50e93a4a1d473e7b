"""A bucket of gradients: parameters of several codecs, and raw ones, in one message.

A *section* is the parameters of a bucket that one codec encodes. A unit on the wire is a *slice*:
one of equally many pieces of every owner's share of every section. A message's row for an owner
holds, section after section, the section's bytes of as many slices, padded to the same length for
all owners.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec
from pydist.encoding.blocks import BlockRows
from pydist.encoding.bucket_entropy import BucketEliasCoder
from pydist.encoding.choose import rows_of
from pydist.encoding.rows import REDUCED, Job, RowCodec, dtype_of, fill_nan
from pydist.encoding.shares import Part, Piece, Shares
from pydist.encoding.ternary import TernaryRows
from pydist.encoding.usage import Usage, packed, unpacked
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.checks import FLOATS
from pydist.kernels.device import keep_used
from pydist.kernels.launch import DeviceRows
from pydist.kernels.torch_tensors import floats_near
from pydist.transport.coder import Worker

FLOAT32 = FLOATS["float32"]


@dataclass
class Feedback:
    """Where a section's residuals are, by part.

    Attributes:
        worker: Address of each part's residual as if its element 0 were there.
        worker_out: Where the new one goes; equal for in place.
        owner: The same of what this rank keeps as the owner of a share; ``None`` without.
        owner_out: Where the new one goes.
        dtype: Storage of all of them.
        used: Whether this rank's gradient is anything but zeros; on the device that has the
            gradients in usage words (:mod:`pydist.kernels.device`), ``None`` here.
        used_by_any: Whether any rank's is; known once all have said so, here or on the device.
        keep: What must stay in memory for the addresses to hold.
        values: Address of what is encoded instead of each part's gradient, of the residuals' type,
            as if its element 0 were there; ``None`` encodes the gradients in the bucket.
        masked: Where those values become zero as soon as a sparse codec has sent them.
    """

    worker: IntArray
    worker_out: IntArray
    owner: IntArray | None
    owner_out: IntArray | None
    dtype: str
    used: np.ndarray | None
    used_by_any: np.ndarray | None
    keep: list[Tensor] = field(default_factory=list)
    values: IntArray | None = None
    masked: np.ndarray | None = None

    def learn(self, indices: list[int], usage: Usage | None) -> None:
        """What the device knows of the parts with these places in the bucket; waits for it."""
        if usage is None:
            return
        if self.used is None:
            self.used = usage.on_host(everyones=False)[indices]
        if self.owner is not None and self.used_by_any is None:
            self.used_by_any = usage.on_host(everyones=True)[indices]

    def input_rows(self, rows: IntArray, part: IntArray, dtype: int) -> tuple[IntArray, int]:
        """The rows with the addresses of what is encoded with residuals, and its type.

        Args:
            rows: Rows that are used, with the addresses of their elements in the bucket.
            part: Which part each row is of.
            dtype: The bucket's type, as kernels count them.
        """
        if self.values is None:
            return rows, dtype
        rows = rows.copy()
        rows[:, wire.X] = self.values[part] + checks.ITEMSIZE[self.dtype] * rows[:, wire.FIRST]
        return rows, FLOATS[self.dtype]

    def place(self, rows: IntArray, part: IntArray, *, owner: bool) -> None:
        """Fills in where the residuals of rows are that have some."""
        source, target, used = self.worker, self.worker_out, self.used
        if owner:
            assert self.owner is not None and self.owner_out is not None
            source, target, used = self.owner, self.owner_out, self.used_by_any
        skip = checks.ITEMSIZE[self.dtype] * rows[:, wire.FIRST]
        rows[:, wire.MOMENTUM] = source[part] + skip
        rows[:, wire.MOMENTUM_OUT] = target[part] + skip
        if used is not None:
            rows[~used[part], wire.MOMENTUM : wire.N] = 0


class Section:
    """The parameters of a bucket that one codec encodes, with or without residuals.

    Args:
        parts: The bucket's parts.
        indices: Which of them they are.
        codec: Their codec on the wire.
        owners: How many ranks own shares of them.
        coded: Messages travel as Elias codes.

    Attributes:
        shares: How they are divided among the owners.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        indices: list[int],
        codec: RowCodec,
        owners: int,
        *,
        coded: bool = False,
    ) -> None:
        self.indices, self.codec, self.coded = indices, codec, coded
        mine = [parts[i] for i in indices]
        self.shares = Shares(mine, codec.unit, owners)
        self._whole = Shares(mine, codec.unit, 1) if isinstance(codec, TernaryRows) else None

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit in a message."""
        return self.codec.unit_bytes

    @property
    def reduced_unit_bytes(self) -> int:
        """Bytes of a unit after the reduction."""
        return self.codec.reduced_unit_bytes

    def _addressed(self, job: Job, flat: Tensor, piece: Piece, stride: int) -> IntArray:
        """A piece's rows, with the addresses of their elements, of messages ``stride`` apart."""
        rows = piece.rows.copy()
        rows[:, wire.X] = flat.data_ptr() + rows[:, wire.X] * flat.element_size()
        rows[:, wire.MESSAGE] = piece.owner * stride
        self.codec.attach(job, rows, piece.part)
        return rows

    def scalers(self, job: Job, flat: Tensor) -> Tensor | None:
        """This rank's own scaler of every parameter, float32; ``None`` where there are none."""
        if not isinstance(self.codec, TernaryRows) or self._whole is None:
            return None
        piece = self._whole.piece(0, 1, 1)  # whole parameters
        rows = piece.rows.copy()
        rows[:, wire.X] = flat.data_ptr() + rows[:, wire.X] * flat.element_size()
        return self.codec.find_scalers(job, flat, rows, piece.part, len(self.indices))

    def encode(
        self,
        job: Job,
        flat: Tensor,
        feedback: Feedback | None,
        out: Tensor,
        piece: Piece,
        usage: Usage | None = None,
    ) -> None:
        """Writes a piece's bytes into ``out``, uint8 [owners, bytes], which is zero."""
        rows, dtype = self._addressed(job, flat, piece, out.stride(0)), dtype_of(flat)
        place = self.codec.place(out, piece.room, zeroed=True)
        if feedback is None:
            self.codec.encode(job, flat, rows, dtype, place, job.flags)
            return
        feedback.place(rows, piece.part, owner=False)
        state = FLOATS[feedback.dtype]
        if feedback.values is None or feedback.used is None:
            if feedback.values is not None:
                rows, dtype = feedback.input_rows(rows, piece.part, dtype)
            table = self._with_residuals(job, flat, rows, piece.part, usage, everyones=False)
            self.codec.encode(job, flat, table, dtype, place, job.flags, state=state)
            if feedback.masked is not None:
                self.codec.clear_sent(job, flat, rows, dtype, place, job.flags)
            return
        used = feedback.used[piece.part]
        self.codec.encode(job, flat, rows[~used], dtype, place, job.flags)
        rows, dtype = feedback.input_rows(rows[used], piece.part[used], dtype)
        self.codec.encode(job, flat, rows, dtype, place, job.flags, state=state)
        if feedback.masked is not None:
            rows = rows[feedback.masked[piece.part[used]]]
            self.codec.clear_sent(job, flat, rows, dtype, place, job.flags)

    def _with_residuals(
        self,
        job: Job,
        near: Tensor,
        rows: IntArray,
        part: IntArray,
        usage: Usage | None,
        *,
        everyones: bool,
    ) -> IntArray | DeviceRows:
        """The rows; where a device knows which parameters are used, those it makes of them."""
        if usage is None or not near.is_cuda or not len(rows):
            return rows
        index = np.asarray(self.indices)[part]
        if self.codec.on_host:
            unused = ~usage.on_host(everyones=everyones)[index]
            rows[unused, wire.MOMENTUM : wire.N] = 0
            return rows
        address = usage.address(everyones=everyones)
        return keep_used(job.target(near), rows, usage.places[index], address, self.codec.unit)

    def reduce(
        self,
        job: Job,
        feedback: Feedback | None,
        messages: Tensor,
        out: Tensor,
        piece: Piece,
        flags: Tensor,
        usage: Usage | None = None,
    ) -> None:
        """Reduces one owner's ``piece``: uint8 [ranks, bytes] to uint8 [bytes], which is zero.

        Sums in rank order, divides for a mean, adds the owner's residual, encodes again. ``flags``,
        int32[1], is raised where the result is not finite.
        """
        source = self.codec.source(messages, piece.room)
        place = self.codec.reduced_place(out.unsqueeze(0), piece.room, zeroed=True)
        rows = piece.rows.copy()
        if feedback is None or feedback.owner is None:
            self.codec.reduce(job, rows, source, place, flags)
            return
        total = floats_near(messages, int(rows[:, wire.N].sum()))
        wire.dense_addresses(rows, wire.X, total.data_ptr(), total.element_size())
        self.codec.decode(job, total, rows, FLOAT32, source, job.divisor, flags)
        feedback.place(rows, piece.part, owner=True)
        table = self._with_residuals(job, messages, rows, piece.part, usage, everyones=True)
        self.codec.encode(
            job, total, table, FLOAT32, place, flags, state=FLOATS[feedback.dtype], phase=REDUCED
        )

    def decode(self, job: Job, flat: Tensor, shards: Tensor, piece: Piece) -> None:
        """Writes a piece's values, from uint8 [owners, bytes], into the bucket."""
        source = self.codec.reduced_source(shards, piece.room)
        rows = self._addressed(job, flat, piece, shards.stride(0))
        self.codec.decode_reduced(job, flat, rows, dtype_of(flat), source, job.seen)


@dataclass(frozen=True)
class Slot:
    """A section's place in a row of a message."""

    section: Section
    number: int
    piece: Piece
    begin: int
    end: int


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
        rows = rows_of(codec, self.dtype, self.ranks)
        coded = isinstance(rows, BlockRows) and getattr(codec, "entropy", None) == "elias"
        return Section(self.parts, indices, rows, self.owners, coded=coded)

    @cached_property
    def usage_places(self) -> IntArray:
        """For every part a place in a list; those of sections with residuals come first."""
        order = [
            index
            for kept in (True, False)
            for section, keeps in zip(self.sections, self.with_feedback, strict=True)
            if keeps is kept
            for index in section.indices
        ]
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        return places

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
        usage: Which parameters have a gradient, where the bucket's device knows it.

    Attributes:
        seconds: Time spent encoding, reducing and decoding (on CUDA: launching).
        entropy_coder: What shortens the sections that are entropy coded; ``None`` where none is.
        not_finite: int32, the flags of all ranks; known when the call is complete.
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
        usage: Usage | None = None,
    ) -> None:
        self.plan, self.feedback, self.usage = plan, list(feedback), usage
        self.flat = flat
        self.job = Job(worker, mean, seed, flat.device, None if usage is None else usage.memory)
        self.flags, self.all_flags = self.job.flags, self.job.all_flags
        self.agreed = {
            f"{name} of codec {i}": value
            for i, section in enumerate(plan.sections)
            for name, value in section.codec.agreed.items()
        }
        coded = any(section.coded for section in plan.sections)
        self.entropy_coder = BucketEliasCoder(plan, self.job) if coded else None
        self.together = plan.owners
        self.units = plan.units
        self.message_bytes, self.reduced_bytes = plan.message_bytes, plan.reduced_bytes
        row = plan.message_bytes(plan.slices)
        self.unit_bytes = max(1, -(-row // max(1, plan.slices)))
        self.repeatable = staged or not any(feedback)
        if usage is not None:
            usage.told = sum(len(kept.worker) for kept, _ in self._listed())
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

    def metadata(self) -> Tensor | None:
        """One bit for each parameter with an owner's residual: is its gradient not all zeros?"""
        used = [feedback.used for feedback, _ in self._listed() if feedback.used is not None]
        return packed(torch.from_numpy(np.concatenate(used))) if used else None

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """A parameter is used where any rank's gradient is not all zeros."""
        bits = unpacked(all_metadata.cpu()).amax(0).bool().numpy()
        for feedback, place in self._listed():
            feedback.used_by_any = bits[place]

    # ----------------------------------------------------------------- scalers

    def scales(self) -> Tensor | None:
        """This rank's scalers of all parameters that have some, float32 as bytes."""
        found = [section.scalers(self.job, self.flat) for section in self.plan.sections]
        known = [scalers for scalers in found if scalers is not None]
        return torch.cat(known).view(torch.uint8) if known else None

    def merge_scales(self, all_scales: Tensor) -> None:
        """Takes the largest scaler over ranks; NaN where one is."""
        everyones, at = all_scales.view(torch.float32), 0
        for section in self.plan.sections:
            if isinstance(section.codec, TernaryRows):
                end = at + len(section.indices)
                section.codec.share_scalers(self.job, everyones[:, at:end])
                at = end

    # ----------------------------------------------------------------- messages

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """This rank's bytes of slices ``begin`` … ``end``, a row for every owner."""
        with _Timed(self.seconds, "encode"):
            shards.zero_()
            first = begin // self.plan.owners
            for slot in self.plan.slots(first, first + units, reduced=False):
                out = shards[:, slot.begin : slot.end]
                if out.numel():
                    feedback = self.feedback[slot.number]
                    slot.section.encode(self.job, self.flat, feedback, out, slot.piece, self.usage)

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Sums in rank order, divides for a mean, adds the owner's residuals, encodes again."""
        with _Timed(self.seconds, "reduce"):
            out.zero_()
            owners = self.plan.owners
            mine = self.job.worker.rank if owners > 1 else 0
            first = (begin - mine * units) // owners
            sent = self.plan.slots(first, first + units, reduced=False)
            for slot, to in zip(
                sent, self.plan.slots(first, first + units, reduced=True), strict=True
            ):
                rows, part = messages[:, slot.begin : slot.end], out[to.begin : to.end]
                if part.numel():
                    slot.section.reduce(
                        self.job, self.feedback[slot.number], rows, part, slot.piece.of(mine),
                        flags, self.usage,
                    )  # fmt: skip

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """The reduced shards into the bucket."""
        with _Timed(self.seconds, "decode"):
            first = begin // self.plan.owners
            for slot in self.plan.slots(first, first + units, reduced=True):
                part = shards[:, slot.begin : slot.end]
                if part.numel():
                    slot.section.decode(self.job, self.flat, part, slot.piece)

    def finish(self, flags: Tensor) -> None:
        """Overwrites the bucket with NaN where any rank's input, or a value, was not finite."""
        self.not_finite = self.job.merged(flags)
        fill_nan(self.flat, self.not_finite)


class _Timed:
    """Adds the time spent inside to one of several counters."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.began
