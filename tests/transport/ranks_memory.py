"""What ranks do in test_memory.py: how many bytes the exchange holds."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import pydist
from pydist import QSGD, BlockInt, Raw, Sign, Ternary, TopK
from pydist.encoding.choose import all_reduce_coder, reduce_scatter_coder
from pydist.encoding.coders import ReduceCoder
from pydist.formats import wire
from pydist.transport import exchange
from pydist.transport.buffers import IDLE_BYTES, BufferPool
from pydist.transport.coder import Worker
from pydist.transport.communicator import IN_FLIGHT, communicator

CODECS = [
    Sign(None),
    Sign("l1"),
    QSGD(4),
    BlockInt(8),
    Raw(),
    Raw("bfloat16"),
    Ternary(),
    TopK(0.1),
]


def _sent(coder: Any, ranks: int, reduces: bool) -> tuple[int, int]:
    """Bytes of a payload, headers and padding included, and of a shard.

    The counts of a vote are larger than what is counted: then the payload is the reduced one.
    """
    total, size = 0, exchange.chunk_units(coder)
    for begin in range(0, coder.units, size):
        units = min(size, coder.units - begin)
        shard = -(-units // ranks) if reduces else units
        size_of_shard = coder.message_bytes(shard)
        if reduces:
            size_of_shard = max(size_of_shard, coder.reduced_bytes(shard))
        total += ranks * (wire.HEADER_BYTES + size_of_shard)
    return total, total // ranks


def one_call(rank: int, ranks: int, n: int, chunk: int | None) -> list[tuple[str, int, int, int]]:
    """What each codec's calls held at most, their payload and a shard of it."""
    measured = []
    whole, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, chunk or exchange.CHUNK_BYTES
    comm, worker = communicator(), Worker(rank, ranks, 0)
    x, share = torch.ones(n * ranks), torch.ones(n)
    try:
        for codec in CODECS:
            options = {"op": "sum", "ties": "hash", "seed": 0}
            reducer = all_reduce_coder(x, codec, worker, **options)
            scatterer = reduce_scatter_coder(share, x, codec, worker, **options)
            calls = {
                "all_reduce": (
                    lambda c=codec: pydist.all_reduce(x, c, algorithm="two_phase", step=0),
                    _sent(reducer, ranks, True),
                ),
                "reduce_scatter": (
                    lambda c=codec: pydist.reduce_scatter(share, x, c, step=0),
                    _sent(scatterer, ranks, False),
                ),
                "all_gather": (
                    lambda c=codec: pydist.all_gather(x, share, c, step=0),
                    _sent(scatterer, ranks, False),
                ),
            }
            for name, (call, (payload, shard)) in calls.items():
                comm.buffers.clear()
                call()
                assert comm.buffers.in_use == 0 and comm.buffers.idle <= IDLE_BYTES
                measured.append((f"{name} {codec}", comm.buffers.peak, payload, shard))
    finally:
        exchange.CHUNK_BYTES = whole
    return measured


def two_ranks_gather(rank: int, ranks: int, n: int) -> None:
    """``auto`` gathers whole payloads between two ranks: one sent, two received, one reduced."""
    comm, x = communicator(), torch.ones(n)
    coder = all_reduce_coder(x, QSGD(4), Worker(rank, ranks, 0), op="sum", ties="hash", seed=0)
    payload, _ = _sent(coder, 1, True)
    comm.buffers.clear()
    pydist.all_reduce(x, QSGD(4), step=0)
    assert 2 * payload <= comm.buffers.peak <= 3 * payload


def many_chunks(rank: int, ranks: int, calls: int, chunks: int) -> None:
    """However many chunks are under way, of one call or of many, IN_FLIGHT bounds them; and the
    queue between the threads is used to the full."""
    comm, n = communicator(), 4096  # of a chunk
    xs = [torch.ones(n * chunks) for _ in range(calls)]
    coder = all_reduce_coder(
        xs[0][:n], QSGD(8), Worker(rank, ranks, 0), op="sum", ties="hash", seed=0
    )
    chunk, _ = _sent(coder, ranks, True)
    decode, held = ReduceCoder.decode, []

    def late(self: ReduceCoder, *args: Any) -> None:
        deadline = time.monotonic() + 20
        while not held and not comm._chunks.full():  # the front thread has done what it may
            assert time.monotonic() < deadline, "the queue never fills"
            time.sleep(0.001)
        held.append(comm.buffers.in_use)
        decode(self, *args)

    ReduceCoder.decode = late  # type: ignore[method-assign]
    whole, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, coder.units * coder.unit_bytes
    comm.buffers.clear()
    try:
        works = [
            pydist.all_reduce(x, QSGD(8), op="sum", algorithm="two_phase", async_op=True, step=0)
            for x in xs
        ]
        for work in works:
            work.wait()
        peak = comm.buffers.peak
        for _ in range(3):
            pydist.all_reduce(xs[0], QSGD(8), op="sum", algorithm="two_phase", step=0)
        again = comm.buffers.peak
    finally:
        ReduceCoder.decode = decode  # type: ignore[method-assign]
        exchange.CHUNK_BYTES = whole
    # Only now: a rank that raised earlier would leave the others waiting.
    assert all(bool((x == ranks).all()) for x in xs[1:]) and bool((xs[0] == ranks**4).all())
    assert comm.buffers.in_use == 0
    # A full queue has a chunk in every place, or in every second one where each is followed by the
    # end of its call; each has a payload sent and one received.
    queued = 2 * (IN_FLIGHT if calls == 1 else IN_FLIGHT // 2) * chunk
    assert held[0] >= queued, (held[0], queued)
    # One waits to get between the threads, the next is made; one is reduced, one is decoded (where
    # a small message may have got a large buffer).
    bound = (2 * IN_FLIGHT + 2 + 2 + 2) * chunk
    assert peak <= bound, (peak, chunk)
    # Which of the places are taken at once is for the threads' turns to say; were buffers not used
    # again, three calls would add a buffer or more for each of their chunks.
    assert again <= bound, (again, peak, chunk)


def after_failures(rank: int, ranks: int) -> None:
    """What was encoded for a call that the ranks did not agree on comes back."""
    comm = communicator()
    for codec in (QSGD(4), QSGD(4, entropy="elias"), Ternary()):
        for _ in range(3):
            x = torch.ones(1000 + (rank == 0))
            with pytest.raises(pydist.MismatchError):
                pydist.all_reduce(x, codec, step=0)
            assert comm.buffers.in_use == 0, codec
    pydist.all_reduce(x[:1000], QSGD(4), step=0)


def given_back_once(rank: int, ranks: int) -> None:
    """A buffer that is given back twice would serve two calls at once."""
    pool = communicator().buffers
    given: dict[int, tuple[Tensor, int]] = {}  # what was taken, and how often it came back

    def take(rows: int, columns: int) -> Tensor:
        taken = BufferPool.take(pool, rows, columns)
        given[id(taken)] = taken, 0
        return taken

    def give(taken: Tensor, after: Any = None) -> None:
        if id(taken) in given:
            given[id(taken)] = taken, given[id(taken)][1] + 1
        BufferPool.give(pool, taken, after)

    x = torch.ones(5000)
    with mock.patch.object(pool, "take", take), mock.patch.object(pool, "give", give):
        for codec in (Raw(), Ternary(), QSGD(4, entropy="elias")):
            for algorithm in ("two_phase", "all_gather"):
                pydist.all_reduce(x, codec, step=0, algorithm=algorithm)
            pydist.reduce_scatter(x[:2500].clone(), torch.ones(2500 * ranks), codec, step=0)
            pydist.all_gather(torch.empty(5000 * ranks), x, codec, step=0)
    assert given and {count for _, count in given.values()} == {1}
