"""What TernGrad promises (arXiv 1705.07878): unbiased; sparse after clipping; ranks average out.

Bounds on means are Hoeffding's, as in test_block_statistics.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_block_statistics import BIAS, BLOCKS, M, R, hoeffding

from pydist import Ternary, arrays
from pydist.reference import ternary as reference


def decoded(x: Any, own: Any, shared: Any, **where: int) -> Any:
    payload = arrays.ternary_pack(x, own, shared=shared, **where)
    return arrays.ternary_unpack(payload, shared, x.size).astype(np.float64)


@pytest.mark.parametrize("clip", [None, 2.5, 1.0])
@pytest.mark.parametrize("other", [1.0, 1.7], ids=["own_scaler", "shared_scaler"])
@pytest.mark.parametrize("name", BLOCKS)
def test_unbiased_but_for_the_clipping(name: str, other: float, clip: float | None) -> None:
    """The mean of R draws is the clipped value, whatever scaler another rank brings in."""
    block = BLOCKS[name](np.random.default_rng(1705)).astype(np.float32)
    own = arrays.ternary_scale(block, Ternary(clip))
    shared = own * np.float32(other)
    values = decoded(np.tile(block, R), own, shared, seed=7, rank=3, step=11).reshape(R, M)
    step = float(shared[0])
    held = np.clip(block.astype(np.float64), -float(own[0]), float(own[0]))
    error = (values.mean(0) - held) / step
    assert np.abs(error).max() <= hoeffding(R, M) + BIAS
    moved = block != 0
    outward = (error * np.sign(block))[moved].mean()
    assert abs(outward) <= hoeffding(R * int(moved.sum())) + BIAS
    assert set(np.unique(values)) <= {-step, 0.0, step}
    # Each is 0 or ± s: its variance is p (1 - p) s².
    p = np.abs(held) / step
    measured = ((values - held) ** 2).sum(1) / step**2
    spread = measured.std() / np.sqrt(R)
    assert abs(measured.mean() - (p * (1 - p)).sum()) <= 6 * spread + BIAS * M


def test_clipping_of_normals_leaves_68_percent_zeros() -> None:
    """P(0) = 1 - E min(|x|, c) / c, which is 0.68245 at c = 2.5; without clipping more."""
    n, c = 2**20, 2.5
    x = np.random.default_rng(5).standard_normal(n).astype(np.float32)
    density, beyond = math.exp(-c * c / 2) / math.sqrt(2 * math.pi), math.erfc(c / math.sqrt(2))
    expected = 1 - (2 * (1 / math.sqrt(2 * math.pi) - density) + c * beyond) / c
    assert expected == pytest.approx(0.68245, abs=1e-5)
    own = arrays.ternary_scale(x, Ternary(c))
    # The deviation of n normals is off by 1 / sqrt(2 n) of itself, six times that at the most here,
    # and P(0) moves by less than as much.
    assert abs(float(own[0]) / c - 1) <= 6 / math.sqrt(2 * n)
    zeros = float((decoded(x, own, own, seed=1) == 0).mean())
    assert abs(zeros - expected) <= 2 * hoeffding(n) + 6 / math.sqrt(2 * n) + BIAS
    whole = arrays.ternary_scale(x, Ternary(None))
    assert whole[0] == np.abs(x).max()
    assert (decoded(x, whole, whole, seed=1) == 0).mean() > zeros + 0.1


def test_the_scaler_is_the_clipped_maximum() -> None:
    x = np.random.default_rng(6).standard_t(2, 100_000).astype(np.float32)
    deviation = float(np.sqrt((x.astype(np.float64) ** 2).mean()))
    for clip in (0.5, 1, 2.5, 10, 1e6, None):
        scaler = float(arrays.ternary_scale(x, Ternary(clip))[0])
        wanted = np.abs(x).max() if clip is None else min(clip * deviation, np.abs(x).max())
        assert scaler == pytest.approx(float(wanted), rel=2e-6)


def test_ranks_draw_differently() -> None:
    """Errors of independent ranks average out: 1 / n of the variance (with equal draws: all)."""
    x = np.random.default_rng(3).standard_normal(2**15).astype(np.float32)
    own, ranks = arrays.ternary_scale(x, Ternary(None)), 16
    payloads = np.stack([arrays.ternary_pack(x, own, seed=1, rank=r, step=5) for r in range(ranks)])
    one = float(((arrays.ternary_unpack(payloads[0], own, x.size) - x) ** 2).mean())
    mean = arrays.ternary_unpack(payloads, own, x.size, mean=True)
    assert float(((mean - x) ** 2).mean()) == pytest.approx(one / ranks, rel=0.05)


@pytest.mark.parametrize("change", ["seed", "rank", "step"])
def test_draws_depend_on_every_key(change: str) -> None:
    x, one = np.full(4096, 0.5, np.float32), np.ones(1, np.float32)
    place = {"seed": 1, "rank": 1, "step": 1}
    trits = [
        reference.unpack_trits(arrays.ternary_pack(x, one, **{**place, **other}))
        for other in ({}, {}, {change: 2})
    ]
    assert np.array_equal(trits[0], trits[1])
    assert (trits[0] != trits[2]).mean() == pytest.approx(0.5, abs=hoeffding(4096))
