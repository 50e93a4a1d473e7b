"""Top-k blocks are bit-identical to their reference: instruction sets, types, places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, Door
from hypothesis import given
from hypothesis import strategies as st

from pydist.formats import blocks, topk, wire
from pydist.formats.topk import TopKFormat
from pydist.kernels.launch import launch
from pydist.kernels.topk import encode_args
from pydist.reference import topk as reference
from pydist.selfcheck import topk as cases
from pydist.selfcheck.backends import HostMemory
from pydist.selfcheck.runner import Order

LENGTHS = (0, 1, 7, 31, 32, 33, 63, 65, 1001)
# An emulated thread block costs as much as thousands of elements on the CPU.
FEW_LENGTHS = (0, 1, 33, 145)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1712)


# --------------------------------------------------------------------------- lengths and types


@pytest.mark.parametrize("form", cases.FORMATS[::4], ids=str)
def test_every_format_type_and_length(door: Door, form: TopKFormat) -> None:
    rng = np.random.default_rng(form.block)
    few = door.kind == "emulated"
    for storage in door.storages:
        for n in FEW_LENGTHS if few else LENGTHS:
            x = cases.some_bits(rng, n, form, storage)
            cases.check_select(door, x, form, cases.some_order(rng))
            kept_as = "bfloat16" if n % 2 and "bfloat16" in door.storages else "float32"
            kept = cases.some_bits(rng, n, form, kept_as, finite=True)
            cases.check_feedback(door, x, kept, form, cases.some_order(rng))
    for ranks in (1, 3) if few else (1, 2, 5):
        payloads = cases.some_payloads(rng, ranks, 145, form)
        for mean in (False, True):
            cases.check_reduce(door, payloads, 145, form, cases.some_order(rng), mean=mean)
            for storage in door.storages[:1] if few else door.storages:
                cases.check_scatter(door, payloads, 145, form, mean=mean, storage=storage)


@pytest.mark.parametrize("block", [32, 1056, 65536])
def test_every_size_of_blocks(door: Door, rng: np.random.Generator, block: int) -> None:
    large = door.kind == "emulated" and block > 4096
    if large and door.isa != "seed1":
        pytest.skip("seconds an order")
    for density in (0.01,) if large else (1 / block, 0.001, 0.01, 0.1, 0.25, 0.26, 1.0):
        form = TopKFormat(density, block)
        x = rng.standard_normal(block if large else 2 * block + 40).astype(np.float32)
        cases.check_select(door, x, form, cases.some_order(rng))


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, rng: np.random.Generator, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("torch has no such tensors")
    door = door.using(layout=layout)
    few = door.kind == "emulated"
    for form in cases.FORMATS[3::8] if few else cases.FORMATS[::4]:
        for storage in door.storages:
            for n in (33,) if few else (1, 33, 201):
                x = cases.some_bits(rng, n, form, storage)
                cases.check_select(door, x, form)
                kept = cases.some_bits(rng, n, form, "float32", finite=True)
                cases.check_feedback(door, x, kept, form)
        payloads = cases.some_payloads(rng, 3, 65, form)
        cases.check_reduce(door, payloads, 65, form)
        cases.check_scatter(door, payloads, 65, form)


@pytest.mark.parametrize("group", DOOR_GROUPS)
def test_large_arrays_with_one_thread_and_several(group: list[tuple[str, str]]) -> None:
    rng, n, form = np.random.default_rng(2), 2**17 + 2**14 + 77, TopKFormat(0.004, 16384)
    x, order = rng.standard_normal(n).astype(np.float32), cases.some_order(rng)
    x[2**17 :] = np.round(x[2**17 :] * 4)  # many ties
    payload, _ = reference.select(x, form, seed=order.seed, step=order.step)
    decoded = reference.scatter(payload[None], form, n)
    for kind, isa in group[::2] if group[0][0] == "emulated" else group:
        for threads in (1, 3):
            door = Door(kind, isa, "dense", threads)
            got, flags = door.topk_select(x, form, order, None)
            assert_same_bits(got, payload, f"select on {door.name}")
            values, _ = door.topk_scatter(
                payload[None], n, form, mean=False, storage="float32", segments=None
            )
            assert_same_bits(values, decoded, f"scatter on {door.name}")
            assert flags == 0


def test_blocks_that_mislead_the_next(door: Door, rng: np.random.Generator) -> None:
    """Thresholds are learned from block to block; these have nothing to do with each other."""
    block = 2048
    x = rng.standard_normal((12, block))
    scales = [1, 1e20, 1, 1e-20, 1, 0, 1, 1e-42, 1e30, 1, 1, 1]
    x = (x * np.array(scales)[:, None]).astype(np.float32)
    x[4] = np.where(np.arange(block) % 9 == 0, x[4], 0)  # what a strided sample sees differs
    x[9, :] = 1
    x[9, 5] = 2
    x[10, ::8] = 1e9
    for density in (0.002, 0.05, 0.2):
        if density == 0.002 or door.kind != "emulated":  # there each block stands alone
            cases.check_select(door, x.ravel(), TopKFormat(density, block), cases.some_order(rng))


def test_samples_that_mislead(door: Door, rng: np.random.Generator) -> None:
    """CUDA guesses a block's threshold from a sixteenth to a half of it: runs of 256, evenly apart.

    A guess that is too high or too low must not show, nor what the guess never saw.
    """
    block, apart = 8192, 528
    seen = (np.arange(0, 15 * apart + 1, apart)[:, None] + np.arange(256)).ravel()
    hidden = np.setdiff1d(np.arange(block), seen)
    x = rng.standard_normal((14, block)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 1, 0, -0.0, np.sort(x[3])
    x[4] = np.sort(np.abs(x[4]))[::-1]
    x[5, seen[:90]] *= 1e3  # too high a guess, where 90 are fewer than k
    x[6, hidden] *= 1e3  # too low: thousands are above it
    x[7, hidden] = np.where(rng.random(hidden.size) < 0.01, x[7, hidden], 0)
    x[7, seen] = 0
    x[8] = 0
    x[8, hidden[::99]] = -1e-45  # fewer than k that are not zero
    x[9, hidden[7]] = 3e38
    x[10, hidden[11]], x[11, hidden[-1]], x[12, seen[5]] = np.nan, -np.inf, np.inf
    x[13] = np.round(x[13] * 2)  # ties, more than there is room for
    form = TopKFormat(100 / block, block)
    cases.check_select(door, x.ravel(), form, cases.some_order(rng))
    kept = (rng.standard_normal(x.size) * (rng.random(x.size) < 0.5)).astype(np.float32)
    cases.check_feedback(door, x.ravel(), kept, form, cases.some_order(rng))
    if door.kind != "emulated":
        cases.check_select(door, x.ravel(), TopKFormat(1.0, block), cases.some_order(rng))


# --------------------------------------------------------------------------- values


def test_ties_signs_and_subnormals(door: Door) -> None:
    rng, tiny = np.random.default_rng(3), np.array(1e-45, np.float32)
    blocks_of_ties = [
        np.ones(96), -np.ones(96), np.zeros(96), np.full(96, -0.0), np.full(96, tiny),
        rng.choice([-1, 1], 96), rng.choice([0.0, -0.0], 96), rng.choice([0, tiny], 96),
        rng.choice([-2, -1, 1, 2], 96), np.where(np.arange(96) == 95, tiny, 0),
        np.full(96, 3.4028235e38), np.arange(96) * tiny,
    ]  # fmt: skip
    x = np.concatenate(blocks_of_ties).astype(np.float32)
    few = door.kind == "emulated"
    for density in (0.1, 0.5) if few else (0.01, 0.1, 0.5, 0.99, 1.0):
        for values in ("float32",) if few else ("float32", "bfloat16", "float16"):
            form = TopKFormat(density, 96, values)
            for seed in range(2 if few else 5):
                cases.check_select(door, x, form, Order(seed, seed))
                cases.check_feedback(door, x, np.zeros_like(x), form, Order(seed, seed))


def test_all_of_it_comes_back_at_density_one(door: Door, rng: np.random.Generator) -> None:
    x = cases.some_values(rng, 1001, 64, finite=True)
    payload, _ = door.topk_select(x, TopKFormat(1.0, 64), Order(), None)
    got, _ = door.topk_scatter(
        payload[None], 1001, TopKFormat(1.0, 64), mean=False, storage="float32", segments=None
    )
    assert_same_bits(got, x + np.float32(0), "values, and +0 for -0")


def test_nothing_is_lost(door: Door, rng: np.random.Generator) -> None:
    """What was sent and the residual are what there was, bit for bit, in every type of values."""
    x = (rng.standard_normal(3000) * 1e3).astype(np.float32)
    x[7], x[2005] = 1e38, -7e4  # beyond float16, the first beyond bfloat16 after rounding, too
    for values in ("float32", "bfloat16", "float16"):
        form = TopKFormat(0.02, 512, values)
        payload, new, flags = door.topk_feedback(x, np.zeros_like(x), form, Order(), None)
        sent, _ = door.topk_scatter(
            payload[None], x.size, form, mean=False, storage="float32", segments=None
        )
        assert flags == 0 and np.isfinite(sent).all()
        assert_same_bits(sent + new, x, f"sent + residual, {values}")
        if values == "float32":
            assert not new[sent != 0].any()
        else:
            assert new[sent != 0].any()
    assert sent[7] == 65504 and sent[2005] == -65504


def test_residuals_of_what_is_not_finite_stay(door: Door) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x, kept = np.ones(150, dtype=np.float32), np.full(150, 0.25, dtype=np.float32)
        x[70] = bad
        form = TopKFormat(0.1, 64)
        payload, new, flags = door.topk_feedback(x, kept, form, Order(), None)
        assert flags == wire.FLAG_NON_FINITE
        assert_same_bits(new[64:128], kept[64:128], "residuals of the block")
        assert np.isfinite(new).all()
        got, _ = door.topk_scatter(
            payload[None], 150, form, mean=False, storage="float32", segments=None
        )
        assert np.isnan(got[64:70]).all() and np.isfinite(np.delete(got, slice(64, 128))).all()


def test_kept_mass_is_that_of_the_largest(door: Door, rng: np.random.Generator) -> None:
    form = TopKFormat(0.01, 1024)
    for x in (rng.standard_normal(8192), rng.standard_cauchy(8192), np.ones(8192)):
        x = x.astype(np.float32)
        payload, _ = door.topk_select(x, form, Order(), None)
        got, _ = door.topk_scatter(
            payload[None], x.size, form, mean=False, storage="float32", segments=None
        )
        k = form.entries(1024)
        for part, kept in zip(x.reshape(-1, 1024), got.reshape(-1, 1024), strict=True):
            wanted = np.sort(np.abs(part))[-k:]
            assert_same_bits(np.sort(np.abs(kept))[-k:], wanted, "the largest magnitudes")
            assert np.count_nonzero(kept) == k
        assert np.array_equal(got[got != 0], x[got != 0])


def test_clear(door: Door, rng: np.random.Generator) -> None:
    form, x = TopKFormat(0.1, 64), rng.standard_normal(201).astype(np.float32)
    payload, _ = door.topk_select(x, form, Order(), None)
    kept, _ = door.topk_scatter(
        payload[None], 201, form, mean=False, storage="float32", segments=None
    )
    for storage in door.storages:
        momentum = cases.store(np.ones(201, np.float32), storage)  # type: ignore[arg-type]
        got, flags = door.topk_clear(momentum, payload, form, None)
        assert flags == 0
        assert_same_bits(got == 0, kept != 0, f"places of zeros, {storage}")
        assert set(np.unique(got)) == {0, momentum[0]}


# --------------------------------------------------------------------------- segments


def test_segments(door: Door, rng: np.random.Generator) -> None:
    for form in (TopKFormat(0.1, 64), TopKFormat(0.5, 64, "float16"), TopKFormat(0.02, 64)):
        tables = [
            wire.segments([], block=64),
            wire.segments([0], block=64),
            wire.segments([0, 5, 0, 0, 64, 1, 0], block=64),
            wire.segments([63, 64, 65], ordinals=[2, 0, 1], firsts=[64, 0, 2**33], block=64),
            np.array([[192, 40, 0, 0], [640, 3, 1, 64]], dtype=np.int64),  # gaps
        ]
        for table in tables:
            n = int(table[:, 1].sum())
            x = cases.some_bits(rng, n, form, "float32")
            cases.check_select(door, x, form, cases.some_order(rng), table)
            kept = cases.some_bits(rng, n, form, "float32", finite=True)
            cases.check_feedback(door, x, kept, form, cases.some_order(rng), table)
            payloads = cases.some_payloads(rng, 3, n, form, table)
            cases.check_scatter(door, payloads, n, form, segments=table)
            cases.check_reduce(door, payloads, n, form, cases.some_order(rng), segments=table)


def test_gaps_are_zero_in_memory_that_was_used(door: Door) -> None:
    form = TopKFormat(0.1, 64)
    table = np.array([[64, 3, 0, 0], [192, 70, 1, 0]], dtype=np.int64)
    x = np.arange(73, dtype=np.float32)
    expected, _ = reference.select(x, form, segments=table)
    out = np.full(expected.size, 0xA5, dtype=np.uint8)
    got = door.call(
        "topk_select", door.native(x), form, segments=door.native(table),
        out=door.native(out),
    )  # fmt: skip
    assert_same_bits(np.asarray(got), expected, "payload")
    assert_same_bits(out, expected, "out")


def test_a_shard_encodes_as_its_part_of_the_whole() -> None:
    """What collectives rely on: rows cut at blocks have the bytes they have in the whole."""
    form = TopKFormat(0.1, 64)
    table = wire.segments([100, 300, 65], ordinals=[5, 6, 9], block=64)
    x = np.round(np.random.default_rng(6).standard_normal(465)).astype(np.float32)  # ties
    whole, _ = reference.select(x, form, seed=4, step=9, segments=table)
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.ctypes.data, 4)
    for begin, end in ((0, 2), (1, 5), (3, 9)):
        part = wire.cut_rows(rows, begin, end, (4, 4), unit=form.block)
        part[:, wire.WORD] -= begin
        here = slice(begin * form.block_bytes, min(end * form.block_bytes, whole.size))
        got = np.full(here.stop - here.start, 0xA5, dtype=np.uint8)
        args = encode_args(form, got.ctypes.data, got.size, seed=4, step=9)
        launch(HostMemory("scalar").target(), "topk_select", part, 0, args, 0, unit=form.block)
        assert_same_bits(got, whole[here], f"blocks {begin} to {end}")


# --------------------------------------------------------------------------- malformed payloads


def decoded(door: Door, payload: Any, n: int, form: TopKFormat) -> tuple[Any, bool]:
    """What a door makes of a payload, and whether it took it for malformed."""
    out = np.full(n, 7, dtype=np.float32)
    flags = np.zeros(1, dtype=np.int32)
    try:
        door.call(
            "topk_scatter", door.native(payload[None]), form, n,
            out=door.native(out), flags=door.native(flags),
        )  # fmt: skip
    except ValueError as error:
        assert str(error).startswith("malformed top-k payload: row 0, block "), error
        return out, True
    return out, bool(flags[0] & wire.FLAG_MALFORMED)


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5])
def test_malformed_payloads(door: Door, density: float, values: str) -> None:
    """Every bit of every position turned, and random bytes: refused where the reference does so."""
    form, n = TopKFormat(density, 96, values), 96 + 41
    rng = np.random.default_rng(int(density * 100))
    payload, _ = reference.select(rng.standard_normal(n).astype(np.float32), form)
    begin = form.entries(96) * form.value_bytes
    changed = []
    for bit in range(8 * begin, 8 * payload.size, 1 if door.kind != "emulated" else 11):
        wrong = payload.copy()
        wrong[bit // 8] ^= 1 << bit % 8
        changed.append(wrong)
    for _ in range(20 if door.kind != "emulated" else 5):
        wrong = payload.copy()
        at = rng.integers(begin, payload.size)
        wrong[at : at + 8] = rng.integers(0, 256, wrong[at : at + 8].size)
        changed.append(wrong)
    changed += [np.zeros_like(payload), np.full_like(payload, 0xFF)]
    refused = 0
    for wrong in changed:
        reason = topk.malformed(wrong[None], form, n)
        got, malformed = decoded(door, wrong, n, form)
        assert malformed == (reason is not None), reason
        refused += malformed
        if not malformed:
            wanted = reference.scatter(wrong[None], form, n)
            assert_same_bits(got, wanted, "a payload that is as good as any")
    assert refused >= 10


def test_malformed_payloads_of_several_ranks(door: Door) -> None:
    form, n = TopKFormat(0.1, 64), 130
    good, _ = reference.select(np.arange(n, dtype=np.float32), form)
    bad = good.copy()
    bad[form.block_bytes + form.block_bytes - 1] ^= 0x80  # in the second block
    payloads = np.stack([good, bad, good])
    call = ("topk_reduce", door.native(payloads), form, n)
    if door.kind != "emulated":
        with pytest.raises(ValueError, match="malformed top-k payload: row 1, block 1: "):
            door.call(*call)
        with pytest.raises(ValueError, match="row 0, block 1"):
            door.topk_clear(np.ones(n, np.float32), bad, form, None)
        return
    flags = np.zeros(1, dtype=np.int32)
    got = door.call(*call, flags=flags)
    assert flags[0] == wire.FLAG_MALFORMED | wire.FLAG_NON_FINITE
    values = reference.scatter(got[None], form, n)
    assert np.isnan(values[64:70]).all() and np.isfinite(values[:64]).all()
    x, flags = door.topk_clear(np.ones(n, np.float32), bad, form, None)
    assert flags == wire.FLAG_MALFORMED and (x[64:128] == 1).all() and not x[:64].all()


# --------------------------------------------------------------------------- random cases


@pytest.mark.parametrize("group", DOOR_GROUPS)
@given(st.data(), st.sampled_from((64, 512, 1056)), st.floats(0, 1), st.integers(0, 1500),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_random_blocks(
    group: list[tuple[str, str]], data: Any, block: int, density: float, n: int, seed: int
) -> None:
    layouts = st.sampled_from(["dense", "offset", "strided"])
    door = Door(
        *data.draw(st.sampled_from(group)), data.draw(layouts), data.draw(st.integers(1, 2))
    )
    rng = np.random.default_rng(seed)
    values = ("float32", "float16", "bfloat16")[seed % 3]
    form = TopKFormat(max(density**4, 1e-6), block, values)
    storage = door.storages[seed % len(door.storages)]
    table = cases.some_segments(rng, n, form) if seed % 2 else None
    x = cases.some_bits(rng, n, form, storage)  # type: ignore[arg-type]
    cases.check_select(door, x, form, cases.some_order(rng), table)
    kept = cases.some_bits(rng, n, form, "float32", finite=True)
    cases.check_feedback(door, x, kept, form, cases.some_order(rng), table)
    payloads = cases.some_payloads(rng, 1 + seed % 4, n, form, table)
    cases.check_reduce(door, payloads, n, form, cases.some_order(rng), segments=table)
