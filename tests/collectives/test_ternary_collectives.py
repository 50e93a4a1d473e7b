"""Ternary in messages: shared scalers, exact sums, what travels. More in test_codecs.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ranks_ternary as cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Worlds
from ranks_codecs import inputs
from test_collectives import same_on_all_ranks

from pydist import Ternary, ops, simulate
from pydist.encoding.choose import all_reduce_coder
from pydist.encoding.coders import ReduceCoder
from pydist.encoding.plans import Plan, Shards
from pydist.encoding.ternary import TernaryRows
from pydist.formats import ternary, wire
from pydist.reference import ternary as rt
from pydist.transport.coder import Coder, Worker

pytestmark = pytest.mark.timeout(180)


def coder_of(x: Any, worker: Worker, clip: float | None = 2.5) -> Coder:
    return all_reduce_coder(x, Ternary(clip), worker, op="mean", ties="hash", seed=4)


# --------------------------------------------------------------------------- real ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sums_are_those_of_the_trits(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.exact_sums, [1, 160, 5003]))


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_traffic(worlds: Worlds, ranks: int) -> None:
    """1.6 bits per element up, ceil(log2(2 n + 1)) back, a scaler per layer beforehand."""
    units = 6
    trits = (ranks - 1) * (units * 32 + 16)
    expected = {
        "agreement": 3 * (ranks - 1) * 16,
        # An all-reduce has one layer, a scatter n; each has a header.
        "scales": (ranks - 1) * (4 + 4 * ranks + 2 * 16),
        "confirmation": 3 * (ranks - 1) * 16,
        "phase 1": 3 * trits + (ranks - 1) * 4,  # gathered trits have their scaler with them
        "phase 2": (ranks - 1) * (units * 160 * 3 // 8 + 16),
    }
    assert worlds(ranks).run(cases.traffic, 160 * units) == [expected] * ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sum_beyond_float32(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.overflow)


@pytest.mark.multiprocess
def test_another_clip_on_one_rank(worlds: Worlds) -> None:
    for kind, message in worlds(3).run(cases.refused):
        assert kind == "MismatchError", message
        assert 'codec is "Ternary(clip=None)" on rank 0' in message
        assert '"Ternary(clip=2.5)" on ranks 1, 2' in message


# --------------------------------------------------------------------------- in one process


@given(st.integers(1, 40), st.integers(0, 400), st.integers(0, 2**32 - 1), st.booleans())
def test_sums_are_exact(ranks: int, n: int, seed: int, mean: bool) -> None:
    """Whatever the number of workers: the integers of their trits, divided once."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((ranks, n)) * rng.choice([0.1, 1, 30], (ranks, 1))).astype(np.float32)
    tensors = [torch.from_numpy(row) for row in x]
    got = simulate.all_reduce(tensors, Ternary(), op="mean" if mean else "sum", seed=seed, step=7)
    own = np.stack([rt.scale(row, 2.5)[0] for row in x])
    shared = rt.shared_scalers(own)
    total = np.zeros(n, dtype=np.int64)
    for rank, row in enumerate(x):
        draws = rt.Draws(seed, rank, 0, 7)
        payload, _ = rt.pack(row, own[rank], shared=shared, draws=draws)
        total += rt.unpack_trits(np.pad(payload, (0, -payload.size % 32)))[:n]
    assert np.abs(total).max(initial=0) <= ranks
    wanted = shared * (total.astype(np.float32) / np.float32(ranks if mean else 1))
    assert got.numpy().tobytes() == wanted.astype(np.float32).tobytes()


def test_scalers_are_shared() -> None:
    """A rank with small values draws against the largest scaler of all."""
    small, large = torch.full((1000,), 0.25), torch.full((1000,), 2.0)
    total = simulate.all_reduce([small, large], Ternary(None), op="sum")
    assert set(total.unique().tolist()) == {2.0, 4.0}
    assert float((total == 4).float().mean()) == pytest.approx(1 / 8, abs=0.06)
    gathered = simulate.all_gather([small, large], Ternary(None))
    assert bool((gathered[0] == 0.25).all()) and bool((gathered[1] == 2).all())


def test_each_share_has_a_scaler() -> None:
    x = torch.cat([torch.full((50,), 3.0), torch.full((50,), 1e-3)])
    shares = simulate.reduce_scatter([x, x], Ternary(None))
    assert bool((shares[0] == 3).all()) and bool((shares[1] == np.float32(1e-3)).all())


def test_zeros_and_empty_tensors() -> None:
    for n in (0, 1, 500):
        x = torch.zeros(n)
        x[::2] = -0.0
        assert not simulate.all_reduce([x, x, x], Ternary()).any()
        assert simulate.all_gather([x, x], Ternary()).shape == (2, n)
        assert not torch.signbit(simulate.all_reduce([x, x], Ternary())).any()


def test_bytes_of_shards() -> None:
    """The payload's units, shard by shard; units past the end are zeros, not what was there."""
    x = inputs(1, 7 * 160 + 5, torch.float32, seed=1)[0]
    coder = coder_of(x, Worker(1, 3, 6))
    own, _ = rt.scale(x.numpy(), 2.5)
    scales = coder.scales()
    assert scales is not None and scales.numpy().tobytes() == own.tobytes()
    others = np.stack([own / 2, own, own * np.float32(1.5)])
    coder.merge_scales(torch.from_numpy(others).view(torch.uint8))
    assert coder.units == 8
    rows = torch.full((3, coder.message_bytes(3) + 16), 0xFF, dtype=torch.uint8)
    coder.encode(rows[:, 16:], 3, 0, coder.units)
    payload, _ = rt.pack(x.numpy(), own, shared=others[2], draws=rt.Draws(4, 1, 0, 6))
    assert rows[:, 16:].numpy().tobytes() == payload.tobytes().ljust(3 * 96, b"\0")
    assert bool((rows[:, :16] == 0xFF).all())
    out = torch.full((coder.reduced_bytes(3),), 0xFF, dtype=torch.uint8)
    coder.reduce(rows[2:, 16:].repeat(3, 1), out, 3, 8, 8, coder.flags)
    assert not out.any(), "a shard without data"
    few = coder_of(x[:5], Worker(0, 1, 0))
    assert few.message_bytes(1) == ternary.payload_bytes(5) == 8


def test_malformed_messages_raise() -> None:
    x = torch.ones(400)
    coder = coder_of(x, Worker(0, 2, 0))
    own = coder.scales()
    assert own is not None
    coder.merge_scales(torch.stack([own, own]))
    flags = torch.zeros(1, dtype=torch.int32)
    messages = torch.zeros(2, coder.message_bytes(3), dtype=torch.uint8)
    out = torch.zeros(1, coder.reduced_bytes(3), dtype=torch.uint8)
    messages[1, 40] = 243
    with pytest.raises(ValueError, match="payloads have a byte above 242.*malformed"):
        coder.reduce(messages, out[0], 3, 0, 3, flags)
    out[0] = 0
    out[0, 40:] = 0xFF  # a sum of -4 + ... beyond what two ranks can have
    out[0, :40] = 0
    with pytest.raises(ValueError, match="sums have one that is beyond ± ranks: malformed"):
        coder.decode(out, 3, 0, 3)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_coder_of_several_layers(ranks: int) -> None:
    """Each has its own scaler and positions, wherever units are cut."""
    lengths, seed, step = [200, 0, 33, 700, 1], 9, 4
    table = wire.segments(lengths, ordinals=[3, 1, 8, 2, 5], block=ternary.UNIT)
    tensors = inputs(ranks, sum(lengths), torch.float32, seed=2)
    begins = np.cumsum(lengths) - lengths
    layers = [
        Shards(ordinal, (int(begin),), (n,))
        for ordinal, begin, n in zip(table[:, 2].tolist(), begins, lengths, strict=True)
    ]
    plan, coding = Plan.of_shards(layers, ternary.UNIT, 1), TernaryRows(2.5, ranks)
    coders = [
        ReduceCoder(x.clone(), coding, plan, Worker(r, ranks, step), mean=True, seed=seed)
        for r, x in enumerate(tensors)
    ]
    all_scales = torch.stack([c.scales() for c in coders])  # type: ignore[misc]
    flags = torch.zeros(1, dtype=torch.int32)
    for coder in coders:
        coder.merge_scales(all_scales)
    for begin, end in ((0, 3), (3, 4), (4, coders[0].units)):
        units = end - begin
        messages = torch.full((ranks, coders[0].message_bytes(units)), 0xFF, dtype=torch.uint8)
        for coder, row in zip(coders, messages, strict=True):
            coder.encode(row.view(1, -1), units, begin, end)
        out = torch.full((1, coders[0].reduced_bytes(units)), 0xFF, dtype=torch.uint8)
        coders[0].reduce(messages, out[0], units, begin, end, flags)
        coders[0].decode(out, units, begin, end)
    values = [x.numpy() for x in tensors]
    own = np.stack([rt.scale(x, 2.5, segments=table)[0] for x in values])
    shared = rt.shared_scalers(own)
    payloads = np.stack(
        [
            rt.pack(x, own[r], shared=shared, draws=rt.Draws(seed, r, 0, step), segments=table)[0]
            for r, x in enumerate(values)
        ]
    )
    wanted, _ = rt.unpack(payloads, shared, sum(lengths), mean=True, segments=table)
    assert coders[0].flat.numpy().tobytes() == wanted.tobytes()
    assert not flags.any()


def test_example_of_the_kernels() -> None:
    """Two ranks by hand, as the documentation has it."""
    grads = [torch.randn(1000) for _ in range(2)]
    own = [ops.ternary_scale(g, Ternary()) for g in grads]
    shared = torch.maximum(*own)
    payloads = torch.stack(
        [ops.ternary_pack(g, own[r], shared=shared, rank=r) for r, g in enumerate(grads)]
    )
    sums = ops.ternary_sum(payloads, 1000)
    mean = ops.ternary_unpack_sums(sums, shared, 1000, ranks=2, mean=True)
    assert torch.equal(mean, ops.ternary_unpack(payloads, shared, 1000, mean=True))
    assert torch.equal(mean, simulate.all_reduce(grads, Ternary()))
