"""Ternary kernels are bit-identical to their reference: instruction sets, types, places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, Door
from hypothesis import given
from hypothesis import strategies as st
from wrong import Arrays

import pydist
from pydist import Ternary, arrays, ops
from pydist.formats import ternary, wire
from pydist.kernels.block_formats import EncodeOptions
from pydist.reference import ternary as reference
from pydist.selfcheck import store, widen
from pydist.selfcheck import ternary as cases

LENGTHS = (0, 1, 7, 31, 33, 159, 160, 161, 1001, 1281, 4097)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1705)


def check_all(door: Door, rng: np.random.Generator, n: int, storage: Any, table: Any) -> None:
    """Every kernel on values of one length, type and table."""
    x = cases.some_bits(rng, n, storage)
    clip = cases.CLIPS[n % len(cases.CLIPS)]
    cases.check_scale(door, x, clip, table)
    clean = cases.some_bits(rng, n, storage, finite=True)
    own, _ = reference.scale(widen(clean), clip, segments=table)
    options = cases.some_options(rng)
    cases.check_pack(door, clean, own, own * np.float32(1.25), options, table)
    odd = cases.some_scalers(rng, len(own))
    cases.check_pack(door, x, cases.some_scalers(rng, len(own)), odd, options, table)
    payloads = cases.some_payloads(rng, 1 + n % 4, n, table)
    cases.check_sum(door, payloads, n, table)
    mean = bool(rng.integers(2))
    cases.check_unpack(door, payloads, odd, n, mean=mean, storage=storage, segments=table)


# --------------------------------------------------------------------------- lengths and types


def test_every_type_and_length(door: Door, rng: np.random.Generator) -> None:
    for storage in door.storages:
        for n in LENGTHS:
            check_all(door, rng, n, storage, None)
            check_all(door, rng, n, storage, cases.some_segments(rng, n))


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, rng: np.random.Generator, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("torch has no such tensors")
    door = door.using(layout=layout)
    for storage in door.storages:
        for n in (1, 33, 201):
            check_all(door, rng, n, storage, cases.some_segments(rng, n))


@pytest.mark.parametrize("group", DOOR_GROUPS)
def test_large_arrays_with_one_thread_and_several(group: list[tuple[str, str]]) -> None:
    # More than 32 segments of 4,096, which is what emulated kernels add up at a time.
    rng, n = np.random.default_rng(2), (36 if group[0][0] == "emulated" else 128) * 4096 + 77
    x = rng.standard_normal(n).astype(np.float32)
    own, _ = reference.scale(x, 2.5)
    payload, _ = reference.pack(x, own)
    sums = reference.sum_payloads(payload[None], n)
    values, _ = reference.unpack(payload[None], own, n)
    for kind, isa in group:
        for threads in (1, 3):
            door = Door(kind, isa, "dense", threads)
            assert_same_bits(door.ternary_scale(x, 2.5, None)[0], own, f"scale on {door.name}")
            got, flags = door.ternary_pack(x, own, own, EncodeOptions(), None)
            assert_same_bits(got, payload, f"pack on {door.name}")
            assert flags == 0
            got, _ = door.ternary_sum(payload[None], n, None)
            assert_same_bits(got, sums, f"sum on {door.name}")
            how = {"mean": False, "storage": "float32", "segments": None}
            got, _ = door.ternary_unpack(payload[None], own, n, **how)
            assert_same_bits(got, values, f"unpack on {door.name}")
            got, _ = door.ternary_unpack_sums(sums, own, n, ranks=1, **how)
            assert_same_bits(got, values, f"unpack_sums on {door.name}")


def test_flags_raised_by_any_thread(door: Door) -> None:
    door, one = door.using(threads=3), np.ones(1, np.float32)
    for place in (0, 2**17 - 1, 2**17, 2**18 + 1):  # in every task of the thread pool
        x = np.ones(2**18 + 2, dtype=np.float32)
        x[place] = np.inf if place % 2 else np.nan
        scaler, flags = door.ternary_scale(x, 2.5, None)
        assert flags == wire.FLAG_NON_FINITE and np.isnan(scaler[0]), f"at {place}"
        _, flags = door.ternary_pack(x, one, one, EncodeOptions(), None)
        assert flags == wire.FLAG_NON_FINITE, f"at {place}"


@pytest.mark.parametrize("group", DOOR_GROUPS)
@given(st.data(), st.integers(0, 6000), st.integers(0, 2**32 - 1))
def test_random_cases(group: list[tuple[str, str]], data: Any, n: int, seed: int) -> None:
    layouts = st.sampled_from(["dense", "offset", "strided"])
    door = Door(
        *data.draw(st.sampled_from(group)), data.draw(layouts), data.draw(st.integers(1, 2))
    )
    rng = np.random.default_rng(seed)
    storage = door.storages[seed % len(door.storages)]
    check_all(door, rng, n, storage, cases.some_segments(rng, n) if seed % 2 else None)


# --------------------------------------------------------------------------- values


def test_close_calls(door: Door) -> None:
    """Magnitudes at which a draw just decides, and those beside them."""
    n = 4096
    draws = reference.draws16(3, 5 << 2, 9, 0, 0, n).astype(np.float64)
    options = EncodeOptions(seed=3, rank=5, step=9)
    for shared in (1.0, 0.3, 3e-33, 2.9e38):
        one = np.array([shared], dtype=np.float32)
        x = (draws / 65536 * float(one[0])).astype(np.float32)
        x[::3] = np.nextafter(x[::3], np.float32(np.inf))
        x[1::3] = -np.nextafter(x[1::3], np.float32(0))
        cases.check_pack(door, x, one, one, options)
        payload, _ = reference.pack(x, one, draws=reference.Draws(3, 5, 0, 9))
        hit = reference.unpack_trits(payload)[:n] != 0
        assert 0.1 < hit.mean() < 0.9, "the cases decide nothing"


def test_the_largest_is_always_sent(door: Door) -> None:
    """Its probability is 1, whatever the scaler and the draw."""
    for value in (1.0, 0.1, 1e-30, 3.4028235e38):
        x = np.full(2**16, value, dtype=np.float32)
        scaler, _ = door.ternary_scale(x, None, None)
        assert scaler[0] == x[0]
        payload, _ = door.ternary_pack(x, scaler, scaler, EncodeOptions(seed=1), None)
        assert (reference.unpack_trits(payload)[: x.size] == 1).all()


@pytest.mark.parametrize("value", [1e-44, 1e-38, 1.0, 1e19, 3e38])
def test_no_square_overflows_or_vanishes(door: Door, value: float) -> None:
    """Half of the values are ± a, the others zero: the deviation is a / sqrt(2)."""
    x = np.zeros(20_000, dtype=np.float32)
    x[::4], x[1::4] = value, -value
    scaler, flags = door.ternary_scale(x, 1.0, None)
    wanted = float(np.float32(value)) / np.sqrt(2) if value > 2.0**-110 else 0
    assert flags == 0
    assert scaler[0] == pytest.approx(wanted, rel=1e-6)


def test_segments_of_a_layer_far_apart(door: Door) -> None:
    """Segments of 4,096 whose squares differ by more than float32 holds."""
    x = np.concatenate([np.full(4096, v, np.float32) for v in (1e-40, 3e38, 1e-20, 0, 1e19)])
    scaler, _ = door.ternary_scale(x, 1.0, None)
    assert scaler[0] == pytest.approx(3e38 / np.sqrt(5), rel=1e-5)
    cases.check_scale(door, x, 1.0)


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_layers_of_equal_values_do_not_vanish(door: Door, n: int) -> None:
    """The deviation is about zero: about the mean it would be 0, and nothing would be sent."""
    x = np.full(n, 0.3, dtype=np.float32)
    scaler, _ = door.ternary_scale(x, 2.5, None)
    assert scaler[0] == np.float32(0.3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 15, 16, 127, 128, 254, 255, 4096, 65535])
def test_every_sum_there_is(door: Door, ranks: int) -> None:
    """From -ranks to ranks: exact, in ceil(log2(2 ranks + 1)) bits."""
    bits = ternary.sum_bits(ranks)
    assert 2 ** (bits - 1) < 2 * ranks + 1 <= 2**bits
    sums = np.unique(np.linspace(-ranks, ranks, 641).round()).astype(np.int32)
    packed = reference.pack_sums(np.pad(sums, (0, -sums.size % ternary.UNIT)), ranks)
    one = np.ones(1, np.float32)
    how = {"ranks": ranks, "mean": False, "storage": "float32", "segments": None}
    values, flags = door.ternary_unpack_sums(packed, one, sums.size, **how)
    assert flags == 0 and np.array_equal(values, sums.astype(np.float32))


def test_many_ranks(door: Door) -> None:
    """All ranks agree, on every side: no accumulator is too narrow."""
    trits = np.array([1, -1, 0, 1] * 40, dtype=np.int32)
    for ranks in (15, 16, 31, 700 if door.kind == "emulated" else 65_534):
        payloads = np.tile(reference.pack_trits(trits), (ranks, 1))
        sums, _ = door.ternary_sum(payloads, trits.size, None)
        assert np.array_equal(reference.unpack_sums(sums, ranks), trits * ranks)
        cases.check_unpack(door, payloads, np.ones(1, np.float32), trits.size)


def test_a_sum_that_float32_cannot_hold_raises_the_flag(door: Door) -> None:
    largest = np.array([3e38], dtype=np.float32)
    payloads = np.tile(reference.pack_trits(np.ones(160, np.int32)), (2, 1))
    for mean in (False, True):
        cases.check_unpack(door, payloads, largest, 160, mean=mean)
    assert reference.unpack(payloads, largest, 160)[1] == wire.FLAG_NON_FINITE
    assert reference.unpack(payloads, largest, 160, mean=True)[1] == 0


# --------------------------------------------------------------------------- places


def test_positions_belong_to_parameters() -> None:
    """A parameter's trits do not depend on the buffer it lies in."""
    rng, one = np.random.default_rng(3), np.ones(3, np.float32)
    parts = [rng.uniform(-1, 1, n).astype(np.float32) for n in (200, 33, 700)]
    where = {"seed": 1, "rank": 2, "step": 3}
    table = wire.segments([200, 33, 700], ordinals=[4, 9, 2], firsts=[0, 40, 8], block=160)
    whole = arrays.ternary_pack(np.concatenate(parts), one, segments=table, **where)
    units = [0, 2, 3]
    for part, row, unit in zip(parts, table, units, strict=True):
        alone = np.array([[0, part.size, row[2], row[3]]])
        payload = arrays.ternary_pack(part, one[:1], segments=alone, **where)
        there = whole[32 * unit :][: payload.size]
        assert_same_bits(there, payload, f"ordinal {row[2]}")
    later = arrays.ternary_pack(
        parts[2][160:], one[:1], segments=np.array([[0, 540, 2, 168]]), **where
    )
    assert_same_bits(later, whole[4 * 32 :], "the same parameter from a later element on")


def test_gaps_become_zeros(door: Door) -> None:
    table = np.array([[160, 3, 0, 0], [640, 170, 1, 0]], dtype=np.int64)
    x, one = np.ones(173, dtype=np.float32), np.ones(2, np.float32)
    expected, _ = reference.pack(x, one, segments=table)
    out = np.full(expected.size, 0xA5, dtype=np.uint8)
    arguments = [door.native(y) for y in (x, one)]
    door.call("ternary_pack", *arguments, segments=door.native(table), out=door.native(out))
    assert_same_bits(out, expected, "payload")
    assert not out[:32].any() and not out[64:128].any()
    sums = reference.sum_payloads(expected[None], 173, segments=table)
    out = np.full(sums.size, 0xA5, dtype=np.uint8)
    payloads = door.native(expected[None].copy())
    door.call("ternary_sum", payloads, 173, segments=door.native(table), out=door.native(out))
    assert_same_bits(out, sums, "sums")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_step_in_memory_is_a_step(kind: str) -> None:
    a = Arrays(kind)
    x, one = a.door.native(np.full(500, 0.4, np.float32)), a.f(1)

    def packed(step: Any) -> list[int]:
        return a.ternary_pack(x, one, seed=1, step=step).tolist()

    for step in (0, 5, 2**40 + 1):
        assert packed(a.door.native(np.array([step]))) == packed(step)
    assert packed(5) != packed(6)


# --------------------------------------------------------------------------- malformed bytes


def malformed(door: Door, call: Any, what: str) -> None:
    """On the CPU it raises; a CUDA kernel raises the flag and goes on."""
    if door.kind == "emulated":
        _, flags = call()
        assert flags & wire.FLAG_MALFORMED
    else:
        with pytest.raises(ValueError, match=f"{what}.*malformed"):
            call()


@pytest.mark.parametrize("byte", [243, 255])
@pytest.mark.parametrize("place", [0, 31, 32, 299, 303])
def test_malformed_bytes(door: Door, byte: int, place: int) -> None:
    n, one = 9 * 160 + 61, np.ones(1, np.float32)
    payloads = np.zeros((3, ternary.payload_bytes(n)), dtype=np.uint8)
    payloads[1, place] = 242  # a byte of five minuses is no mistake
    assert door.ternary_sum(payloads, n, None)[1] == 0
    payloads[2, place] = byte
    how = {"mean": False, "storage": "float32", "segments": None}
    malformed(door, lambda: door.ternary_sum(payloads, n, None), "payloads have a byte above 242")
    malformed(door, lambda: door.ternary_unpack(payloads, one, n, **how), "payloads have a byte")
    with pytest.raises(ValueError, match=f"is {byte}: malformed"):
        reference.sum_payloads(payloads, n)


@pytest.mark.parametrize("ranks", [2, 4, 8, 17, 65_534])
def test_malformed_sums(door: Door, ranks: int) -> None:
    one, how = np.ones(1, np.float32), {"mean": True, "storage": "float32", "segments": None}
    for wrong in (-ranks - 1, -(2 ** (ternary.sum_bits(ranks) - 1)), ranks + 1):
        sums = np.zeros(320, dtype=np.int32)
        sums[[3, 200]] = ranks, -ranks
        packed = reference.pack_sums(sums, ranks)
        assert door.ternary_unpack_sums(packed, one, 320, ranks=ranks, **how)[1] == 0
        sums[170] = wrong
        packed = reference.pack_sums(sums, ranks)
        malformed(
            door,
            lambda packed=packed: door.ternary_unpack_sums(packed, one, 320, ranks=ranks, **how),
            "sums have one that is beyond ± ranks",
        )
        with pytest.raises(ValueError, match="malformed"):
            reference.unpack_sums(packed, ranks)


@given(st.binary(min_size=64, max_size=64), st.integers(1, 9))
def test_any_bytes_decode_or_raise(data: bytes, ranks: int) -> None:
    payloads = np.tile(np.frombuffer(data, dtype=np.uint8), (ranks, 1))
    valid = bool((payloads <= ternary.LARGEST_BYTE).all())
    try:
        sums = arrays.ternary_sum(payloads, 320)
    except ValueError:
        assert not valid
        return
    assert valid
    trits = reference.unpack_trits(payloads[0])
    assert np.array_equal(reference.unpack_sums(sums, ranks), trits * ranks)


# --------------------------------------------------------------------------- wrong arguments

ONE = {"scalers": lambda a: a.f(1)}
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "clip zero": (lambda a: Ternary(0), ValueError, "clip must be from .*got 0"),
    "clip nan": (lambda a: Ternary(float("nan")), ValueError, "clip must be from .*got nan"),
    "clip negative": (lambda a: Ternary(-2.5), ValueError, "clip must be from .*got -2.5"),
    "clip huge": (lambda a: Ternary(1e39), ValueError, "clip must be from"),
    "clip text": (lambda a: Ternary("2.5"), TypeError, "clip must be a number or None, got '2.5'"),
    "clip bool": (lambda a: Ternary(True), TypeError, "clip must be a number or None, got True"),
    "codec": (
        lambda a: a.ternary_scale(a.f(4), pydist.QSGD(4)), TypeError, "codec must be a Ternary",
    ),
    "x": (
        lambda a: a.ternary_scale(a.f(4, dtype="float64"), Ternary()), TypeError,
        "x must be float32 or .*got float64",
    ),
    "scale out": (
        lambda a: a.ternary_scale(a.f(4), Ternary(), out=a.f(2)), ValueError, "out must have shape",
    ),
    "scalers": (
        lambda a: a.ternary_pack(a.f(4), a.f(2)), ValueError, "scalers must have 1 elem.*got 2",
    ),
    "scalers dtype": (
        lambda a: a.ternary_pack(a.f(4), a.u(1)), TypeError, "scalers must be float32, got uint8",
    ),
    "shared": (
        lambda a: a.ternary_pack(a.f(4), a.f(1), shared=a.f(3)), ValueError,
        "shared must have 1 elements.*got 3",
    ),
    "rank": (
        lambda a: a.ternary_pack(a.f(4), a.f(1), rank=65535), ValueError, "rank must be in .*65535",
    ),
    "seed": (lambda a: a.ternary_pack(a.f(4), a.f(1), seed=-1), ValueError, "seed must be in"),
    "step": (lambda a: a.ternary_pack(a.f(4), a.f(1), step=-1), ValueError, "step must be in"),
    "offset": (
        lambda a: a.ternary_pack(a.f(4), a.f(1), segments=a.table((32, 4, 0, 0))), ValueError,
        "offset 32 of row 0 is not a multiple of 160",
    ),
    "cover": (
        lambda a: a.ternary_pack(a.f(4), a.f(1), segments=a.table((0, 5, 0, 0))), ValueError,
        "segments cover 5 elements, x has 4",
    ),
    "payload": (
        lambda a: a.ternary_sum(a.u(2, 12), 161), ValueError,
        "payloads must have 36 bytes for n=161, got 12",
    ),
    "one payload": (
        lambda a: a.ternary_sum(a.u(12), 10), ValueError, r"payloads must be \[ranks, bytes\]",
    ),
    "no ranks": (
        lambda a: a.ternary_sum(a.u(0, 12), 10), ValueError, "payloads must hold 1 … 65535 ranks",
    ),
    "negative n": (lambda a: a.ternary_sum(a.u(1, 12), -1), ValueError, "n must be at least 0"),
    "unpack dtype": (
        lambda a: a.ternary_unpack(a.u(12), a.f(1), 10, dtype=a.door._dtype("float64")
                                   if a.kind == "numpy" else torch.float64),
        TypeError, "dtype must be float32",
    ),
    "unpack out": (
        lambda a: a.ternary_unpack(a.u(12), a.f(1), 10, out=a.f(9)), ValueError, "out must have 10",
    ),
    "unpack scalers": (
        lambda a: a.ternary_unpack(a.u(12), a.f(0), 10), ValueError, "scalers must have 1 elem",
    ),
    "sums": (
        lambda a: a.ternary_unpack_sums(a.u(40), a.f(1), 10, ranks=2), ValueError,
        "sums must have 60 bytes .*2 ranks.*got 40",
    ),
    "sums of none": (
        lambda a: a.ternary_unpack_sums(a.u(40), a.f(1), 10, ranks=0), ValueError,
        "ranks must be in .*got 0",
    ),
    "flags": (
        lambda a: a.ternary_sum(a.u(1, 12), 10, flags=a.u(2, dtype="int32")), ValueError, "flags",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(a: Arrays, case: str) -> None:
    call, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        call(a)


def test_results_in_memory_of_their_own(a: Arrays) -> None:
    memory = a.u(640)
    numbers = memory.view(torch.float32 if a.kind == "torch" else np.float32)
    calls = [
        lambda: a.ternary_scale(numbers, Ternary(), out=numbers[:1]),
        lambda: a.ternary_pack(numbers, a.f(1), out=memory[:32]),
        lambda: a.ternary_pack(a.f(160), numbers[:1], out=memory[:32]),
        lambda: a.ternary_sum(memory[:32].reshape(1, 32), 160, out=memory[:40]),
        lambda: a.ternary_unpack(memory[:32], a.f(1), 160, out=numbers),
        lambda: a.ternary_unpack(a.u(32), numbers[:1], 160, out=numbers),
        lambda: a.ternary_unpack_sums(memory[:40], a.f(1), 160, ranks=1, out=numbers),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="overlap in memory"):
            call()


def test_values_take_the_type_and_shape_of_out(a: Arrays) -> None:
    out = a.f(4, 40, dtype="float16")
    payload = reference.pack_trits(np.tile(np.array([1, -1, 0, 0], np.int32), 40))
    assert a.ternary_unpack(a.door.native(payload), a.f(1), 160, out=out) is out
    assert np.array_equal(np.asarray(out).ravel(), np.tile([1, -1, 0, 0], 40))


# --------------------------------------------------------------------------- torch


def _tensors() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    x, one = torch.randn(500), torch.ones(1)
    table, two = torch.from_numpy(wire.segments([100, 400], block=160)), torch.ones(2)
    payloads = torch.randint(0, 243, (3, 116), dtype=torch.uint8)
    sums = ops.ternary_sum(payloads, 500)
    flags = torch.zeros(1, dtype=torch.int32)
    return {
        "scale": ("ternary_scale", (x,), {"clip": 2.5, "flags": flags}),
        "scale segments": ("ternary_scale", (x,), {"clip": None, "segments": table}),
        "scale out": ("ternary_scale_out", (x,), {"clip": 2.5, "out": one}),
        "pack": ("ternary_pack", (x, one), {"seed": 1, "rank": 2, "step": 3}),
        "pack shared": ("ternary_pack", (x.half(), one), {"shared": one, "flags": flags}),
        "pack segments": ("ternary_pack", (x, two), {"segments": table}),
        "pack empty": ("ternary_pack", (x[:0], one), {}),
        "pack out": ("ternary_pack_out", (x, one), {"out": payloads[0]}),
        "sum": ("ternary_sum", (payloads, 500), {"flags": flags}),
        "sum out": ("ternary_sum_out", (payloads, 500), {"out": sums}),
        "unpack": ("ternary_unpack", (payloads, one, 500), {"mean": True}),
        "unpack out": ("ternary_unpack_out", (payloads, one, 500), {"out": x}),
        "unpack sums": ("ternary_unpack_sums", (sums, one, 500), {"ranks": 3}),
        "unpack sums out": ("ternary_unpack_sums_out", (sums, one, 500), {"ranks": 3, "out": x}),
    }


@pytest.mark.parametrize("case", list(_tensors()))
def test_opcheck(case: str) -> None:
    name, args, kwargs = _tensors()[case]
    torch.library.opcheck(getattr(torch.ops.pydist, name).default, args, kwargs)


def test_under_torch_compile() -> None:
    """Traced without a graph break; the sizes that fake kernels give are those of the kernels."""

    def round_trip(x: torch.Tensor) -> torch.Tensor:
        scalers = ops.ternary_scale(x, Ternary())
        payload = ops.ternary_pack(x, scalers, seed=1)
        return ops.ternary_unpack(payload, scalers, x.numel()) + payload.numel()

    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (161, 500, 1001):
        x = torch.randn(n)
        assert torch.equal(compiled(x), round_trip(x))


def test_reference_rounds_to_storage() -> None:
    """Half precision decodes as float32 does, rounded once."""
    payload = reference.pack_trits(np.ones(160, np.int32))
    third = np.array([1 / 3], dtype=np.float32)
    for storage in ("float16", "bfloat16"):
        door = Door("torch", "scalar")
        got, _ = door.ternary_unpack(
            payload[None], third, 160, mean=False, storage=storage, segments=None
        )
        assert_same_bits(got, store(np.full(160, third[0]), storage), storage)  # type: ignore[arg-type]
