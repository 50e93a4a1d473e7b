"""Rows of a bucket shortened by Elias codes and restored, in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pydist import QSGD, Raw, Sign
from pydist.encoding.bucket import BucketCoder, BucketPlan
from pydist.encoding.shares import Part
from pydist.transport.coder import Worker

CODECS = [QSGD(4, block=32, entropy="elias"), Sign(None), QSGD(2, block=64, entropy="elias"),
          QSGD(4, block=32, entropy="elias"), Raw("bfloat16")]  # fmt: skip
SIZES = [1000, 333, 700, 33, 65]
RANK, RANKS = 1, 3


def coder_of(owners: int) -> BucketCoder:
    generator = torch.Generator().manual_seed(4)
    ends = np.cumsum(SIZES).tolist()
    parts = [Part(3 * i, end - n, n) for i, (n, end) in enumerate(zip(SIZES, ends, strict=True))]
    flat = torch.randn(ends[-1], generator=generator) ** 3
    plan = BucketPlan(parts, CODECS, [False] * 5, torch.float32, RANKS, owners)
    return BucketCoder(
        plan, flat, Worker(RANK, RANKS, 6), mean=True, seed=2,
        feedback=[None] * len(plan.sections), staged=False,
    )  # fmt: skip


def encoded(coder: BucketCoder, begin: int, end: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows of slices ``begin`` … ``end``, and the units of each."""
    owners, units = coder.plan.owners, end - begin
    rows = torch.full((owners, coder.message_bytes(units)), 0xAA, dtype=torch.uint8)
    coder.encode(rows, units, begin * owners, end * owners)
    first = begin * owners
    return rows, [(first + i * units, first + (i + 1) * units) for i in range(owners)]


@pytest.mark.parametrize("owners", [1, RANKS])
def test_rows_come_back(owners: int) -> None:
    coder = coder_of(owners)
    assert coder.entropy_coder is not None
    for begin, end in ((0, coder.plan.slices), (1, 3), (coder.plan.slices - 1, coder.plan.slices)):
        rows, spans = encoded(coder, begin, end)
        messages = coder.entropy_coder.pack(rows, end - begin, spans)
        for row, (message, span) in enumerate(zip(messages, spans, strict=True)):
            least, most = coder.entropy_coder.bounds(row, span)
            assert most == coder.entropy_coder.most(row, span)
            assert least <= message.numel() <= most and message.numel() % 4 == 0
        back = torch.full_like(rows, 0x55)
        assert coder.entropy_coder.unpack(messages, back, end - begin, spans) is None
        assert torch.equal(back, rows)
        if owners > 1:  # what all ranks send of this rank's share; and its reduced row
            mine = [spans[RANK]] * RANKS
            back = torch.full_like(rows, 0x55)
            assert (
                coder.entropy_coder.unpack([messages[RANK]] * RANKS, back, end - begin, mine)
                is None
            )
            assert all(torch.equal(row, rows[RANK]) for row in back)
            (alone,) = coder.entropy_coder.pack(rows[RANK : RANK + 1], end - begin, mine[:1])
            assert torch.equal(alone, messages[RANK])
    rows, spans = encoded(coder, 0, coder.plan.slices)
    assert (
        sum(x.numel() for x in coder.entropy_coder.pack(rows, coder.plan.slices, spans))
        < rows.numel()
    )


def test_damaged_messages() -> None:
    """Every fault is named; nothing is read or written out of bounds, whatever the bytes are."""
    coder = coder_of(RANKS)
    assert coder.entropy_coder is not None
    rows, spans = encoded(coder, 0, coder.plan.slices)
    units = coder.plan.slices
    good = coder.entropy_coder.pack(rows, units, spans)

    def fault(message: Tensor, at: int = 2) -> str:
        messages = list(good)
        messages[at] = message
        wrong = coder.entropy_coder.unpack(messages, torch.empty_like(rows), units, spans)  # type: ignore[union-attr]
        assert wrong is None or wrong[0] == at
        return wrong[1] if wrong else ""

    assert "expected" in fault(good[2][:-4])
    assert "expected" in fault(torch.cat([good[2], good[2][:4]]))
    for number in range(2):
        bad = good[2].clone()
        bad[4 * number : 4 * number + 4] = 0xFF
        assert fault(bad).startswith(f"Elias payload {number} of 4294967295 bytes, expected ")
    shifted = good[2].clone()  # lengths that add up and are wrong
    lengths = shifted[:8].view(torch.int32)
    lengths += torch.tensor([-4, 4], dtype=torch.int32)
    assert fault(shifted)
    generator, found = np.random.default_rng(5), 0
    for _ in range(300):
        bad = good[2].clone()
        places = torch.from_numpy(generator.integers(0, bad.numel(), 3))
        bad[places] = torch.from_numpy(generator.integers(0, 256, 3)).to(torch.uint8)
        found += bool(fault(bad))
    assert found > 100, found
