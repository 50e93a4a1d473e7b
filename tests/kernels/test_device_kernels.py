"""Kernels of a call on a device beside its codecs, emulated in several orders of threads."""

from __future__ import annotations

from typing import Any

import emulated
import numpy as np
import pytest
from guarded import guarded
from hypothesis import given
from hypothesis import strategies as st

from pydist.formats import wire
from pydist.kernels import device

pytestmark = [*emulated.MARKS, pytest.mark.parametrize("seed", emulated.SEEDS)]
HEADER = wire.Header(wire.CODECS["bucket"], 0, 0, 0x89ABCDEF, 77).pack()


def address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])


def words(*values: int) -> np.ndarray:
    return guarded(np.array(values, dtype=np.int32), at_end=True)


def in_order(seed: int) -> Any:
    """A target whose threads run in this order."""
    assert emulated.EMULATOR is not None
    emulated.EMULATOR.configure(seed)
    return emulated.target()


# --------------------------------------------------------------------------- who has a gradient

ZEROS = {
    2: np.array([0x0000, 0x8000], dtype=np.uint16),
    4: np.array([0, 0x80000000], dtype=np.uint32),
    8: np.array([0, 1 << 63], dtype=np.uint64),
}


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@given(data=st.data())
def test_find_used(seed: int, itemsize: int, data: st.DataObject) -> None:
    """A parameter is used unless all of it is +0 or -0: a subnormal and a NaN are no zeros."""
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 33, 1000, 20000]), max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    flat = guarded(rng.choice(ZEROS[itemsize], sum(lengths)), at_end=True)
    rows = np.zeros((len(lengths), wire.COLUMNS), dtype=np.int64)
    begins, expected = np.cumsum([0, *lengths]), [0] * len(lengths)
    places = rng.permutation(len(lengths))
    for i, n in enumerate(lengths):
        rows[i, [wire.X, wire.N, wire.WORD]] = address(flat) + itemsize * begins[i], n, places[i]
        if n and data.draw(st.booleans()):
            value = data.draw(st.sampled_from([1, 0x7F00 << 8 * (itemsize - 2)]))
            flat[begins[i] + data.draw(st.integers(0, n - 1))] = value
            expected[places[i]] = 1
    used = words(*[0] * len(lengths))
    device.find_used(in_order(seed), rows, itemsize, address(used))
    assert used.tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 300])
def test_keep_used(seed: int, count: int) -> None:
    """Rows of unused parameters lose their residuals, and nothing else."""
    rng = np.random.default_rng(count)
    rows = rng.integers(1, 1000, (count, wire.COLUMNS), dtype=np.int64)
    places, used = rng.integers(0, 5, count), words(1, 0, 1, 0, 0)
    found = device.keep_used(in_order(seed), rows, places, address(used), 32)
    wanted = wire.number_rows(rows.copy(), 32)
    wanted[np.isin(places, [1, 3, 4]), wire.MOMENTUM : wire.N] = 0
    owner: Any = found.owner
    got = owner[: device.ROW_BYTES * count].view(np.int64).reshape(count, wire.COLUMNS)
    assert (got == wanted).all()
    assert len(found) == count and found.work == int((-(-rows[:, wire.N] // 32)).sum())


# --------------------------------------------------------------------------- headers


def messages(count: int, stride: int) -> np.ndarray:
    return guarded(np.full(count * stride, 0xA5, dtype=np.uint8), at_end=True)


def both_words() -> list[int]:
    return [int(x) for x in np.frombuffer(HEADER, dtype="<u8")]


@pytest.mark.parametrize(("count", "parts"), [(1, 0), (3, 5), (300, 33), (2, 3000)])
def test_headers_there_and_back(seed: int, count: int, parts: int) -> None:
    size = wire.payload_bytes(parts)
    stride = wire.HEADER_BYTES + size + 8
    sent, rng = messages(count, stride), np.random.default_rng(parts)
    own, raised = words(*rng.integers(0, 2, parts)), words(5)
    run = in_order(seed).module.cuda
    run.put_headers(
        address(sent), count, stride, *both_words(), address(raised), address(own), parts, size, 0
    )
    table = sent.reshape(count, stride)
    header = bytearray(HEADER)
    header[wire.FLAGS_AT] = 5
    assert (table[:, : wire.HEADER_BYTES] == np.frombuffer(bytes(header), np.uint8)).all()
    bits = np.packbits(own.astype(bool), bitorder="little")
    assert (table[:, wire.HEADER_BYTES :][:, : len(bits)] == bits).all()
    assert (table[:, wire.HEADER_BYTES + size :] == 0xA5).all(), "payloads are not touched"
    flags, everyones = words(8), words(*[7] * parts)
    arguments = (address(sent), count, stride, *both_words(), address(flags), address(everyones))
    run.merge_headers(*arguments, parts, 0)
    assert flags.tolist() == [13] and (everyones == own).all()


def test_flags_and_usage_of_all_messages_are_ored(seed: int) -> None:
    """Flags 1 and 4 are 5, not 4; a parameter is used where any message says so."""
    sent = messages(3, 20)
    table = sent.reshape(3, 20)
    table[:, :16] = np.frombuffer(HEADER, dtype=np.uint8)
    table[:, wire.FLAGS_AT] = [1, 4, 0]
    table[:, 16] = [0b001, 0b100, 0b000]
    flags, used = words(0), words(9, 9, 9)
    run = in_order(seed).module.cuda
    run.merge_headers(address(sent), 3, 20, *both_words(), address(flags), address(used), 3, 0)
    assert flags.tolist() == [5] and used.tolist() == [1, 0, 1]


@pytest.mark.parametrize("byte", [i for i in range(wire.HEADER_BYTES) if i != wire.FLAGS_AT])
def test_another_header_is_malformed(seed: int, byte: int) -> None:
    sent = messages(2, 16)
    sent.reshape(2, 16)[:] = np.frombuffer(HEADER, dtype=np.uint8)
    sent[16 + byte] ^= 0x40
    flags = words(0)
    run = in_order(seed).module.cuda
    run.merge_headers(address(sent), 2, 16, *both_words(), address(flags), 0, 0, 0)
    assert flags.tolist() == [wire.FLAG_MALFORMED]


# --------------------------------------------------------------------------- results


@pytest.mark.parametrize("name", device.NANS)
@pytest.mark.parametrize("n", [0, 1, 1001, 70000])
def test_fill_nan(seed: int, name: str, n: int) -> None:
    itemsize = device.NANS[name][0]
    x = guarded(np.ones(n, dtype=f"u{itemsize}"), at_end=True)
    for flags, filled in (((0, 2, 8), False), ((0, 1, 0), True), ((0, 0, 4), True)):
        x[:] = 1
        told = words(*flags)
        device.fill_nan(in_order(seed), address(x), n, name, address(told), 3)
        assert (x == (device.NANS[name][1] if filled else 1)).all()
