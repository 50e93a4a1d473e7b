"""TopK itself: sizes, what is kept, no preferred index, what a second selection does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from pydist import TopK, arrays, ops, simulate
from pydist.formats.topk import BITMAP, TopKFormat
from pydist.reference import topk as reference


@given(st.floats(2**-32, 1), st.integers(1, 2048), st.sampled_from(["float32", "float16"]))
def test_sizes(density: float, block: int, values: str) -> None:
    form = TopKFormat(density, 32 * block, values)
    sizes = [form.bytes_of(n) for n in range(1, form.block + 1, max(1, form.block // 50))]
    assert sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    assert sizes[-1] <= form.block_bytes
    k = form.entries(form.block)
    assert k == max(1, math.floor(form.block * form.share / 2**32 + 0.5))
    assert abs(k - density * form.block) <= max(1, 0.5 + form.block / 2**32)
    low = form.low_bits
    bitmap = form.block
    fano = math.inf if low == BITMAP else k * low + k + ((form.block - 1) >> low)
    if low != BITMAP:  # what was chosen is the shorter
        assert fano <= bitmap
        assert fano / k <= 2 + math.log2(form.block / k) + 1e-9
    else:
        best = min(k * w + k + ((form.block - 1) >> w) for w in range(17))
        assert bitmap <= best


@pytest.mark.parametrize(
    ("density", "block", "values", "bits"),
    [
        (0.001, 16384, "float32", 44.0), (0.001, 32768, "float32", 44.6),
        (0.01, 32768, "float32", 40.7), (0.001, 65536, "bfloat16", 28.6),
        (0.25, 32768, "float32", 36.0), (0.5, 32768, "float16", 18.0),
    ],
)  # fmt: skip
def test_bits_an_entry(density: float, block: int, values: str, bits: float) -> None:
    """32 bits of value and 32 of index would be 64."""
    form = TopKFormat(density, block, values)
    assert form.block_bytes * 8 / form.entries(block) == pytest.approx(bits, abs=0.1)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: TopK(0.0), ValueError, r"density must be from 2\*\*-32 to 1, got 0.0"),
    "more": (lambda: TopK(1.5), ValueError, "density must be.*got 1.5"),
    "nan": (lambda: TopK(math.nan), ValueError, "density must be.*got nan"),
    "block": (lambda: TopK(0.1, 33), ValueError, "block must be a multiple of 32.*got 33"),
    "block float": (lambda: TopK(0.1, 64.0), TypeError, "block must be an int, got 64.0"),
    "values": (lambda: TopK(values="int8"), ValueError, "values must be one of.*got 'int8'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    call, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        call()


def positions_of(payload: Any, codec: TopK, n: int) -> Any:
    return np.flatnonzero(arrays.topk_scatter(payload[None], codec, n))


def test_no_index_is_preferred() -> None:
    """Constant magnitudes over many steps: every position is sent as often as every other."""
    codec, n, steps = TopK(0.1, 64), 64 * 4 + 30, 3000
    x = np.where(np.arange(n) % 3 == 0, -1, 1).astype(np.float32)
    counts = np.zeros(n)
    for step in range(steps):
        counts[positions_of(arrays.topk_select(x, codec, seed=9, step=step), codec, n)] += 1
    k = [codec.topk_format.entries(size) for size in (64, 64, 64, 64, 30)]
    assert counts.sum() == steps * sum(k)
    for begin, size, entries in zip(range(0, n, 64), (64, 64, 64, 64, 30), k, strict=True):
        part, share = counts[begin : begin + size], entries / size
        deviation = (part - steps * share) / math.sqrt(steps * share * (1 - share))
        assert np.abs(deviation).max() < 4.5, f"block from {begin}"
        # A mean position of a uniform run; an order by index would give a mean of entries / 2.
        assert abs(part @ np.arange(size) / part.sum() - (size - 1) / 2) < 1.5


def test_order_of_ties_depends_on_seed_step_parameter_and_block() -> None:
    turns = [
        reference.turn_of(*place, 65536)
        for place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    ]
    assert len(set(turns)) == 5
    assert reference.turn_of(0, 2**32, 0, 0, 65536) == turns[0], "steps count modulo 2**32"


def test_a_second_selection_keeps_the_largest_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4096, generator=generator) for _ in range(4)]
    codec = TopK(0.05, 512)
    parts = simulate.all_gather(tensors, codec)
    mean = parts.sum(0) / 4
    result = simulate.all_reduce(tensors, codec)
    k = codec.topk_format.entries(512)
    for want, got in zip(mean.view(-1, 512), result.view(-1, 512), strict=True):
        assert int(got.count_nonzero()) == k < int(want.count_nonzero())
        kept = got != 0
        assert torch.equal(got[kept], want[kept])
        assert float(want[kept].abs().min()) >= float(want[~kept].abs().max())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_reduce_scatter_selects_once(ranks: int) -> None:
    tensors = [torch.randn(64 * ranks) for _ in range(ranks)]
    codec = TopK(0.25, 64)
    shares = simulate.reduce_scatter(tensors, codec, op="sum")
    for i, share in enumerate(shares):
        entries = torch.zeros(64)
        for x in tensors:
            part = x[64 * i : 64 * (i + 1)]
            chosen = part.abs().topk(16).indices
            entries[chosen] += part[chosen]
        assert_same_bits(share.numpy(), entries.numpy(), f"share {i}")


def test_exact_beside_torch() -> None:
    x = torch.randn(3 * 65536)
    payload = ops.topk_select(x, TopK(0.01))
    got = ops.topk_scatter(payload[None], TopK(0.01), x.numel())
    for part, kept in zip(x.view(3, -1), got.view(3, -1), strict=True):
        wanted = part.abs().topk(655).indices.sort().values
        assert torch.equal(kept.nonzero().ravel(), wanted)
        assert torch.equal(kept[wanted], part[wanted])


def test_error_feedback_sends_everything_in_time() -> None:
    """A constant gradient: what was sent over many steps comes close to what was asked for."""
    codec, steps = TopK(0.05, 256), 200
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) + 1
    residual, sent = torch.zeros(1000), torch.zeros(1000)
    for step in range(steps):
        payload = ops.topk_feedback_(x, residual, codec, step=step)
        sent += ops.topk_scatter(payload[None], codec, 1000)
    assert torch.allclose(sent + residual, steps * x, rtol=1e-4, atol=1e-2)
    assert float(residual.norm() / (steps * x).norm()) < 0.15
