"""Rows of sharded gradients shortened by Elias codes and restored, in one process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydist import QSGD
from pydist.encoding.blocks import BlockRows
from pydist.encoding.choose import with_entropy
from pydist.encoding.coders import ScatterCoder
from pydist.encoding.plans import Plan, Shards
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.reference import elias as reference_elias
from pydist.transport.coder import Worker

CODEC = QSGD(4, block=32, entropy="elias")
FORM = CODEC.block_format
RANKS, ROW = 3, 800
SHARDS = [  # the last rank has nothing of the second, and less of the first and the third
    Shards(0, (0, 0, 0), (333, 333, 17)), Shards(2, (333,) * 3, (64, 1, 0)),
    Shards(5, (400,) * 3, (400, 400, 200)),
]  # fmt: skip
RANGES = ((0, 5), (5, 12), (12, 26))


def coder_of(rank: int) -> ScatterCoder:
    data = torch.randn(RANKS * ROW, generator=torch.Generator().manual_seed(rank)) ** 3
    coder = ScatterCoder(
        torch.zeros(ROW), data, BlockRows(FORM, wire.CODECS["qsgd_elias"]),
        Plan.of_shards(SHARDS, FORM.block, RANKS), Worker(rank, RANKS, 6), mean=True, seed=2,
    )  # fmt: skip
    return with_entropy(coder, CODEC)


def encoded(coder: ScatterCoder, begin: int, end: int) -> Tensor:
    units = end - begin
    rows = torch.full((RANKS, coder.message_bytes(units)), 0xAA, dtype=torch.uint8)
    coder.encode(rows, units, begin, end)
    return rows


def table_of(rank: int, begin: int, end: int) -> IntArray:
    """The blocks ``begin`` … ``end`` of a rank's row, block after block."""
    sizes = [
        min(FORM.block, s.numel[rank] - at)
        for s in SHARDS
        for at in range(0, s.numel[rank], FORM.block)
    ][begin:end]
    table = np.zeros((len(sizes), 4), dtype=np.int64)
    table[:, 0], table[:, 1] = np.arange(len(sizes)) * FORM.block, sizes
    return table


def test_messages_are_those_of_the_reference() -> None:
    """And what arrives are the rows bit for bit, of whichever rank."""
    coders = [coder_of(rank) for rank in range(RANKS)]
    assert coders[0].units == 26
    sent = kept = 0
    for begin, end in RANGES:
        units, spans = end - begin, [(begin, end)] * RANKS
        rows = [encoded(coder, begin, end) for coder in coders]
        messages = []
        for coder, mine in zip(coders, rows, strict=True):
            assert coder.entropy_coder is not None
            messages.append(coder.entropy_coder.pack(mine, units, spans))
        for to, coder in enumerate(coders):
            table, codes = table_of(to, begin, end), units * FORM.block_bytes
            arriving = [messages[rank][to] for rank in range(RANKS)]
            for sender, message in enumerate(arriving):
                row = rows[sender][to]
                fixed = row.numpy()
                if len(table):  # the reference's scales follow the last block's codes
                    size = (len(table) - 1) * FORM.block_bytes + FORM.code_bytes(int(table[-1, 1]))
                    scales = fixed[codes : codes + 4 * len(table)]
                    whole = np.concatenate([fixed[:size], scales])
                    n = int(table[:, 1].sum())
                    wanted = reference_elias.elias_encode(whole, FORM, n, segments=table)
                    assert message.numpy().tobytes() == wanted.tobytes()
                else:
                    assert not message.numel()
                sent, kept = sent + message.numel(), kept + row.numel()
                assert coder.entropy_coder is not None
                least, most = coder.entropy_coder.bounds(sender, (begin, end))
                leaves = coders[sender].entropy_coder
                assert leaves is not None and leaves.most(to, (begin, end)) == most
                assert least <= message.numel() <= most
            back = torch.full_like(rows[0], 0x55)
            assert coder.entropy_coder is not None
            assert coder.entropy_coder.unpack(arriving, back, units, spans) is None
            assert torch.equal(back, torch.stack([one[to] for one in rows]))
    assert sent < 0.8 * kept


def test_damaged_message() -> None:
    """A fault names the rank that sent it, and the block."""
    coder, (begin, end) = coder_of(0), RANGES[1]
    rows, spans = encoded(coder, begin, end), [(begin, end)] * RANKS
    assert coder.entropy_coder is not None
    good = coder.entropy_coder.pack(rows, end - begin, spans)[0]
    bad = good.clone()
    bad[4:8] = 0xFF  # where the second block's stream ends
    wrong = coder.entropy_coder.unpack(
        [good, bad, good], torch.empty_like(rows), end - begin, spans
    )
    assert wrong is not None and wrong[0] == 1 and "block 1" in wrong[1], wrong
