"""Block formats are bit-identical to their reference: instruction sets, types, places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, Door
from hypothesis import given
from hypothesis import strategies as st

from pydist import _C
from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.kernels.block_formats import EncodeOptions
from pydist.reference import blocks as reference
from pydist.selfcheck import blocks as cases
from pydist.selfcheck import store

NEAREST4 = BlockFormat("levels", 4, 512, "max")
LENGTHS = (0, 1, 7, 31, 32, 33, 63, 64, 65, 1001)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use."""
    before = _C.current_isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1610)


def values_of(rng: np.random.Generator, n: int, form: BlockFormat, storage: str) -> Any:
    return cases.some_bits(rng, n, form, storage)  # type: ignore[arg-type]


def with_block(form: BlockFormat, block: int) -> BlockFormat:
    return BlockFormat(form.scheme, form.bits, block, form.norm, form.stochastic)


# --------------------------------------------------------------------------- lengths and types


@pytest.mark.parametrize("form", cases.FORMATS, ids=str)
def test_every_format_type_and_length(door: Door, form: BlockFormat) -> None:
    rng = np.random.default_rng(form.bits)
    for storage in door.storages:
        for n in LENGTHS:
            x = values_of(rng, n, form, storage)
            cases.check_quantize(door, x, form, cases.some_options(rng))
            kept_as = "bfloat16" if n % 2 and "bfloat16" in door.storages else "float32"
            kept = cases.some_bits(rng, n, form, kept_as, finite=True)
            cases.check_quantize_feedback(door, x, kept, form, cases.some_options(rng))
    for ranks in (1, 2, 5):
        payloads = cases.some_payloads(rng, ranks, 201, form)
        for mean in (False, True):
            cases.check_reduce(door, payloads, 201, form, cases.some_options(rng), mean=mean)
            for storage in door.storages:
                cases.check_sum(door, payloads, 201, form, mean=mean, storage=storage)


@pytest.mark.parametrize("block", [32, 96, 480, 512, 544, 1024, 4096, 65536])
def test_every_size_of_blocks(door: Door, rng: np.random.Generator, block: int) -> None:
    for form in cases.FORMATS[:: 7 if block > 1024 else 3]:
        sized = with_block(form, block)
        x = values_of(rng, 2 * block + 40, sized, "float32")
        cases.check_quantize(door, x, sized, cases.some_options(rng))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512])
def test_blocks_that_fill_a_tile(door: Door, rng: np.random.Generator, block: int) -> None:
    """CUDA takes 512 elements of a row at a time where there are as many, and then what is left."""
    for k, form in enumerate(cases.FORMATS):
        sized, n = with_block(form, block), 2 * 512 + block + 9
        table = wire.segments([n - 520, 520], block=block)
        storage, ranks = door.storages[k % len(door.storages)], 1 + k % 4
        x = values_of(rng, n, sized, storage)
        cases.check_quantize(door, x, sized, cases.some_options(rng))
        kept_as = "bfloat16" if storage == "bfloat16" else "float32"
        kept = cases.some_bits(rng, n, sized, kept_as, finite=True)
        cases.check_quantize_feedback(door, x, kept, sized, cases.some_options(rng), table)
        payloads = cases.some_payloads(rng, ranks, n, sized)
        cases.check_sum(door, payloads, n, sized, mean=True, storage=storage)
        cases.check_reduce(door, payloads, n, sized, cases.some_options(rng), mean=True)


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, rng: np.random.Generator, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("torch has no such tensors")
    door = door.using(layout=layout)
    for form in cases.FORMATS[::4]:
        for storage in door.storages:
            for n in (1, 33, 201):
                x = values_of(rng, n, form, storage)
                cases.check_quantize(door, x, form)
                kept = cases.some_bits(rng, n, form, "float32", finite=True)
                cases.check_quantize_feedback(door, x, kept, form)
        payloads = cases.some_payloads(rng, 3, 201, form)
        cases.check_reduce(door, payloads, 201, form)
        cases.check_sum(door, payloads, 201, form)


@pytest.mark.parametrize("group", DOOR_GROUPS)
def test_large_arrays_with_one_thread_and_several(group: list[tuple[str, str]]) -> None:
    rng, n = np.random.default_rng(2), 2**19 + 77
    for form in (
        NEAREST4,
        BlockFormat("levels", 3, 1056, "l2", True),
        BlockFormat("sign", 1, 512, "l1"),
    ):
        x, options = rng.standard_normal(n).astype(np.float32), cases.some_options(rng)
        payload, _ = reference.quantize(
            x, form, zero_bit=options.zero_bit, draws=cases._draws(options)
        )
        decoded = reference.dequantize(payload, form, n)
        for kind, isa in group:
            for threads in (1, 3):
                door = Door(kind, isa, "dense", threads)
                got, flags = door.quantize(x, form, options, None)
                assert_same_bits(got, payload, f"quantize {form} on {door.name}")
                assert flags == 0
                values = door.sum_quantized(
                    payload[None], n, form, mean=False, storage="float32", segments=None
                )
                assert_same_bits(values, decoded, f"dequantize {form} on {door.name}")


def test_flags_raised_by_any_thread(door: Door) -> None:
    for place in (0, 2**17 - 1, 2**17, 2**18 + 1):  # in every task of the thread pool
        x = np.ones(2**18 + 2, dtype=np.float32)
        x[place] = np.inf
        _, flags = door.using(threads=3).quantize(x, NEAREST4, EncodeOptions(), None)
        assert flags == wire.FLAG_NON_FINITE, f"infinity at {place}"


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("scheme", ["e4m3", "e5m2"])
def test_floats_at_every_exponent(door: Door, scheme: str) -> None:
    form, rng = BlockFormat(scheme, 8, 32, "max"), np.random.default_rng(8)
    for storage in door.storages:
        # Every block has its own exponent; elements reach from ties of the largest to subnormals.
        exponents = np.arange(-149, 128).repeat(32)
        magnitude = exponents - rng.integers(0, 24, exponents.size) * (
            np.arange(exponents.size) % 32 > 1
        )
        steps = rng.integers(16, 32, exponents.size) / 16  # halfway between codes, often
        with np.errstate(all="ignore"):
            x = (steps * np.exp2(magnitude.astype(np.float64))).astype(np.float32)
            x *= rng.choice(np.array([-1, 1], np.float32), x.size)
            x[~np.isfinite(x)] = 1
            bits = store(np.clip(x, -6e4, 6e4) if storage == "float16" else x, storage)  # type: ignore[arg-type]
        cases.check_quantize(door, bits, form)


def test_every_code_of_every_format(door: Door) -> None:
    for form in cases.FORMATS:
        codes = np.arange(256, dtype=np.uint8).repeat(2)[: 2 * 2**form.bits]
        n = codes.size
        packed = reference.pack_codes(codes, form.bits)
        for scale in (0.0, 1.0, 1 / 3, 3.0e38, 1e-40, np.nan):
            count = form.blocks(n)
            scales = np.full(count, scale, dtype="<f4").view(np.uint8)
            payload = np.concatenate([packed, scales])[None]
            cases.check_sum(door, payload, n, form)


def test_levels_where_rounding_decides(door: Door) -> None:
    """Values on and around the middle between two levels, for many norms."""
    rng = np.random.default_rng(4)
    for bits in range(2, 9):
        form = BlockFormat("levels", bits, 512, "max")
        top = form.levels
        for norm in rng.uniform(0.5, 2, 20).astype(np.float32):
            middle = (rng.integers(-2 * top, 2 * top + 1, 512) / (2 * top) * norm).astype("f4")
            middle[:3] = norm, np.nextafter(norm, np.float32(0)), -norm
            turned = np.nextafter(middle, np.float32(rng.choice([-9, 9])))
            x = np.where(rng.random(512) < 0.5, middle, turned).astype(np.float32)
            cases.check_quantize(door, x, form)


def test_flush_denormal_mode_changes_nothing(door: Door) -> None:
    x = np.array([1e-40, -1e-40, 1e-45, 2e-38, -2e-38, 1.2e-38], dtype=np.float32).repeat(20)
    assert torch.set_flush_denormal(True)
    try:
        for form in cases.FORMATS[::3]:
            got = door.quantize(x, form, EncodeOptions(), None)[0]
            torch.set_flush_denormal(False)
            assert_same_bits(got, reference.quantize(x, form)[0], f"{form} with subnormals flushed")
            torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("form", cases.FORMATS[::5], ids=str)
def test_residuals_of_what_is_not_finite_stay(door: Door, form: BlockFormat) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x, kept = np.ones(150, dtype=np.float32), np.full(150, 0.25, dtype=np.float32)
        x[70] = bad
        _, new, flags = door.quantize_feedback(x, kept, form, EncodeOptions(), None)
        assert flags == wire.FLAG_NON_FINITE
        assert_same_bits(new[64:128], kept[64:128], "residuals of the block")
        assert np.isfinite(new).all()


# --------------------------------------------------------------------------- segments


def test_segments(door: Door, rng: np.random.Generator) -> None:
    for form in cases.FORMATS[::3]:
        tables = [
            wire.segments([], block=64),
            wire.segments([0], block=64),
            wire.segments([0, 5, 0, 0, 64, 1, 0], block=64),
            wire.segments([63, 64, 65], ordinals=[2, 0, 1], firsts=[64, 0, 2**33], block=64),
            np.array([[192, 40, 0, 0], [640, 3, 1, 64]], dtype=np.int64),  # gaps
        ]
        for table in tables:
            n = int(table[:, 1].sum())
            x = values_of(rng, n, form, "float32")
            options = cases.some_options(rng)
            cases.check_quantize(door, x, form, options, table)
            kept = cases.some_bits(rng, n, form, "float32", finite=True)
            cases.check_quantize_feedback(door, x, kept, form, options, table)
            payloads = cases.some_payloads(rng, 3, n, form, table)
            cases.check_sum(door, payloads, n, form, segments=table)
            cases.check_reduce(door, payloads, n, form, options, segments=table)


def test_gaps_are_zero_in_memory_that_was_used(door: Door) -> None:
    form = BlockFormat("levels", 4, 64, "max")
    table = np.array([[64, 3, 0, 0], [192, 70, 1, 0]], dtype=np.int64)
    x = np.arange(73, dtype=np.float32)
    expected, _ = reference.quantize(x, form, segments=table)
    out = np.full(expected.size, 0xA5, dtype=np.uint8)
    native = door.native(out)
    got = door.call("quantize", door.native(x), form, segments=door.native(table), out=native)
    assert_same_bits(np.asarray(got), expected, "payload")
    assert_same_bits(out, expected, "out")


def test_a_shard_encodes_as_its_part_of_the_whole() -> None:
    """What collectives rely on: rows cut at blocks, codes and scales at places of their own."""
    from pydist.kernels.launch import launch
    from pydist.selfcheck.backends import HostMemory

    form, options = BlockFormat("levels", 3, 64, "l2", True), EncodeOptions(seed=4, rank=2, step=9)
    table = wire.segments([100, 300, 65], ordinals=[5, 6, 9], block=64)
    x = np.random.default_rng(6).standard_normal(465).astype(np.float32)
    whole, _ = reference.quantize(x, form, draws=cases._draws(options), segments=table)
    codes, scales = np.split(whole, [blocks.table_code_bytes(table, form)])
    rows = blocks.rows_of(table, form)
    wire.dense_addresses(rows, wire.X, x.ctypes.data, 4)
    for begin, end in ((0, 2), (1, 5), (3, 9)):
        part = blocks.cut_rows(rows, begin, end, form, (4, 4))
        part[:, wire.WORD] -= begin
        here = slice(begin * form.block_bytes, min(end * form.block_bytes, codes.size))
        got = np.full(here.stop - here.start, 0xA5, dtype=np.uint8)
        got_scales = np.zeros(4 * (min(end, 9) - begin), dtype=np.uint8)
        args = options.native(form, got.ctypes.data, got_scales.ctypes.data, got.size)
        target = HostMemory("scalar").target()
        launch(target, "quantize", part, 0, args, 0, unit=form.block)
        assert_same_bits(got, codes[here], f"codes of blocks {begin} to {end}")
        assert_same_bits(got_scales, scales[4 * begin : 4 * min(end, 9)], "scales")


# --------------------------------------------------------------------------- random cases


@pytest.mark.parametrize("group", DOOR_GROUPS)
@given(st.data(), st.sampled_from(cases.FORMATS), st.sampled_from(cases.BLOCKS),
       st.integers(0, 3000), st.integers(0, 2**32 - 1))  # fmt: skip
def test_random_blocks(
    group: list[tuple[str, str]], data: Any, form: BlockFormat, block: int, n: int, seed: int
) -> None:
    layouts = st.sampled_from(["dense", "offset", "strided"])
    door = Door(
        *data.draw(st.sampled_from(group)), data.draw(layouts), data.draw(st.integers(1, 2))
    )
    rng, sized = np.random.default_rng(seed), with_block(form, block)
    storage = door.storages[seed % len(door.storages)]
    table = cases.some_segments(rng, n, sized) if seed % 2 else None
    x = values_of(rng, n, sized, storage)
    cases.check_quantize(door, x, sized, cases.some_options(rng), table)
    kept = cases.some_bits(rng, n, sized, "float32", finite=True)
    cases.check_quantize_feedback(door, x, kept, sized, cases.some_options(rng), table)
    payloads = cases.some_payloads(rng, 1 + seed % 4, n, sized, table)
    cases.check_reduce(door, payloads, n, sized, cases.some_options(rng), segments=table)


def test_residuals_that_their_storage_cannot_hold_stay(door: Door) -> None:
    if "bfloat16" not in door.storages:
        pytest.skip("NumPy without ml_dtypes")
    form = BlockFormat("sign", 1, 4096, "l1")  # of one huge value in 4,096 nearly all is left
    kept = np.full(4095, 0x3E80, dtype=np.uint16)  # 0.25
    for place in (0, 4094):  # in a whole vector, and behind the last one
        x = np.zeros(4095, dtype=np.float32)
        x[place] = np.finfo(np.float32).max  # infinite in bfloat16
        cases.check_quantize_feedback(door, x, kept, form)
        _, new, flags = door.quantize_feedback(x, kept, form, EncodeOptions(), None)
        assert flags == 0
        assert new[place] == kept[place]
