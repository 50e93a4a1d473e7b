"""Checksums of messages: every instruction set equals the reference and finds every flipped bit."""

from __future__ import annotations

import numpy as np
import pytest

from pydist import _C
from pydist.formats import wire
from pydist.reference import message as reference_message

ISAS = _C.supported_isas()
# Around a word, around the three runs of 1,024 bytes that are computed side by side, and beyond.
LENGTHS = (*range(18), 63, 64, 65, 1023, 1024, 3071, 3072, 3073, 3080, 6150)
DIGEST = 0xDEADBEEF


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Makes the kernels those of one instruction set for a test."""
    before = _C.current_isa()
    _C.select_isa(request.param)
    request.addfinalizer(lambda: _C.select_isa(before))
    return str(request.param)


def crc32c(data: np.ndarray, before: int = 0) -> int:
    return _C.cpu.crc32c(data.ctypes.data, len(data), before)


def messages(count: int, size: int, stride: int) -> np.ndarray:
    """Random messages with a header each; a view of rows that are further apart."""
    rows = np.random.default_rng(size).integers(0, 256, (count, stride), dtype=np.uint8)
    header = wire.Header(wire.CODECS["qsgd"], 4, 0, DIGEST, 7).pack()
    rows[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    return rows[:, :size]


def first_damaged(rows: np.ndarray, digest: int = DIGEST) -> int:
    return _C.cpu.first_damaged(
        rows.ctypes.data, *rows.shape[:1], rows.strides[0], rows.shape[1], digest
    )


def seal(rows: np.ndarray) -> None:
    _C.cpu.seal_messages(rows.ctypes.data, len(rows), rows.strides[0], rows.shape[1])


def test_published_values(isa: str) -> None:
    """RFC 3720, appendix B.4, and the check value of the catalogue of CRCs."""
    for data, expected in {
        b"123456789": 0xE3069283,
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
    }.items():
        assert crc32c(np.frombuffer(data, dtype=np.uint8)) == expected
        assert reference_message.crc32c(data) == expected


def test_equals_the_reference(isa: str) -> None:
    data = np.random.default_rng(3).integers(0, 256, max(LENGTHS) + 8, dtype=np.uint8)
    for n in LENGTHS:
        for start in (0, 1, 7):
            piece = data[start : start + n]
            expected = reference_message.crc32c(piece.tobytes())
            assert crc32c(piece) == expected, (n, start)
            cut = n // 3
            assert crc32c(piece[cut:], crc32c(piece[:cut])) == expected, (n, start)


@pytest.mark.parametrize(("size", "stride"), [(16, 16), (20, 32), (1040, 1041), (3110, 3110)])
def test_sealed_messages(isa: str, size: int, stride: int) -> None:
    rows = messages(3, size, stride)
    expected = [reference_message.seal(row.tobytes()) for row in rows]
    seal(rows)
    assert [row.tobytes() for row in rows] == expected
    assert first_damaged(rows) == 3
    assert all(reference_message.is_intact(row, DIGEST) for row in expected)
    assert first_damaged(rows, DIGEST ^ 1) == 0, "a message of another call"


def test_every_flipped_bit_is_found(isa: str) -> None:
    for size in (16, 17, 40, 1100):
        rows = messages(2, size, size)
        seal(rows)
        for bit in range(8 * size):
            rows[1, bit // 8] ^= 1 << bit % 8
            assert first_damaged(rows) == 1, f"bit {bit} of {size} bytes"
            rows[1, bit // 8] ^= 1 << bit % 8
