"""Rows of a bucket whose sections of levels travel as Elias codes, the others as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.blocks import BlockRows
from pydist.encoding.entropy import CodedBlocks
from pydist.encoding.rows import Job
from pydist.formats import elias, wire
from pydist.formats.blocks import SCALE_BYTES, BlockFormat
from pydist.transport.coder import Span

if TYPE_CHECKING:
    from pydist.encoding.bucket import BucketPlan, Section, Slot

LENGTH_BYTES = 4
"""A message begins with the length of each Elias payload in it, uint32."""


def _form_of(section: Section) -> BlockFormat:
    assert isinstance(section.codec, BlockRows)
    return section.codec.form


def _coded(slot: Slot, owner: int) -> CodedBlocks:
    """The blocks of one section in one row."""
    form, piece = _form_of(slot.section), slot.piece.of(owner)
    return CodedBlocks(form, piece.rows, piece.room * form.block_bytes)


class BucketEliasCoder:
    """Shortens the sections of a bucket that are to be entropy coded
    (:class:`pydist.transport.coder.EntropyCoder`).

    A message is the lengths of its Elias payloads, then section after section: an Elias payload,
    or the section's bytes as they are.

    Args:
        plan: The bucket's layout.
        job: The call.
    """  # noqa: D205

    def __init__(self, plan: BucketPlan, job: Job) -> None:
        self.plan, self.job = plan, job
        self._count = sum(section.coded for section in plan.sections)

    def _slots(
        self, row_bytes: int, units: int, spans: Sequence[Span]
    ) -> list[tuple[int, list[Slot]]]:
        """Owner and layout of each row.

        A row for every owner, or from every owner, comes with spans that differ; rows of one
        owner's are this rank's own.
        """
        owners, reduced = self.plan.owners, row_bytes != self.plan.message_bytes(units)
        differ = len(spans) > 1 and spans[0] != spans[-1]
        found = []
        for i, (begin, _) in enumerate(spans):
            owner = 0 if owners == 1 else i if differ else self.job.worker.rank
            first = (begin - owner * units) // owners
            found.append((owner, self.plan.slots(first, first + units, reduced=reduced)))
        return found

    def bounds(self, row: int, span: Span) -> tuple[int, int]:
        """Fewest and most bytes of a message, of whichever owner and phase."""
        units = span[1] - span[0]
        least = most = LENGTH_BYTES * self._count
        for sent, reduced in zip(
            self.plan.slots(0, units, reduced=False),
            self.plan.slots(0, units, reduced=True),
            strict=True,
        ):
            if not sent.section.coded:
                sizes = sent.end - sent.begin, reduced.end - reduced.begin
                least, most = least + min(sizes), most + max(sizes)
                continue
            form, room = _form_of(sent.section), sent.piece.room
            streams = room * elias.stream_bytes(form.block, form)
            most += room * (elias.END_BYTES + SCALE_BYTES) + -(-streams // 4) * 4
        return least, most

    def most(self, row: int, span: Span) -> int:
        """Most bytes of a message: the same of all."""
        return self.bounds(row, span)[1]

    def pack(self, rows: Tensor, units: int, spans: Sequence[Span]) -> list[Tensor]:
        """The rows as they travel; on CUDA this waits for the device, to learn their lengths."""
        shape = len(rows), self._count
        results = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        laid_out, coded = self._slots(rows.shape[1], units, spans), []
        for row, (owner, slots), into in zip(rows, laid_out, results, strict=True):
            packed = [slot for slot in slots if slot.section.coded]
            mine = [_coded(slot, owner) for slot in packed]
            rooms = [row.new_empty(one.bounds[1]) for one in mine]
            for slot, one, room, result in zip(packed, mine, rooms, into, strict=True):
                one.launch(self.job, "elias_encode", row[slot.begin :], room, result)
            coded.append((mine, rooms))
        messages = []
        for row, (_, slots), (mine, rooms), streams in zip(
            rows, laid_out, coded, results.tolist(), strict=True
        ):
            payloads = [
                room[: one.payload_bytes(size)]
                for one, room, size in zip(mine, rooms, streams, strict=True)
            ]
            lengths = np.array([x.numel() for x in payloads], dtype="<u4")
            parts = [torch.from_numpy(lengths.view(np.uint8)).to(row.device)]
            left = iter(payloads)
            parts += [
                next(left) if slot.section.coded else row[slot.begin : slot.end] for slot in slots
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
        slots: Sequence[Slot],
        lengths: list[int],
        results: Tensor,
    ) -> str | None:
        """Writes one row; says what is wrong with the lengths in its message, if anything is."""
        coded = [_coded(slot, owner) for slot in slots if slot.section.coded]
        for number, (one, length) in enumerate(zip(coded, lengths, strict=True)):
            least, most = one.bounds
            if not least <= length <= most or length % wire.WORD_BYTES:
                return f"Elias payload {number} of {length} bytes, expected {least} to {most}"
        plain = sum(slot.end - slot.begin for slot in slots if not slot.section.coded)
        total = LENGTH_BYTES * self._count + plain + sum(lengths)
        if message.numel() != total:
            return f"{message.numel()} bytes, expected {total} by the lengths of its payloads"
        at, number = LENGTH_BYTES * self._count, 0
        for slot in slots:
            if not slot.section.coded:
                size = slot.end - slot.begin
                row[slot.begin : slot.end] = message[at : at + size]
                at += size
                continue
            payload = message[at : at + lengths[number]]
            row[slot.begin : slot.end] = 0
            coded[number].launch(
                self.job, "elias_decode", row[slot.begin :], payload, results[number]
            )
            at, number = at + lengths[number], number + 1
        return None
