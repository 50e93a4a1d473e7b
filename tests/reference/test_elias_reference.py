"""Elias coding by the specification: published words, the paper's bounds, nothing lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydist import QSGD, arrays
from pydist.formats import elias
from pydist.formats.blocks import BlockFormat
from pydist.reference import blocks as rb
from pydist.reference import elias as reference
from pydist.selfcheck import elias as cases


def form_of(bits: int, block: int = 32) -> BlockFormat:
    return BlockFormat("levels", bits, block, "max")


# --------------------------------------------------------------------------- words

WORDS = {
    1: "0", 2: "100", 3: "110", 4: "101000", 7: "101110", 8: "1110000", 16: "10100100000",
    100: "1011011001000",
}  # fmt: skip
LENGTHS = {32: 12, 128: 14, 256: 16, 1023: 17, 65536: 28, 65537: 28}


def test_published_words_and_lengths() -> None:
    assert {value: reference.omega(value) for value in WORDS} == WORDS
    assert {value: len(reference.omega(value)) for value in LENGTHS} == LENGTHS


def test_no_word_begins_another() -> None:
    words = sorted(reference.omega(value) for value in range(1, 2000))
    assert all(not b.startswith(a) for a, b in zip(words, words[1:], strict=False))


# --------------------------------------------------------------------------- one block


def levels_in(bits: int) -> Any:
    top = 2 ** (bits - 1) - 1
    level = st.one_of(st.just(0), st.integers(-1, 1), st.integers(-top, top))
    return st.lists(level.map(lambda x: max(-top, min(top, x))), min_size=1, max_size=96)


@given(st.data(), st.integers(2, 8))
def test_every_mode_gives_the_levels_back(data: Any, bits: int) -> None:
    form, levels = form_of(bits, 96), data.draw(levels_in(bits))
    codes = (np.array(levels) + form.levels).astype(np.uint8)
    streams = {
        "sparse": reference.sparse_bits(levels), "dense": reference.dense_bits(levels),
        "plain": reference.plain_bits(levels, form),
    }  # fmt: skip
    for stream in streams.values():
        padded = stream + "0" * (-len(stream) % 8)
        assert reference.decode_block(padded, len(levels), form).tolist() == codes.tolist()
    shortest = reference.encode_block(codes, form)
    assert len(shortest) == min(map(len, streams.values()))
    assert (len(shortest) + 7) // 8 <= elias.stream_bytes(len(levels), form)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        ("", 1),
        ("00", 1),  # no count
        ("11", 2),
        ("00" + reference.omega(34), 3),  # 33 of 32
        ("00" + "1" * 20, 3),
        ("00" + reference.omega(2) + reference.omega(33) + "1" + "0", 5),
        ("00" + reference.omega(3) + reference.omega(32) + "10" + "0", 5),  # behind the last
        ("00" + reference.omega(2) + "0" + "1" + reference.omega(8), 4),  # L = 7
        ("10" + reference.omega(9), 4),
        ("10" + "0" * 31, 1),
        ("01" + "1111" + "0" * 124, 4),  # 2 L + 1
        ("01" + "0" * 120, 1),
        ("00" + "0" + "0" * 8, 6),  # a byte too many
        ("00" + "0" + "1", 6),  # padding that is not zero
    ],
)
def test_malformed_streams(stream: str, reason: int) -> None:
    with pytest.raises(elias.MalformedError, match="block 5 is malformed") as raised:
        reference.decode_block(stream, 32, form_of(4), block=5)
    assert raised.value.reason == reason


# --------------------------------------------------------------------------- the paper's bounds

# bits and block such that the number of levels is about the root of the block.
ROOTS = {4: 64, 5: 224, 6: 960, 7: 3968}
VECTORS: dict[str, Any] = {
    "normal": lambda rng, m: rng.standard_normal(m),
    "heavy-tailed": lambda rng, m: rng.standard_t(1.5, m),
    "sparse": lambda rng, m: rng.standard_normal(m) * (rng.random(m) < 0.05),
    "constant": lambda rng, m: np.ones(m),
}


def drawn_levels(vector: Any, bits: int, m: int, draws: int) -> Any:
    """Levels of independent roundings of one vector: int64 [draws, m]."""
    codec = QSGD(bits, m, "l2")
    x = np.tile(vector.astype(np.float32), draws)
    payload = arrays.quantize(x, codec, seed=3, step=7)
    size = codec.block_format.code_bytes(x.size)
    codes = rb.unpack_codes(payload[:size], x.size, bits)
    return codes.reshape(draws, m).astype(np.int64) - codec.block_format.levels


def sizes(kind: str, bits: int) -> tuple[float, float]:
    """Mean bits of the dense stream and of the one that is sent, without mode and norm."""
    m, form = ROOTS[bits], form_of(bits, ROOTS[bits])
    levels = drawn_levels(VECTORS[kind](np.random.default_rng(bits), m), bits, m, 8)
    dense = [len(reference.dense_bits(row.tolist())) for row in levels]
    sent = [
        len(reference.encode_block((row + form.levels).astype(np.uint8), form)) for row in levels
    ]
    return float(np.mean(dense)) - elias.MODE_BITS, float(np.mean(sent)) - elias.MODE_BITS


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "sparse"])
@pytest.mark.parametrize("bits", ROOTS)
def test_expected_size_where_levels_are_the_root_of_the_block(bits: int, kind: str) -> None:
    """QSGD's corollary 3.3 promises 2.8 m bits beside the norm, counting (1 + o(1)) log k + 1 bits
    for k. Of real words that o(1) is not nothing: dense streams of normal numbers take up to
    2.98 m. The shortest of three keeps the promise with a constant of 32 bits.
    """
    dense, sent = sizes(kind, bits)
    assert sent <= dense
    assert sent <= 2.8 * ROOTS[bits] + 32


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("bits", ROOTS)
def test_dense_streams_of_any_block_are_below_four_bits(bits: int, kind: str) -> None:
    """A level l takes at most 1 + 3 l bits, and where s is the root of m expected magnitudes add up
    to at most m (Cauchy-Schwarz): 4 m, which a constant block reaches."""
    assert all(len(reference.dense_bits([level])) <= 3 + 3 * level for level in range(1, 128))
    dense, sent = sizes(kind, bits)
    assert dense <= 4 * ROOTS[bits]
    assert sent <= 3.1 * ROOTS[bits]  # of 1s: gap, sign, level; and their count


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize(("bits", "m"), [(2, 512), (3, 512), (4, 4096), (5, 1024), (2, 32)])
def test_expected_number_of_nonzero_levels(bits: int, m: int, kind: str) -> None:
    """QSGD's lemma 3.1: at most s (s + root of m), in expectation."""
    levels = drawn_levels(VECTORS[kind](np.random.default_rng(m), m), bits, m, 64)
    s = 2 ** (bits - 1) - 1
    counts = (levels != 0).sum(1)
    assert counts.mean() <= min(m, s * (s + np.sqrt(m)))


# --------------------------------------------------------------------------- payloads


@given(st.integers(2, 8), st.sampled_from([32, 96, 512]), st.integers(0, 400),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_payloads_come_back(bits: int, block: int, n: int, seed: int) -> None:
    rng, form = np.random.default_rng(seed), form_of(bits, block)
    fixed = cases.some_fixed(rng, n, form)
    coded = reference.elias_encode(fixed, form, n)
    assert coded.size % 4 == 0
    assert np.array_equal(reference.elias_decode(coded, form, n), fixed)


def test_lengths_that_no_payload_has() -> None:
    form = form_of(4)
    coded = reference.elias_encode(np.zeros(form.payload_bytes(40), np.uint8), form, 40)
    for size in (0, 15, 17, coded.size + 1000):
        with pytest.raises(ValueError, match="no payload of 2 blocks"):
            reference.elias_decode(np.resize(coded, size), form, 40)
