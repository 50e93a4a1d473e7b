"""Rows of a bucket whose sections of levels travel as Elias codes, the others as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.bucket_sections import BlockSection, Bucket, Section, launch
from pydist.encoding.shares import Piece
from pydist.formats import elias, wire
from pydist.formats.blocks import SCALE_BYTES
from pydist.formats.wire import IntArray
from pydist.kernels.elias import native_args
from pydist.transport.coder import Span

LENGTH_BYTES = 4
"""A message begins with the length of each Elias payload in it, uint32."""


class SlotLike(Protocol):
    """A section's place in a row: a :class:`pydist.encoding.bucket_coder.Slot`."""

    @property
    def section(self) -> Section: ...  # noqa: D102
    @property
    def piece(self) -> Piece: ...  # noqa: D102
    @property
    def begin(self) -> int: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102


class PlanLike(Protocol):
    """How sections share rows: a :class:`pydist.encoding.bucket_coder.BucketPlan`."""

    owners: int
    sections: list[Section]

    def message_bytes(self, units: int) -> int: ...  # noqa: D102
    def slots(self, begin: int, end: int, *, reduced: bool) -> Sequence[SlotLike]: ...  # noqa: D102


def is_coded(section: Section) -> bool:
    """Whether a section's rows travel as Elias codes."""
    return isinstance(section, BlockSection) and section.entropy == "elias"


class _Coded:
    """The blocks of one section in one row, and the kernels between both of their forms."""

    def __init__(self, slot: SlotLike, owner: int) -> None:
        assert isinstance(slot.section, BlockSection)
        self.form = slot.section.form
        piece = slot.piece.of(owner)
        self.rows = piece.rows
        self.begin, self.end = slot.begin, slot.end
        self.code_bytes = piece.room * self.form.block_bytes
        self.table: IntArray = np.zeros((len(self.rows), 4), dtype=np.int64)
        self.table[:, 1] = self.rows[:, wire.N]

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most bytes of the Elias payload."""
        least = elias.head_bytes(self.table, self.form)
        return least, elias.longest_bytes(self.table, self.form)

    def launch(
        self, bucket: Bucket, kernel: str, row: Tensor, payload: Tensor, result: Tensor
    ) -> None:
        """Runs ``elias_encode`` or ``elias_decode`` between a row and a payload."""
        if not len(self.rows):
            return
        args = native_args(
            self.form, (row[self.begin :].data_ptr(), self.code_bytes), payload.data_ptr(),
            payload.numel(), elias.count_blocks(self.table, self.form), result.data_ptr(),
        )  # fmt: skip
        launch(bucket, row, kernel, self.rows, args, unit=self.form.block)


class BucketStage:
    """Shortens the sections of a bucket that are to be entropy coded
    (:class:`pydist.transport.coder.Stage`).

    A message is the lengths of its Elias payloads, then section after section: an Elias payload,
    or the section's bytes as they are.

    Args:
        plan: The bucket's layout.
        bucket: The call's data.
    """  # noqa: D205

    def __init__(self, plan: PlanLike, bucket: Bucket) -> None:
        self.plan, self.bucket = plan, bucket
        self._count = sum(is_coded(section) for section in plan.sections)

    def _slots(
        self, row_bytes: int, units: int, spans: Sequence[Span]
    ) -> list[tuple[int, Sequence[SlotLike]]]:
        """Owner and layout of each row.

        A row for every owner, or from every owner, comes with spans that differ; rows of one
        owner's are this rank's own.
        """
        owners, reduced = self.plan.owners, row_bytes != self.plan.message_bytes(units)
        differ = len(spans) > 1 and spans[0] != spans[-1]
        found = []
        for i, (begin, _) in enumerate(spans):
            owner = 0 if owners == 1 else i if differ else self.bucket.worker.rank
            first = (begin - owner * units) // owners
            found.append((owner, self.plan.slots(first, first + units, reduced=reduced)))
        return found

    def bounds(self, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of a message, of whichever owner and phase."""
        units = span[1] - span[0]
        least = most = LENGTH_BYTES * self._count
        for sent, reduced in zip(
            self.plan.slots(0, units, reduced=False),
            self.plan.slots(0, units, reduced=True),
            strict=True,
        ):
            if not is_coded(sent.section):
                sizes = sent.end - sent.begin, reduced.end - reduced.begin
                least, most = least + min(sizes), most + max(sizes)
                continue
            assert isinstance(sent.section, BlockSection)
            form, room = sent.section.form, sent.piece.room
            streams = room * elias.stream_bytes(form.block, form)
            most += room * (elias.END_BYTES + SCALE_BYTES) + -(-streams // 4) * 4
        return least, most

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The rows as they travel; on CUDA this waits for the device, to learn their lengths."""
        shape = len(rows), self._count
        results = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        laid_out, coded = self._slots(rows.shape[1], units, spans), []
        for row, (owner, slots), into in zip(rows, laid_out, results, strict=True):
            mine = [_Coded(slot, owner) for slot in slots if is_coded(slot.section)]
            rooms = [row.new_empty(one.bounds[1]) for one in mine]
            for one, room, result in zip(mine, rooms, into, strict=True):
                one.launch(self.bucket, "elias_encode", row, room, result)
            coded.append((mine, rooms))
        messages = []
        for row, (_, slots), (mine, rooms), streams in zip(
            rows, laid_out, coded, results.tolist(), strict=True
        ):
            payloads = [
                room[: elias.payload_bytes(one.table, one.form, size)]
                for one, room, size in zip(mine, rooms, streams, strict=True)
            ]
            lengths = np.array([x.numel() for x in payloads], dtype="<u4")
            parts = [torch.from_numpy(lengths.view(np.uint8)).to(row.device)]
            left = iter(payloads)
            parts += [
                next(left) if is_coded(slot.section) else row[slot.begin : slot.end]
                for slot in slots
            ]
            messages.append(torch.cat(parts))
        return messages

    def unpack(
        self, messages: Sequence[Tensor], rows: Tensor, units: int, spans: Sequence[Span]
    ) -> tuple[int, str] | None:
        """Restores the rows; says which message is malformed, and why. Waits for the device."""
        head = LENGTH_BYTES * self._count
        heads = torch.stack([message[:head] for message in messages]).cpu().numpy()
        shape = len(rows), self._count
        results = torch.full(shape, elias.NO_FAULT, dtype=torch.int64, device=rows.device)
        laid_out = self._slots(rows.shape[1], units, spans)
        for i, (row, (owner, slots)) in enumerate(zip(rows, laid_out, strict=True)):
            lengths = heads[i].view("<u4").tolist()
            wrong = self._restore(messages[i], row, owner, slots, lengths, results[i])
            if wrong:
                return i, wrong
        for i, faults in enumerate(results.tolist()):
            if (found := elias.first_fault(faults)) is not None:
                return i, f"Elias payload {found[0]}: {found[1]}"
        return None

    def _restore(
        self,
        message: Tensor,
        row: Tensor,
        owner: int,
        slots: Sequence[SlotLike],
        lengths: list[int],
        results: Tensor,
    ) -> str | None:
        """Writes one row; says what is wrong with the lengths in its message, if anything is."""
        coded = [_Coded(slot, owner) for slot in slots if is_coded(slot.section)]
        for number, (one, length) in enumerate(zip(coded, lengths, strict=True)):
            least, most = one.bounds
            if not least <= length <= most or length % wire.WORD_BYTES:
                return f"Elias payload {number} of {length} bytes, expected {least} to {most}"
        plain = sum(slot.end - slot.begin for slot in slots if not is_coded(slot.section))
        total = LENGTH_BYTES * self._count + plain + sum(lengths)
        if message.numel() != total:
            return f"{message.numel()} bytes, expected {total} by the lengths of its payloads"
        at, number = LENGTH_BYTES * self._count, 0
        for slot in slots:
            if not is_coded(slot.section):
                size = slot.end - slot.begin
                row[slot.begin : slot.end] = message[at : at + size]
                at += size
                continue
            payload = message[at : at + lengths[number]]
            row[slot.begin : slot.end] = 0
            coded[number].launch(self.bucket, "elias_decode", row, payload, results[number])
            at, number = at + lengths[number], number + 1
        return None
