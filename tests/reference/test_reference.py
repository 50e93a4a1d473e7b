"""The reference itself: published vectors, NumPy's own packing, statistics, golden bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bitwise import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from pydist import QSGD, BlockFloat, BlockInt, Sign, TopK
from pydist.formats import wire
from pydist.reference import blocks as reference_blocks
from pydist.reference import elias as reference_elias
from pydist.reference import message as reference_message
from pydist.reference import raw as reference_raw
from pydist.reference import signs as reference
from pydist.reference import ternary as reference_ternary
from pydist.reference import topk as reference_topk

WIRE_FORMAT = Path(__file__).parents[2] / "docs" / "wire_format.md"


# --------------------------------------------------------------------------- random bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of the Random123 distribution
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = np.array([int(word, 16) for word in counter.split()], dtype=np.uint32)
    k0, k1 = (int(word, 16) for word in key.split())
    got = reference.philox4x32(words, (k0, k1))
    assert [f"{word:08x}" for word in got] == expected.split()


def test_draws_are_uniform_and_differ_between_ranks() -> None:
    n = 2**16
    draws = [reference.draws16(1, rank << 2, 5, 0, 0, n) for rank in range(2)]
    for drawn in draws:
        assert drawn.max() < 2**16
        # The mean of n uniform draws, within five of its standard deviations.
        assert abs(drawn.mean() - 32767.5) < 5 * 65536 / np.sqrt(12 * n)
    assert (draws[0] == draws[1]).mean() < 0.001


def test_draws_take_the_lanes_that_are_documented() -> None:
    words = reference.philox4x32(np.array([2, 0, 9, 4], dtype=np.uint32), (7, 12))
    lanes = [int(half) for word in words for half in (word & 0xFFFF, word >> 16)]
    assert reference.draws16(7, 12, 9, 4, 16, 8).tolist() == lanes


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(1, 200))
def test_draws_and_tie_bits_depend_on_the_element_alone(first: int, skip: int, n: int) -> None:
    for draw in (
        lambda at, count: reference.draws16(3, 4, 5, 6, at, count),
        lambda at, count: reference.tie_bits(3, 5, 6, at, count),
    ):
        assert np.array_equal(draw(first, skip + n)[skip:], draw(first + skip, n))


# --------------------------------------------------------------------------- ties


def test_tie_bits_are_fair() -> None:
    n = 2**17
    for seed in range(4):
        share = reference.tie_bits(seed, 0, 0, 0, n).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(n)  # five standard deviations


def test_tie_bits_flip_with_parity_and_stay_for_two_steps() -> None:
    n = 4096
    even, odd, later = (reference.tie_bits(9, step, 2, 0, n) for step in (6, 7, 8))
    assert np.array_equal(even, 1 - odd)
    assert 0.4 < (even == later).mean() < 0.6


def test_tie_bits_differ_between_seeds_and_parameters() -> None:
    base = reference.tie_bits(1, 0, 0, 0, 4096)
    for other in (reference.tie_bits(2, 0, 0, 0, 4096), reference.tie_bits(1, 0, 1, 0, 4096)):
        assert 0.4 < (base == other).mean() < 0.6


@pytest.mark.parametrize(("ranks", "rate"), [(2, 0.5), (4, 0.375), (8, 0.273), (32, 0.14)])
def test_how_often_random_votes_tie(ranks: int, rate: float) -> None:
    n = 2**17
    payloads = np.random.default_rng(ranks).integers(0, 256, (ranks, n // 8), dtype=np.uint8)
    decided = reference.unpack_bits(reference.majority_vote(payloads, ties="zero")[1], n)
    # Three decimals are documented; five standard deviations of the share come on top.
    assert abs(1 - decided.mean() - rate) < 5e-4 + 5 * np.sqrt(rate * (1 - rate) / n)


def test_an_odd_number_of_ranks_never_ties() -> None:
    payloads = np.random.default_rng(0).integers(0, 256, (5, 64), dtype=np.uint8)
    assert (reference.majority_vote(payloads, ties="zero")[1] == 255).all()
    results = [reference.majority_vote(payloads, ties=ties) for ties in ("hash", "positive")]
    assert_same_bits(results[0], results[1], "ties of an odd number of ranks")


def test_a_coordinate_that_always_ties_comes_back() -> None:
    votes = np.stack([np.zeros(8, dtype=np.uint8), np.full(8, 255, dtype=np.uint8)])
    place = np.zeros(64)
    for step in range(40):
        planes = reference.majority_vote(votes, seed=3, step=step)
        place += reference.unpack_votes(planes, 64)
        assert np.abs(place).max() <= 1
    assert (place == 0).all()


# --------------------------------------------------------------------------- bits and numbers


@given(st.lists(st.booleans(), max_size=300))
def test_packing_is_numpys_with_padding(bits: list[bool]) -> None:
    flags = np.array(bits, dtype=bool)
    payload = reference.pack_bits(flags)
    packed = np.packbits(flags, bitorder="little")
    assert payload.size % 4 == 0
    assert payload.size - packed.size in range(4)
    assert np.array_equal(payload[: packed.size], packed)
    assert not payload[packed.size :].any()
    assert np.array_equal(reference.unpack_bits(payload, flags.size), flags)


def test_counts_and_majority_agree_with_integers() -> None:
    for ranks in (1, 2, 7, 8, 300):
        signs = np.random.default_rng(ranks).choice([-1, 1], (ranks, 100))
        payloads = np.stack([reference.pack_bits(row > 0) for row in signs])
        sums = signs.sum(0)
        counts = reference.count_votes(payloads, 100)
        assert np.array_equal(reference.unpack_votes(counts, 100, ranks=ranks), sums)
        mean = reference.unpack_votes(counts, 100, ranks=ranks, mean=True)
        assert np.array_equal(mean, sums.astype(np.float32) / np.float32(ranks))
        planes = reference.majority_vote(payloads, ties="zero", n=100)
        assert np.array_equal(reference.unpack_votes(planes, 100), np.sign(sums))


def test_rounding_to_bfloat16() -> None:
    x = np.array([1.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-45, -0.0], dtype=np.float32)
    expected = [0x3F80, 0x3F80, 0x3F82, 0x7F80, 0xFF80, 0x0000, 0x8000]  # ties go to even
    assert reference.bfloat16_bits(reference.round_to(x, "bfloat16")).tolist() == expected


def test_lion_against_the_paper_in_double_precision() -> None:
    rng = np.random.default_rng(5)
    g, m, x = rng.standard_normal((3, 1000)).astype(np.float32)
    payload, new, flags = reference.lion_pack(g, m, beta1=0.9, beta2=0.99)
    direction = 0.9 * m.astype(float) + 0.1 * g.astype(float)
    clear = np.abs(direction) > 1e-6  # float32 may round the others to the other side
    signs = reference.unpack_votes(payload[None], 1000)
    assert np.array_equal(signs[clear], np.sign(direction[clear]))
    np.testing.assert_allclose(new, 0.99 * m.astype(float) + 0.01 * g, rtol=1e-5, atol=1e-7)
    assert flags == 0
    moved = reference.lion_apply(x, payload[None], lr=0.01, weight_decay=0.1)
    expected = x - 0.01 * (signs + 0.1 * x.astype(float))
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------- golden bytes


def golden() -> dict[str, bytes]:
    """The blocks of the document titled golden <name>: hex in lines, comments after #."""
    blocks = r'```text title="golden (\S+)"\n(.*?)```'
    found = re.findall(blocks, WIRE_FORMAT.read_text(), re.DOTALL)
    lines = {name: [line.split("#")[0] for line in text.splitlines()] for name, text in found}
    return {name: bytes.fromhex("".join(hexes)) for name, hexes in lines.items()}


def computed() -> dict[str, bytes]:
    """What the reference gives for the inputs that the document states."""
    x = np.array([1, -2, 0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3, -4], dtype=np.float32)
    ramp = np.arange(-2, 3, dtype=np.float32)
    three = np.stack([reference.pack_bits(np.array(bits, bool)) for bits in _THREE_VOTERS])
    half = np.stack([np.zeros(8, dtype=np.uint8), np.full(8, 255, dtype=np.uint8)])
    lion = {"beta1": 0.9, "beta2": 0.99}
    g, m = np.array([1, -1, 0.5, 0], dtype=np.float32), np.array([0, 1, -1, 0], dtype=np.float32)
    planes = np.array([[0b0101, 0, 0, 0]], dtype=np.uint8)
    zero = np.zeros(64, dtype=np.float32)
    plain = np.array([1, -2, -0.0, 0.1], dtype=np.float32)
    header = wire.Header(codec=wire.CODECS["sign"], bits=1, flags=1, digest=0x01020304, step=258)
    return {
        "header": header.pack(),
        "message": reference_message.seal(header.pack() + bytes([5, 0, 0, 0])),
        "signs-zero-bit-1": reference.pack_signs(x, zero_bit=1)[0].tobytes(),
        "signs-zero-bit-0": reference.pack_signs(x, zero_bit=0)[0].tobytes(),
        "segments": reference.pack_signs(ramp, segments=wire.segments([2, 3]))[0].tobytes(),
        "counts": reference.count_votes(three).tobytes(),
        "majority": reference.majority_vote(three, n=4).tobytes(),
        "ties-zero": reference.majority_vote(half[:, :4], ties="zero").tobytes(),
        "ties-hash-step-0": reference.majority_vote(half, seed=1, step=0).tobytes(),
        "ties-hash-step-1": reference.majority_vote(half, seed=1, step=1).tobytes(),
        "lion-vote": reference.lion_pack(g, m, **lion)[0].tobytes(),
        "lion-momentum": reference.lion_pack(g, m, **lion)[1].tobytes(),
        "lion-apply": reference.lion_apply(g, planes, lr=0.1, weight_decay=0.01).tobytes(),
        "stochastic": reference.lion_pack(
            zero, zero, **lion, binarization_range=1.0, seed=1, rank=2, step=3
        )[0].tobytes(),
        "raw-bfloat16": reference_raw.to_bytes(plain, "bfloat16")[0].tobytes(),
        "raw-float32": reference_raw.to_bytes(plain, "float32")[0].tobytes(),
        "raw-float16": reference_raw.to_bytes(plain[:3], "float16")[0].tobytes(),
        "elias-4": elias_example(),
        **computed_blocks(),
        **computed_trits(),
        **computed_topk(),
    }


def elias_example() -> bytes:
    """Four parameters: a sparse block, a dense one, a plain one, one without a stream."""
    form = QSGD(4, 32).block_format
    sparse = np.zeros(20, dtype=np.int64)
    sparse[[2, 10]] = 3, -1
    levels = [sparse, np.array([1, -1, 2, 0, -1, 1]), np.array([7, -7, 6, 5])]
    codes = [reference_blocks.pack_codes((x + 7).astype(np.uint8), 4) for x in levels]
    scales = np.array([1, 1, 1, np.nan], dtype="<f4").view(np.uint8)
    rows = [np.pad(part, (0, 16 - part.size)) for part in codes]
    fixed = np.concatenate([*rows, np.zeros(4, dtype=np.uint8), scales])
    table = wire.segments([20, 6, 4, 2], block=32)
    coded = reference_elias.elias_encode(fixed, form, 32, segments=table)
    assert np.array_equal(reference_elias.elias_decode(coded, form, 32, segments=table), fixed)
    return coded.tobytes()


def computed_blocks() -> dict[str, bytes]:
    """The same for formats with a scale."""
    x = np.array([1, -2, 0, 3, 0.25, -0.0], dtype=np.float32)
    two, nan = wire.segments([2, 4], block=32), np.where(x == -2, np.float32(np.nan), x)
    draws = reference_blocks.Draws(seed=1, rank=2, phase=0, step=3)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "sign-l1": (x, Sign("l1", 32), {}),
        "sign-l2": (x, Sign("l2", 32), {}),
        "block-int-4": (x, BlockInt(4, 32), {}),
        "block-int-3": (x, BlockInt(3, 32), {}),
        "block-segments": (x, BlockInt(4, 32), {"segments": two}),
        "block-nan": (nan, BlockInt(4, 32), {}),
        "qsgd-2": (x, QSGD(2, 32), {"draws": draws}),
        "qsgd-4-l2": (x, QSGD(4, 32, "l2"), {"draws": draws}),
        "block-float-e4m3": (x, BlockFloat("e4m3", 32), {}),
        "block-float-e5m2": (x, BlockFloat("e5m2", 32), {}),
    }
    return {
        name: reference_blocks.quantize(values, codec.block_format, **options)[0].tobytes()
        for name, (values, codec, options) in cases.items()
    }


def computed_trits() -> dict[str, bytes]:
    """The same for trits."""
    rt, draws = reference_ternary, reference_blocks.Draws
    x = np.array([1, -2, 0, 3, 0.25, -0.0], dtype=np.float32)
    scalers = [rt.scale(x, clip)[0] for clip in (1.0, None)]
    unit = np.zeros(160, dtype=np.float32)
    unit[[0, 32, 64, 96, 128, 1, 33]] = 1, -1, 0, 1, -1, 1, 1
    payloads = np.stack(
        [rt.pack(x, scalers[1], draws=draws(seed=1, rank=r, step=3))[0] for r in (0, 1)]
    )
    sums = rt.sum_payloads(payloads, x.size)
    return {
        "ternary-scale": np.concatenate(scalers).tobytes(),
        "ternary-digits": rt.pack(unit, np.ones(1, np.float32))[0].tobytes(),
        "ternary-payloads": payloads.tobytes(),
        "ternary-sums": sums.tobytes(),
        "ternary-mean": rt.values_of_sums(sums, scalers[1], x.size, ranks=2, mean=True)[
            0
        ].tobytes(),
    }


def computed_topk() -> dict[str, bytes]:
    """The same for top-k blocks."""
    form, half = TopK(0.05, 64).topk_format, TopK(0.5, 32).topk_format
    x = np.zeros(64, dtype=np.float32)
    x[[5, 40, 41, 63]] = 1, -2, 0.5, 0.1
    other, ramp, ones = x.copy(), np.arange(6, dtype=np.float32), np.ones(64, dtype=np.float32)
    other[40] = 4
    nan = np.where(ramp == 1, np.float32(np.nan), ramp)
    payloads = np.stack([reference_topk.select(y, form)[0] for y in (x, other)])
    narrow = TopK(0.05, 64, "bfloat16").topk_format
    return {
        "topk": payloads[0].tobytes(),
        "topk-bfloat16": reference_topk.select(x, narrow)[0].tobytes(),
        "topk-ties": reference_topk.select(ones, form, seed=1, step=2)[0].tobytes(),
        "topk-bitmap": reference_topk.select(ramp, half)[0].tobytes(),
        "topk-nan": reference_topk.select(nan, half)[0].tobytes(),
        "topk-reduced": reference_topk.reduce(payloads, form, 64, mean=True)[0].tobytes(),
    }


_THREE_VOTERS = ([1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0])


@pytest.mark.parametrize("name", sorted(computed()))
def test_golden_bytes(name: str) -> None:
    assert golden()[name].hex(" ") == computed()[name].hex(" ")


def test_every_golden_block_is_computed() -> None:
    assert golden().keys() == computed().keys()


# --------------------------------------------------------------------------- header and tables


def test_header_survives_the_wire() -> None:
    header = wire.Header(codec=1, bits=9, flags=2, digest=0xFFFFFFFF, step=2**32 + 7)
    message = header.pack()
    assert len(message) == wire.HEADER_BYTES == 16
    read, problem = wire.unpack_header(message + b"payload")
    assert problem is None
    assert read == wire.Header(1, 9, 2, 0xFFFFFFFF, 7)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m[:15], "15 bytes"),
        (lambda m: b"", "0 bytes"),
        (lambda m: b"XDst" + m[4:], "magic b'XDst'"),
        (lambda m: m[:4] + b"\x63" + m[5:], "wire version 99"),
    ],
)
def test_malformed_headers_are_named(change: object, complaint: str) -> None:
    message = wire.Header(codec=1, bits=1, flags=0, digest=0, step=0).pack()
    _, problem = wire.unpack_header(change(message))  # type: ignore[operator]
    assert problem is not None
    assert complaint in problem


@given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 20), st.integers(0, 20))
def test_cut_rows_covers_the_words_once(lengths: list[int], a: int, b: int) -> None:
    rows = wire.rows_of(wire.segments(lengths))
    begin, end = min(a, b), max(a, b)
    part = wire.cut_rows(rows, begin, end)
    for row, whole in ((row, wire.rows_of(wire.segments(lengths))) for row in part):
        parent = whole[whole[:, wire.ORDINAL] == row[wire.ORDINAL]][0]
        assert row[wire.FIRST] == 32 * (row[wire.WORD] - parent[wire.WORD])
        assert begin <= row[wire.WORD]
        assert row[wire.WORD] + wire.words_for(int(row[wire.N])) <= end
    covered = sum(wire.words_for(int(n)) for n in part[:, wire.N])
    total = sum(wire.words_for(n) for n in lengths)
    assert covered == max(0, min(end, total) - begin)
