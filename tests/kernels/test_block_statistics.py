"""What stochastic rounding promises: unbiased, and the variance bounds of QSGD (arXiv 1610.02132).

Every bound on a mean is Hoeffding's: of R independent values that lie within a step, the mean is
farther than ``step * sqrt(log(2 / risk) / (2 R))`` from its expectation with probability ``risk``
at most, whatever their distribution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pydist import QSGD, BlockInt, arrays

M, R = 512, 2048  # elements per block, repetitions
RISK = 1e-9
BIAS = 2.0**-16  # of a level: the resolution of the draws
BLOCKS: dict[str, Any] = {
    "normal": lambda rng: rng.standard_normal(M),
    "heavy-tailed": lambda rng: rng.standard_t(1.5, M),
    "sparse": lambda rng: rng.standard_normal(M) * (rng.random(M) < 0.05),
    "constant": lambda rng: np.full(M, 0.3),
    "tiny": lambda rng: rng.standard_normal(M) * 1e-30,
}
CODECS = [QSGD(bits, M, norm) for bits in (2, 3, 4, 8) for norm in ("max", "l2")] + [
    BlockInt(4, M, "stochastic")
]


def hoeffding(n: int, tests: int = 1) -> float:
    return float(np.sqrt(np.log(2 * tests / RISK) / (2 * n)))


def repeated(block: Any, codec: Any) -> tuple[Any, float]:
    """The block, encoded and decoded with R independent draws: float64 [R, M]; and a level."""
    x = np.tile(block, R)
    payload = arrays.quantize(x, codec, seed=7, rank=3, step=11)
    values = arrays.dequantize(payload, codec, x.size).astype(np.float64).reshape(R, M)
    exact = block.astype(np.float64)
    is_l2 = codec.block_format.norm == "l2"
    norm = np.sqrt((exact**2).sum()) if is_l2 else np.abs(exact).max()
    return values, float(norm) / codec.block_format.levels


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> Any:
    return BLOCKS[request.param](np.random.default_rng(1610)).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_unbiased(block: Any, codec: Any) -> None:
    values, level = repeated(block, codec)
    # An element's mean; then all errors away from zero together, in which a bias would add up.
    error = (values.mean(0) - block.astype(np.float64)) / level
    assert np.abs(error).max() <= hoeffding(R, M) + BIAS
    moved = block != 0
    outward = (error * np.sign(block))[moved].mean()
    assert abs(outward) <= hoeffding(R * int(moved.sum())) + BIAS


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_variance(block: Any, codec: Any) -> None:
    values, level = repeated(block, codec)
    exact = block.astype(np.float64)
    measured = ((values - exact) ** 2).sum(1)
    # A value between two levels is up with the probability p of its distance from the lower one.
    p = np.abs(exact) / level % 1.0
    expected = float((p * (1 - p)).sum() * level**2)
    spread = measured.std() / np.sqrt(R)
    assert abs(measured.mean() - expected) <= 6 * spread + BIAS * M * level**2
    energy, s = float((exact**2).sum()), codec.block_format.levels
    if codec.block_format.norm == "l2":  # Lemma 3.1
        bound = min(M / s**2, np.sqrt(M) / s) * energy
    else:  # a value is off by at most a level: p (1 - p) is at most a quarter
        bound = M / 4 * level**2
    assert measured.mean() <= bound * (1 + 1e-6) + 6 * spread


@pytest.mark.parametrize("bits", [2, 4])
def test_few_values_are_left_of_an_l2_norm(block: Any, bits: int) -> None:
    codec = QSGD(bits, M, "l2")
    values, _ = repeated(block, codec)
    s = codec.block_format.levels
    nonzero = (values != 0).sum(1)
    assert nonzero.mean() <= s * (s + np.sqrt(M)) + M * hoeffding(R)


def test_ranks_draw_differently() -> None:
    """Errors of independent ranks average out: 1 / n of the variance (with equal draws: all)."""
    x = np.random.default_rng(3).standard_normal(M * 64).astype(np.float32)
    codec, ranks = QSGD(3, M), 16
    payloads = np.stack([arrays.quantize(x, codec, seed=1, rank=r, step=5) for r in range(ranks)])
    one = float(((arrays.dequantize(payloads[0], codec, x.size) - x) ** 2).mean())
    mean = arrays.sum_quantized(payloads, codec, x.size, mean=True)
    assert float(((mean - x) ** 2).mean()) == pytest.approx(one / ranks, rel=0.05)


@pytest.mark.parametrize("change", ["seed", "rank", "phase", "step"])
def test_draws_depend_on_every_key(change: str) -> None:
    x = np.random.default_rng(4).standard_normal(4096).astype(np.float32)
    place = {"seed": 1, "rank": 1, "phase": 1, "step": 1}
    codes = [arrays.quantize(x, QSGD(2), **{**place, **other}) for other in ({}, {}, {change: 2})]
    assert np.array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).mean() > 0.2


def test_nearest_needs_no_draws() -> None:
    x = np.random.default_rng(4).standard_normal(4096).astype(np.float32)
    assert np.array_equal(arrays.quantize(x, BlockInt(4)), arrays.quantize(x, BlockInt(4), step=9))
