"""The block formats' reference: torch's casts, statistics of rounding, layout, validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from pydist import QSGD, BlockFloat, BlockInt, Sign
from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.reference import blocks as rb

EVERY_CODEC = [
    *(Sign(scale, 64) for scale in ("l1", "l2")),
    *(QSGD(bits, 64, norm) for bits in range(2, 9) for norm in ("max", "l2")),
    *(BlockInt(bits, 64, how) for bits in range(2, 9) for how in ("nearest", "stochastic")),
    *(BlockFloat(form, 64) for form in ("e4m3", "e5m2")),
]
TORCH_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def format_of(codec: Any) -> BlockFormat:
    form: BlockFormat = codec.block_format
    return form


def normals(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def roundtrip(x: Any, codec: Any, **options: Any) -> Any:
    payload, _ = rb.quantize(x, format_of(codec), **options)
    return rb.dequantize(payload, format_of(codec), x.size)


# --------------------------------------------------------------------------- layout


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_one_little_endian_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 77, dtype=np.uint8)
    packed = rb.pack_codes(codes, bits)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert packed.tobytes() == stream.to_bytes(-(-77 * bits // 32) * 4, "little")
    assert np.array_equal(rb.unpack_codes(packed, 77, bits), codes)


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=str)
def test_payload_sizes(codec: Any) -> None:
    form = format_of(codec)
    for n in (0, 1, 31, 63, 64, 65, 200):
        payload, flags = rb.quantize(normals(n), form)
        expected = -(-n * form.bits // 32) * 4 + 4 * -(-n // 64)
        assert payload.size == form.payload_bytes(n) == expected
        assert flags == 0


@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.sampled_from(EVERY_CODEC))
def test_each_parameter_has_blocks_of_its_own(lengths: list[int], codec: Any) -> None:
    form, x = format_of(codec), normals(sum(lengths))
    table = wire.segments(lengths, block=form.block)
    payload, _ = rb.quantize(x, form, segments=table)
    assert payload.size == blocks.table_bytes(table, form)
    codes, scales = np.split(payload, [blocks.table_code_bytes(table, form)])
    begin = 0
    for offset, n, ordinal, _ in table.tolist():
        alone = wire.segments([n], ordinals=[ordinal], block=form.block)
        part, _ = rb.quantize(x[begin : begin + n], form, segments=alone)
        first = offset // form.block
        at = first * form.block_bytes
        assert_same_bits(codes[at : at + form.code_bytes(n)], part[: form.code_bytes(n)], "codes")
        own = scales[4 * first : 4 * (first + form.blocks(n))]
        assert_same_bits(own, part[form.code_bytes(n) :], "scales")
        begin += n
    decoded = rb.dequantize(payload, form, x.size, segments=table)
    again = rb.dequantize(payload, form, x.size, segments=table)
    assert_same_bits(decoded, again, "decoded")


def test_a_parameter_cut_at_blocks_encodes_as_a_whole() -> None:
    x, form = normals(200), format_of(QSGD(3, 64))
    whole, _ = rb.quantize(x, form, draws=rb.Draws(5, 1, 0, 9))
    table = wire.segments([200 - 128], firsts=[128], block=64)
    part, _ = rb.quantize(x[128:], form, draws=rb.Draws(5, 1, 0, 9), segments=table)
    at = 2 * form.block_bytes
    assert_same_bits(part[: form.code_bytes(72)], whole[at : form.code_bytes(200)], "codes")


@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 9), st.integers(0, 9))
def test_cut_rows_covers_the_blocks_once(lengths: list[int], a: int, b: int) -> None:
    form = format_of(BlockInt(4, 64))
    rows = blocks.rows_of(wire.segments(lengths, block=64), form)
    begin, end = min(a, b), max(a, b)
    part = blocks.cut_rows(rows, begin, end, form)
    covered = 0
    for row in part:
        parent = rows[rows[:, wire.ORDINAL] == row[wire.ORDINAL]][0]
        assert row[wire.FIRST] == 64 * (row[wire.WORD] - parent[wire.WORD])
        assert row[wire.WORDS_BEFORE] == covered
        covered += form.blocks(int(row[wire.N]))
    total = sum(form.blocks(n) for n in lengths)
    assert covered == max(0, min(end, total) - begin)


# --------------------------------------------------------------------------- 8-bit floats


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_values_are_torchs(name: str) -> None:
    raw = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = raw.view(TORCH_FLOAT8[name]).float().numpy()
    got = rb.float8_values(name)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got[[0, 128]]), [False, True])


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_codes_are_torchs_casts(name: str) -> None:
    finite = rb.float8_values(name)
    finite = np.sort(finite[np.isfinite(finite)])
    ties = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    around = np.concatenate([ties, np.nextafter(ties, 1e9), np.nextafter(ties, -1e9), finite])
    near = around.astype(np.float32)
    steps = [np.nextafter(near, np.float32(s)) for s in (np.inf, -np.inf)]
    exponents = np.exp2(np.arange(-149, 128.0)).astype(np.float32)
    x = np.concatenate([near, *steps, exponents, -exponents, normals(4096) * exponents[150]])
    largest = rb.FLOAT8[name][3]
    cast = torch.from_numpy(x).clamp(-largest, largest).to(TORCH_FLOAT8[name])
    assert_same_bits(rb.float8_codes(x, name), cast.view(torch.uint8).numpy(), f"{name} codes")


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_block_float_is_torchs_division_and_cast_at_every_exponent(name: str) -> None:
    form = format_of(BlockFloat(name, 32))
    emax, largest = rb.FLOAT8[name][2:]
    for exponent in range(-149, 128):
        x = np.clip(normals(32, exponent + 150), -1.9, 1.9).astype(np.float64)
        x[0] = 1.0 + 0.999 * np.random.default_rng(exponent + 150).random()
        x = (x / np.abs(x).max() * x[0] * 2.0**exponent).astype(np.float32)
        payload, _ = rb.quantize(x, form)
        scale = payload[32:].view("<f4")[0]
        top = float(np.abs(x).max())
        floor = np.floor(np.log2(top)) if top else -200
        assert scale == 2.0 ** max(floor - emax, -126)
        scaled = torch.from_numpy(x).div(float(scale)).clamp(-largest, largest)
        cast = scaled.to(TORCH_FLOAT8[name])
        assert_same_bits(payload[:32], cast.view(torch.uint8).numpy(), f"2**{exponent}")
        assert_same_bits(rb.dequantize(payload, form, 32), cast.float().numpy() * scale, "value")


# --------------------------------------------------------------------------- levels


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_magnitude_decodes_to_itself(bits: int) -> None:
    top = np.concatenate([np.exp2(np.arange(-119, 127.0)), np.abs(normals(200)), [3.4028235e38]])
    for codec in (BlockInt(bits, 32), BlockInt(bits, 32, "stochastic"), QSGD(bits, 32)):
        for i, value in enumerate(top.astype(np.float32)):
            x = np.array([value * np.float32(0.3), -value, 0], dtype=np.float32)
            draws = rb.Draws(seed=i)
            assert roundtrip(x, codec, draws=draws)[1] == -value
    full = rb.level_codes(
        np.array([1.0], np.float32), np.float32(1), format_of(codec), np.array([65535])
    )
    assert full[0] == 2 * format_of(codec).levels  # against the highest draw


@pytest.mark.parametrize("codec", [BlockInt(b, 64) for b in range(2, 9)] + EVERY_CODEC[-2:])
@pytest.mark.parametrize("exponent", [-149, -135, -126, -119, -60, 0, 100, 126])
def test_decoded_values_encode_to_themselves(codec: Any, exponent: int) -> None:
    with np.errstate(under="ignore"):
        x = np.clip(normals(1000, 3), -3, 3) * np.float32(2.0**exponent) / np.float32(2)
    once = roundtrip(x, codec)
    assert_same_bits(roundtrip(once, codec), once, f"{codec} at 2**{exponent}")


def test_the_code_that_no_encoder_writes_is_the_highest_level() -> None:
    for bits in range(2, 9):
        values = rb.level_values(format_of(BlockInt(bits)))
        assert values[-1] == values[-2] == 1.0
        assert values[0] == -1.0


def test_tiny_and_huge_blocks() -> None:
    tiny = np.array([2.0**-121, -(2.0**-122)], dtype=np.float32)
    for codec in (BlockInt(4), QSGD(4), QSGD(4, norm="l2")):
        assert roundtrip(tiny, codec).tolist() == [0.0, 0.0]
    huge = np.full(512, 3.4e38, dtype=np.float32)
    for codec in (QSGD(8, norm="l2"), Sign("l1"), Sign("l2")):
        assert np.isfinite(roundtrip(huge, codec)).all()
    for scale in ("l1", "l2"):
        small = np.full(512, 1e-40, dtype=np.float32)
        assert np.allclose(roundtrip(small, Sign(scale)), 1e-40, rtol=1e-4, atol=0)
        assert (roundtrip(np.zeros(5, dtype=np.float32), Sign(scale)) == 0).all()


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_makes_its_block_nan(codec: Any, bad: float) -> None:
    x = normals(150)
    x[70] = bad
    payload, flags = rb.quantize(x, format_of(codec))
    decoded = rb.dequantize(payload, format_of(codec), 150)
    assert flags == wire.FLAG_NON_FINITE
    assert np.isnan(decoded[64:128]).all()
    assert np.isfinite(decoded[:64]).all()
    assert np.isfinite(decoded[128:]).all()
    assert not payload[format_of(codec).block_bytes : 2 * format_of(codec).block_bytes].any()


# --------------------------------------------------------------------------- scales


def test_scales_of_signs() -> None:
    x = normals(512, 7)
    l1, l2 = (roundtrip(x, Sign(scale)) for scale in ("l1", "l2"))
    assert np.allclose(np.abs(l1), np.abs(x).mean(), rtol=1e-6)
    assert np.allclose(np.abs(l2), np.sqrt((x.astype(float) ** 2).mean()), rtol=1e-6)
    assert np.array_equal(np.sign(l1), np.sign(x))
    # Of normals the mean magnitude loses 1 - 2/pi of the energy, the root mean square more.
    lost = [float(((x - y) ** 2).sum() / (x**2).sum()) for y in (l1, l2)]
    assert abs(lost[0] - (1 - 2 / np.pi)) < 0.05 and lost[0] < lost[1]


def test_zeros_of_signs_take_the_zero_bit() -> None:
    x = np.array([0, -0.0, 2, -2], dtype=np.float32)
    form = format_of(Sign("l1", 32))
    for bit, code in ((0, 0b0100), (1, 0b0111)):
        assert rb.quantize(x, form, zero_bit=bit)[0][0] == code


def test_block_sum_is_a_warps() -> None:
    x = np.array([1e8, *[1.0] * 31, 1.0, -1e8], dtype=np.float32)
    lanes = np.array([np.float32(1e8) + np.float32(1), 1 - 1e8, *[1] * 30], dtype=np.float32)
    for half in (16, 8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half:]
    assert rb.block_sum(x) == lanes[0]


# --------------------------------------------------------------------------- feedback, reduction


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=str)
def test_what_was_sent_and_what_is_kept_are_the_whole(codec: Any) -> None:
    x, old = normals(150), normals(150, 1)
    payload, new, _ = rb.quantize_feedback(x, old, format_of(codec))
    p = x + old
    assert_same_bits(new, p - rb.dequantize(payload, format_of(codec), 150), "residual")
    old[70] = np.inf
    payload, new, flags = rb.quantize_feedback(x, old, format_of(codec))
    assert flags == wire.FLAG_NON_FINITE
    assert_same_bits(new[64:128], old[64:128], "residuals of a block that was not sent")


def test_a_residual_that_overflows_its_storage_stays() -> None:
    # 3.39e38 fits float32; the nearest bfloat16 is infinite.
    x = np.array([3.396e38, 0.0], dtype=np.float32)
    form = BlockFormat("levels", 2, 32, "l2")
    x[1] = 1.0
    _, new, flags = rb.quantize_feedback(x, np.zeros(2, np.float32), form, storage="bfloat16")
    assert flags == 0
    assert np.isfinite(new).all()


@pytest.mark.parametrize("codec", [BlockInt(8, 64), BlockFloat("e4m3", 64), Sign("l1", 64)])
def test_reduction_is_in_rank_order_and_divides_once(codec: Any) -> None:
    form = format_of(codec)
    payloads = np.stack([rb.quantize(normals(100, r), form)[0] for r in range(3)])
    total = np.float32(0)
    for payload in payloads:
        total = total + rb.dequantize(payload, form, 100)
    mean = total / np.float32(3)
    assert_same_bits(rb.sum_quantized(payloads, form, 100), total, "sum")
    assert_same_bits(rb.sum_quantized(payloads, form, 100, mean=True), mean, "mean")
    again, _ = rb.reduce_quantized(payloads, form, 100, mean=True)
    expected, _ = rb.quantize(mean, form, draws=rb.Draws(phase=1))
    assert_same_bits(again, expected, "payload")


# --------------------------------------------------------------------------- validation

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "bits low": (lambda: QSGD(1), ValueError, r"bits must be in \[2, 8\], got 1"),
    "bits high": (lambda: BlockInt(9), ValueError, r"bits must be in \[2, 8\], got 9"),
    "bits float": (lambda: QSGD(4.0), TypeError, "bits must be an int, got 4.0"),
    "block odd": (lambda: QSGD(4, 100), ValueError, "block must be a multiple of 32.*got 100"),
    "block small": (lambda: BlockInt(4, 0), ValueError, "block must be.*got 0"),
    "block huge": (lambda: BlockFloat("e4m3", 65568), ValueError, "block must be.*got 65568"),
    "sign block": (lambda: Sign(None, 33), ValueError, "block must be.*got 33"),
    "norm": (lambda: QSGD(4, norm="l1"), ValueError, "norm must be one of max, l2, got 'l1'"),
    "rounding": (lambda: BlockInt(4, rounding="up"), ValueError, "rounding must be.*got 'up'"),
    "format": (lambda: BlockFloat("e3m4"), ValueError, "format must be one of.*got 'e3m4'"),
    "scale": (lambda: Sign("max"), ValueError, "scale must be one of l1, l2, got 'max'"),
    "scheme": (lambda: BlockFormat("x", 1, 32, "l1"), ValueError, "scheme must be.*got 'x'"),
    "sign bits": (lambda: BlockFormat("sign", 2, 32, "l1"), ValueError, "bits must be 1, got 2"),
    "float bits": (lambda: BlockFormat("e4m3", 4, 32, "max"), ValueError, "bits must be 8, got 4"),
    "sign at random": (
        lambda: BlockFormat("sign", 1, 32, "l1", stochastic=True), ValueError, "stochastic.*'sign'",
    ),
    "segments": (lambda: wire.segments([1], block=0), ValueError, "block must be.*got 0"),
    "offset": (
        lambda: blocks.check_segments(wire.segments([5, 5]), format_of(QSGD(4, 64))),
        ValueError, "offset 32 of row 1 is not a multiple of 64",
    ),
    "first": (
        lambda: blocks.check_segments(wire.segments([5], firsts=[32]), format_of(QSGD(4, 64))),
        ValueError, "first element 32 of row 0 is not a multiple of 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    call, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        call()
