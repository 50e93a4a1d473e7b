"""Special values: subnormals, overflow, NaN, zeros, rounding, random draws; and random cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, HOST_DOORS, Door
from hypothesis import given
from hypothesis import strategies as st

from pydist import selfcheck
from pydist.formats import wire
from pydist.kernels.lion import LionOptions
from pydist.reference import signs as reference
from pydist.selfcheck import cases

BETAS = {"beta1": 0.9, "beta2": 0.99}
EVERY_PATTERN = np.arange(65536, dtype=np.uint16)


# --------------------------------------------------------------------------- every 16-bit pattern


def test_every_half_precision_value(door: Door) -> None:
    for bits in (EVERY_PATTERN, EVERY_PATTERN.view(np.float16)):
        if selfcheck.storage_of(bits) not in door.storages:
            continue
        for zero_bit in (0, 1):
            selfcheck.check_pack_signs(door, bits, zero_bit=zero_bit)
        votes = np.tile(np.array([0x35, 0xC6], dtype=np.uint8), 4096)[None]
        # No change; half of everything (subnormal ties); roundings; steps beyond the largest value.
        for lr, decay in ((0.0, 0.0), (0.5, 1.0), (1e-3, 0.3), (65504.0, 0.0), (3e38, 1e-39)):
            selfcheck.check_lion_apply(door, bits, votes, lr=lr, weight_decay=decay)
        momentum = np.zeros(bits.size, dtype=np.float32)
        selfcheck.check_lion_pack(door, bits, momentum, LionOptions(**BETAS))


def test_every_bfloat16_momentum(door: Door) -> None:
    if "bfloat16" not in door.storages:
        pytest.skip("NumPy without ml_dtypes")
    grad = np.random.default_rng(1).standard_normal(65536).astype(np.float32)
    for scale in (0.0, 1.0, 3e38):
        with np.errstate(over="ignore"):
            scaled = grad * np.float32(scale)
        selfcheck.check_lion_pack(door, scaled, EVERY_PATTERN, LionOptions(**BETAS))


# --------------------------------------------------------------------------- what is not finite


def test_nan_is_stored_as_one_canonical_pattern(door: Door) -> None:
    patterns = {
        "float32": np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF], dtype=np.uint32).view("f4"),
        "float16": np.array([0x7C01, 0xFE12, 0x7FFF], dtype=np.uint16).view(np.float16),
        "bfloat16": np.array([0x7F81, 0xFFC1, 0x7FFF], dtype=np.uint16),
    }
    canonical = {"float32": "0000c07f", "float16": "007e", "bfloat16": "c07f"}
    for storage in door.storages:
        planes = np.zeros((1, 4), dtype=np.uint8)
        new = door.lion_apply(patterns[storage], planes, lr=1.0, weight_decay=0.0, ranks=None)
        assert new.tobytes().hex() == canonical[storage] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_element_that_is_not_finite_keeps_its_momentum(door: Door, bad: float) -> None:
    for place in (0, 31, 40):  # a full word and the tail
        grad = np.ones(41, dtype=np.float32)
        grad[place] = bad
        momentum = np.full(41, 0.25, dtype=np.float32)
        _, new, flags = door.lion_pack(grad, momentum, LionOptions(**BETAS), None)
        assert flags == wire.FLAG_NON_FINITE
        assert new[place] == np.float32(0.25)
        assert (np.delete(new, place) != np.float32(0.25)).all()


def test_momentum_that_overflows_when_stored_stays_as_it_was(door: Door) -> None:
    if "bfloat16" not in door.storages:
        pytest.skip("NumPy without ml_dtypes")
    old = np.full(33, 0x7F7F, dtype=np.uint16)  # the largest bfloat16
    grad = np.full(33, 3.4028235e38, dtype=np.float32)  # finite; rounds to infinity in bfloat16
    options = LionOptions(beta1=0.9, beta2=0.0)
    payload, new, flags = door.lion_pack(grad, old, options, None)
    assert flags == wire.FLAG_NON_FINITE
    assert_same_bits(new, old, "momentum")
    assert payload[0] == 255


def test_close_calls(door: Door) -> None:
    """Where a fused multiply-add or a scalar rounded elsewhere would turn a bit."""
    if "bfloat16" not in door.storages:
        pytest.skip("NumPy without ml_dtypes")
    for check in cases._lion_pack_close_calls(door, np.random.default_rng(3)):
        check()


def test_finite_input_raises_no_flag(door: Door) -> None:
    x = cases.SPECIALS[np.isfinite(cases.SPECIALS)]
    for n in range(1, x.size):  # tails are padded; padding must not raise a flag either
        assert door.pack_signs(x[:n], zero_bit=1, segments=None)[1] == 0


# --------------------------------------------------------------------------- zeros and subnormals


def test_zeros_of_both_signs_take_the_zero_bit(door: Door) -> None:
    tiny = np.array([1e-45, -1e-45], dtype=np.float32)  # not zero
    x = np.concatenate([np.array([0.0, -0.0], dtype=np.float32), tiny])
    assert door.pack_signs(x, zero_bit=1, segments=None)[0][0] == 0b0111
    assert door.pack_signs(x, zero_bit=0, segments=None)[0][0] == 0b0100
    zero = np.zeros(4, dtype=np.float32)
    for bit in (0, 1):
        payload, _, _ = door.lion_pack(zero, zero, LionOptions(**BETAS, zero_bit=bit), None)
        assert payload[0] == 0b1111 * bit


def test_flush_denormal_mode_changes_nothing(door: Door) -> None:
    tiny = np.array([1e-40, -1e-40, 1e-45, 2e-38, -2e-38, 1.2e-38], dtype=np.float32).repeat(7)
    half = np.array([6e-8, 3e-6, -6e-5, 1e-4], dtype=np.float16).repeat(7)
    votes = cases.some_payloads(np.random.default_rng(0), 1, tiny.size)

    def results() -> list[Any]:
        options = LionOptions(**BETAS)
        payload, _ = door.pack_signs(tiny, zero_bit=0, segments=None)
        packed = door.lion_pack(tiny, tiny[::-1], options, None)
        applied = door.lion_apply(tiny, votes, lr=2e-38, weight_decay=1e37, ranks=None)
        halves = door.lion_apply(half, votes[:, :4], lr=1e-7, weight_decay=0.0, ranks=None)
        return [payload, packed[0], packed[1], applied, halves]

    expected = results()
    assert torch.set_flush_denormal(True)
    try:
        got = results()
        assert (torch.tensor([1e-40]) * 1 == 0).all(), "the mode was left changed"
    finally:
        torch.set_flush_denormal(False)
    for actual, wanted in zip(got, expected, strict=True):
        assert_same_bits(actual, wanted, "with subnormals flushed")


def test_flush_denormal_mode_keeps_subnormal_scalars() -> None:
    door = Door(*HOST_DOORS[0])
    param, votes = np.zeros(4, dtype=np.float32), np.full((1, 4), 255, dtype=np.uint8)
    torch.set_flush_denormal(True)
    try:
        new = door.lion_apply(param, votes, lr=1e-40, weight_decay=0.0, ranks=None)
    finally:
        torch.set_flush_denormal(False)
    expected = reference.lion_apply(param, votes, lr=1e-40, weight_decay=0.0)
    assert_same_bits(new, expected, "lr=1e-40")


# --------------------------------------------------------------------------- skip


def test_skip_leaves_everything_as_it_is(door: Door) -> None:
    for layout in ("dense", "strided"):
        x = np.array([1.0, np.nan, -0.0, 1e-45] * 2, dtype=np.float32)
        there = np.repeat(x, 2)[::2] if layout == "strided" else x.copy()
        planes = door.native(np.zeros((1, 4), dtype=np.uint8))
        for value, untouched in ((1, True), (-1, True), (0, False)):
            skip = door.native(np.array([value], dtype=np.int32))
            door.call("lion_apply_", door.native(there), planes, lr=0.5, skip=skip)
            same = np.ascontiguousarray(there).tobytes() == x.tobytes()
            assert same == untouched, f"skip={value}, {layout}"


# --------------------------------------------------------------------------- stochastic votes


@pytest.mark.parametrize("c_over_r", [-1.5, -1.0, -0.5, 0.0, 0.25, 0.9, 1.0, 2.0])
def test_stochastic_votes_have_the_stated_mean(door: Door, c_over_r: float) -> None:
    n, r = 2**15, 0.125
    grad = np.full(n, c_over_r * r, dtype=np.float32)
    momentum = grad.copy()  # so the direction is the gradient, whatever beta1
    options = LionOptions(0.5, 0.5, binarization_range=r, seed=7, rank=3, step=11)
    payload, _, _ = door.lion_pack(grad, momentum, options, None)
    p = float(np.clip((1 + c_over_r) / 2, 0, 1))
    share = reference.unpack_bits(payload, n).mean()
    # Five standard deviations of a binomial share; exact where the vote is certain.
    assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)


def test_stochastic_votes_depend_on_their_place_alone(door: Door) -> None:
    zero = np.zeros(96, dtype=np.float32)
    base = LionOptions(**BETAS, binarization_range=1.0, seed=1, rank=1, step=1)

    def votes(options: LionOptions, table: wire.IntArray | None = None) -> bytes:
        payload, _, _ = door.lion_pack(zero, zero, options, table)
        return bytes(payload)

    assert votes(base) == votes(base)
    for field in ("seed", "rank", "step"):
        assert votes(base) != votes(dataclasses.replace(base, **{field: 2})), field
    assert votes(base) != votes(base, wire.segments([96], ordinals=[1]))
    assert votes(base)[4:] + votes(base, wire.segments([96], firsts=[96]))[:4] == votes(
        base, wire.segments([96], firsts=[32])
    )


def test_a_very_wide_binarization_range_is_not_plain_signs() -> None:
    grad = np.ones(256, dtype=np.float32)
    try:
        selfcheck.check_lion_pack(
            Door(*HOST_DOORS[0]), grad, grad, LionOptions(**BETAS, binarization_range=1e46)
        )
    except ValueError as error:  # refusing it is as good
        assert "binarization_range" in str(error)


# --------------------------------------------------------------------------- random cases

Keys = list[tuple[str, str]]
layouts = st.sampled_from(["dense", "offset", "strided"])
lengths = st.integers(0, 300)
seeds = st.integers(0, 2**32 - 1)
steps = st.integers(0, 2**40)


def some_door(data: Any, keys: Keys) -> Door:
    key, threads = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from([1, 2]))
    return Door(*key, data.draw(layouts), threads, data.draw(st.booleans()))


@pytest.mark.parametrize("keys", DOOR_GROUPS)
@given(seeds, st.lists(lengths, min_size=1, max_size=4), st.booleans(), st.data())
def test_random_encoders(keys: Keys, seed: int, sizes: list[int], bare: bool, data: Any) -> None:
    door = some_door(data, keys)
    rng = np.random.default_rng(seed)
    firsts = [data.draw(st.integers(0, 2**45)) for _ in sizes]
    table = None if bare else wire.segments(sizes, firsts=firsts)
    n, storage = sum(sizes), data.draw(st.sampled_from(door.storages))
    grad = cases.some_bits(rng, n, storage)
    momentum = cases.some_bits(rng, n, "float32", finite=data.draw(st.booleans()))
    options = LionOptions(
        data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1)), data.draw(st.integers(0, 1)),
        data.draw(st.none() | st.floats(1e-30, 1e30)), seed, data.draw(st.integers(0, 65534)),
        data.draw(steps),
    )  # fmt: skip
    selfcheck.check_pack_signs(door, grad, zero_bit=options.zero_bit, segments=table)
    selfcheck.check_lion_pack(door, grad, momentum, options, table)


@pytest.mark.parametrize("keys", DOOR_GROUPS)
@given(seeds, st.integers(1, 40), st.integers(0, 5000), st.data())
def test_random_votes(keys: Keys, seed: int, ranks: int, n: int, data: Any) -> None:
    door = some_door(data, keys)
    rng = np.random.default_rng(seed)
    payloads = cases.some_payloads(rng, ranks, n)
    ties, step = data.draw(st.sampled_from(cases.TIES)), data.draw(steps)
    table = data.draw(st.sampled_from([None, cases.some_segments(rng, n)]))
    if table is not None:
        payloads = cases.some_payloads(rng, ranks, 32 * wire.segments_words(table))
    vote = {"ties": ties, "seed": seed, "step": step, "segments": table}
    selfcheck.check_majority_vote(door, payloads, n=n if table is None else None, **vote)
    selfcheck.check_count_votes(door, payloads)


@pytest.mark.parametrize("keys", DOOR_GROUPS)
@given(seeds, lengths, st.floats(0, 1e30), st.floats(0, 10), st.data())
def test_random_updates(
    keys: Keys, seed: int, n: int, lr: float, weight_decay: float, data: Any
) -> None:
    door = some_door(data, keys)
    rng = np.random.default_rng(seed)
    ranks = data.draw(st.none() | st.integers(1, wire.MAX_RANKS))
    count = data.draw(st.integers(1, 2)) if ranks is None else wire.planes_for(ranks)
    planes = cases.some_payloads(rng, count, n)
    storage = data.draw(st.sampled_from(door.storages))
    param = cases.some_bits(rng, n, storage)
    selfcheck.check_lion_apply(door, param, planes, lr=lr, weight_decay=weight_decay, ranks=ranks)
    mean = data.draw(st.booleans())
    selfcheck.check_unpack_votes(door, planes, n, ranks=ranks, mean=mean, storage=storage)
