"""How many bytes the exchange holds beside its tensors, and that it uses them again."""

from __future__ import annotations

import pytest
import ranks_memory as cases
import torch
from ranks import Worlds

from pydist.transport import buffers
from pydist.transport.buffers import BufferPool

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_call_holds_two_payloads_and_a_shard(worlds: Worlds, ranks: int) -> None:
    for n, chunk in ((40_000, None), (5003, 2000)):  # in one chunk or a few, and in many
        for measured in worlds(ranks).run(cases.one_call, n, chunk):
            for call, peak, payload, shard in measured:
                assert 0 < peak <= 2 * payload + shard, f"{call}: {peak}, payload {payload}"


def test_gathered_payloads(worlds: Worlds) -> None:
    worlds(2).run(cases.two_ranks_gather, 100_000)


@pytest.mark.parametrize(("calls", "chunks"), [(40, 1), (1, 40)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_bounded_number_of_chunks_is_under_way(
    worlds: Worlds, ranks: int, calls: int, chunks: int
) -> None:
    worlds(ranks).run(cases.many_chunks, calls, chunks)


def test_nothing_is_lost_with_failed_calls(worlds: Worlds) -> None:
    worlds(3).run(cases.after_failures)


def test_buffers_are_given_back_once(worlds: Worlds) -> None:
    worlds(3).run(cases.given_back_once)


# --------------------------------------------------------------------------- buffers


def test_a_buffer_serves_again() -> None:
    room = BufferPool()
    first, second = room.take(2, 50), room.take(1, 60)
    assert first.shape == (2, 50) and first.dtype == torch.uint8
    assert (room.in_use, room.idle, room.peak) == (160, 0, 160)
    address = first.data_ptr()
    room.give(first)
    assert (room.in_use, room.idle) == (60, 100)
    again = room.take(9, 10)
    assert again.data_ptr() == address, "what fits is used"
    room.give(second)
    room.give(again)
    assert room.take(1, 55).data_ptr() == second.data_ptr(), "the smallest that fits"
    assert (room.in_use, room.idle, room.peak) == (60, 100, 160)


def test_what_is_too_small_makes_room() -> None:
    room = BufferPool()
    room.give(room.take(1, 100))
    larger = room.take(1, 101)
    assert (room.in_use, room.idle, room.peak) == (101, 0, 101)
    room.clear()
    assert (room.in_use, room.peak) == (101, 101)
    room.give(larger)
    room.clear()
    assert (room.in_use, room.idle, room.peak) == (0, 0, 0)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "IDLE_BYTES", 250)
    room = BufferPool()
    for buffer in [room.take(1, 100) for _ in range(5)]:
        room.give(buffer)
    assert (room.in_use, room.idle) == (0, 200)


def test_other_memory_is_let_be() -> None:
    room = BufferPool()
    taken = room.take(1, 10)
    room.give(torch.zeros(10, dtype=torch.uint8))
    assert (room.in_use, room.idle) == (10, 0)
    room.give(taken)
    room.give(taken)
    assert (room.in_use, room.idle) == (0, 10), "given back twice"


def test_a_forgotten_buffer_is_freed() -> None:
    room = BufferPool()
    for _ in range(100):
        room.take(1, 1 << 22)
    assert (room.in_use, room.idle, room.peak) == (0, 0, 1 << 22)


def test_the_address_of_a_forgotten_buffer_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room, memory = BufferPool(), bytearray(100)
    with monkeypatch.context() as patched:
        patched.setattr(
            torch, "empty", lambda *_, **__: torch.frombuffer(memory, dtype=torch.uint8)
        )
        address = room.take(1, 100).data_ptr()
    other = torch.frombuffer(memory, dtype=torch.uint8)
    assert other.data_ptr() == address
    room.give(other)
    assert (room.in_use, room.idle) == (0, 0)
