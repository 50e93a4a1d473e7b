"""Elias coding is bit-identical to its reference: instruction sets, threads, emulated CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, HOST_DOORS, Door
from guarded import guarded
from hypothesis import given
from hypothesis import strategies as st

import pydist
from pydist import QSGD, BlockFloat, BlockInt, arrays, ops, selfcheck
from pydist.formats import blocks, elias, wire
from pydist.formats.blocks import BlockFormat
from pydist.reference import elias as reference
from pydist.selfcheck import elias as cases
from pydist.selfcheck.backends import KernelRunner
from pydist.selfcheck.segments import some_block_segments

LENGTHS = (0, 1, 7, 31, 32, 33, 63, 64, 65, 1001)
ELIAS4 = QSGD(4, 64, "l2", entropy="elias")


def form_of(bits: int, block: int = 64) -> BlockFormat:
    return BlockFormat("levels", bits, block, "max")


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits_and_length(door: Door, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for n in LENGTHS:
        form = form_of(bits, int(rng.choice([32, 64, 160])))
        cases.check_elias(door, cases.some_fixed(rng, n, form), n, form)


@pytest.mark.parametrize("block", [32, 96, 480, 512, 544, 1024, 4096, 65536])
def test_every_size_of_blocks(door: Door, block: int) -> None:
    rng = np.random.default_rng(block)
    for bits in (2, 5) if block > 1024 else (2, 3, 4, 8):
        n = (block if block > 4096 else 2 * block) + 40
        form = form_of(bits, block)
        cases.check_elias(door, cases.some_fixed(rng, n, form), n, form)


def test_gaps_up_to_a_whole_block(door: Door) -> None:
    """A lone level far from the beginning: words of every length."""
    form = form_of(3, 65536)
    places = (0, 1, 126, 127, 128, 254, 255, 4095, 32766, 32767, 65534, 65535)
    for place in places[-1:] if door.kind == "emulated" else places:
        codes = np.full(65536, form.levels, dtype=np.uint8)
        codes[place] = 0
        fixed = np.concatenate(
            [pydist.reference.blocks.pack_codes(codes, 3), np.ones(1, "<f4").view(np.uint8)]
        )
        coded = door.elias_encode(fixed, 65536, form, None)
        wanted = 2 + 3 + len(reference.omega(place + 1)) + 1 + 3
        assert coded.size == 8 + -(-wanted // 32) * 4
        assert_same_bits(door.elias_decode(coded, 65536, form, None), fixed, f"level at {place}")


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("torch has no such tensors")
    rng = np.random.default_rng(1)
    for bits in (2, 4, 7):
        form = form_of(bits, 32)
        cases.check_elias(door.using(layout=layout), cases.some_fixed(rng, 201, form), 201, form)


def test_segments(door: Door) -> None:
    rng = np.random.default_rng(2)
    for bits in (2, 5, 8):
        form = form_of(bits)
        for table in (
            wire.segments([], block=64),
            wire.segments([0], block=64),
            wire.segments([0, 5, 0, 0, 64, 1, 0], block=64),
            wire.segments([63, 64, 65], ordinals=[2, 0, 1], firsts=[64, 0, 2**33], block=64),
            np.array([[192, 40, 0, 0], [640, 3, 1, 64]], dtype=np.int64),  # gaps
        ):
            n = int(table[:, 1].sum())
            cases.check_elias(door, cases.some_fixed(rng, n, form, table), n, form, table)


def test_the_code_that_no_encoder_writes_travels_as_the_one_below(door: Door) -> None:
    for bits in (2, 3, 8):
        form = form_of(bits, 32)
        codes = np.arange(40, dtype=np.uint8) % 3 + np.uint8(2**bits - 3)
        scales = np.ones(2, "<f4").view(np.uint8)
        fixed, held = (
            np.concatenate([pydist.reference.blocks.pack_codes(c, bits), scales])
            for c in (codes, np.minimum(codes, 2 * form.levels))
        )
        coded = door.elias_encode(fixed, 40, form, None)
        assert_same_bits(coded, reference.elias_encode(fixed, form, 40), "coded")
        assert_same_bits(door.elias_decode(coded, 40, form, None), held, "decoded")


@pytest.mark.parametrize("group", DOOR_GROUPS[:1])
def test_large_arrays_with_one_thread_and_several(group: list[tuple[str, str]]) -> None:
    rng, n = np.random.default_rng(2), 2**20 + 3
    x = rng.standard_normal(n).astype(np.float32)
    for codec in (QSGD(4, 512, "l2"), QSGD(8, 65536, "l2"), QSGD(2, 32)):
        form, coded = codec.block_format, None
        fixed = arrays.quantize(x, codec, seed=5)
        for kind, isa in group:
            for threads in (1, 3):
                door = Door(kind, isa, "dense", threads)
                got = door.elias_encode(fixed, n, form, None)
                coded = got if coded is None else coded
                assert_same_bits(got, coded, f"{codec} on {door.name}")
                back = door.elias_decode(got, n, form, None)
                assert_same_bits(back, fixed, f"{codec} on {door.name}")


def test_more_blocks_than_are_summed_at_once(door: Door) -> None:
    """CUDA sums up 8 blocks a thread in one round, 64 threads where they are emulated."""
    codec, n = QSGD(2, 32), 1100 * 32 + 5
    x = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    fixed = arrays.quantize(x, codec, seed=5)
    host = Door(*HOST_DOORS[0], "dense", 1)
    coded = door.elias_encode(fixed, n, codec.block_format, None)
    assert_same_bits(coded, host.elias_encode(fixed, n, codec.block_format, None), door.name)
    assert_same_bits(door.elias_decode(coded, n, codec.block_format, None), fixed, door.name)


@pytest.mark.parametrize("group", DOOR_GROUPS)
@given(st.data(), st.integers(2, 8), st.sampled_from([32, 64, 224, 1056]), st.integers(0, 1500),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_random_payloads(
    group: list[tuple[str, str]], data: Any, bits: int, block: int, n: int, seed: int
) -> None:
    layouts = st.sampled_from(["dense", "offset", "strided"])
    door = Door(
        *data.draw(st.sampled_from(group)), data.draw(layouts), data.draw(st.integers(1, 2))
    )
    rng, form = np.random.default_rng(seed), form_of(bits, block)
    table = some_block_segments(rng, n, form) if seed % 2 else None
    cases.check_elias(door, cases.some_fixed(rng, n, form, table), n, form, table)


# --------------------------------------------------------------------------- malformed


def test_changed_payloads_get_the_answer_of_the_reference(door: Door) -> None:
    rng, fine, reasons = np.random.default_rng(12), 0, set()
    for i in range(100):
        form = form_of(2 + i % 7, int(rng.choice([32, 64])))
        n = int(rng.integers(1, 200))
        coded = reference.elias_encode(cases.some_fixed(rng, n, form), form, n)
        changed = cases.changed(rng, coded)
        fine += cases.check_malformed(door, changed, n, form)
        reasons.add(
            cases.verdict(lambda p=changed, m=n, f=form: reference.elias_decode(p, f, m))[1]
        )  # type: ignore[misc]
    assert fine > 3 and len(reasons) >= 7, reasons


def test_nothing_is_read_outside_of_damaged_payloads() -> None:
    """A thousand between forbidden pages; `make fuzz` runs millions."""

    class Guarded(selfcheck.HostMemory):
        at_end = True

        def put(self, array: Any) -> Any:
            return guarded(array, at_end=self.at_end)

    rng = np.random.default_rng(99)
    forms = [form_of(bits, block) for bits in range(2, 9) for block in (32, 512)]
    payloads = []
    for form in forms:
        n = int(rng.integers(1, 1000))
        payloads.append(
            (form, n, arrays.elias_encode(cases.some_fixed(rng, n, form), _codec(form), n))
        )
    refused = 0
    for isa in sorted({isa for _, isa in HOST_DOORS}):
        memory = Guarded(isa)
        run = KernelRunner(memory)
        for i in range(400):
            memory.at_end = i % 2 == 0
            form, n, coded = payloads[i % len(payloads)]
            answer = cases.verdict(
                lambda c=coded, m=n, f=form, r=run: r.elias_decode(
                    cases.changed(rng, c), m, f, None
                )  # type: ignore[misc]
            )
            refused += bool(answer[1])
    assert refused > 500 * len({isa for _, isa in HOST_DOORS}) / 2


def _codec(form: BlockFormat) -> QSGD:
    return QSGD(form.bits, form.block, form.norm)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_message_names_block_and_reason(kind: str) -> None:
    x = np.zeros(200, dtype=np.float32)
    x[150] = 1
    payload = arrays.quantize(x, ELIAS4)
    payload[8 * 4 + 2] = 0xFF  # the third block: 0, 1, 2
    with pytest.raises(ValueError, match=r"block 2 is malformed: its mode is 3") as raised:
        if kind == "torch":
            ops.dequantize(torch.from_numpy(payload), ELIAS4, 200)
        else:
            arrays.dequantize(payload, ELIAS4, 200)
    assert isinstance(raised.value, elias.MalformedError)


# --------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_values_are_those_without_entropy(door: Door, norm: str) -> None:
    rng = np.random.default_rng(4)
    for n in (0, 1, 100, 1001):
        x = rng.standard_normal(n).astype(np.float32)
        if n > 64:
            x[70] = np.nan
        table = door.native(wire.segments([n // 3, n - n // 3], block=64))
        for segments in (None, table):
            options = {"seed": 3, "rank": 2, "step": 5, "segments": segments}
            plain, coded = QSGD(4, 64, norm), QSGD(4, 64, norm, entropy="elias")
            fixed = door.call("quantize", door.native(x), plain, **options)
            payload = door.call("quantize", door.native(x), coded, **options)
            again = door.call("elias_encode", door.native(fixed), plain, n, segments=segments)
            assert_same_bits(payload, again, "payload")
            got = door.call("dequantize", door.native(payload), coded, n, segments=segments)
            wanted = door.call("dequantize", door.native(fixed), plain, n, segments=segments)
            assert_same_bits(got, wanted, "values")
            kept, same = np.zeros(n, np.float32), np.zeros(n, np.float32)
            sent = door.call(
                "quantize_feedback_", door.native(x), door.native(kept), coded, **options
            )
            door.call("quantize_feedback_", door.native(x), door.native(same), plain, **options)
            assert_same_bits(sent, payload, "payload with feedback")
            assert_same_bits(kept, same, "residual")


def test_sparse_blocks_become_short() -> None:
    x = np.zeros(2**16, dtype=np.float32)
    x[::1000] = 1
    fixed, coded = (arrays.quantize(x, QSGD(4, 512, "max", e)) for e in (None, "elias"))
    assert coded.size < fixed.size / 10


def test_never_much_longer() -> None:
    """A byte per block and the table, whatever the values."""
    rng = np.random.default_rng(1)
    for bits in range(2, 9):
        for x in (rng.uniform(-1, 1, 5000), rng.standard_normal(5000), np.ones(5000)):
            values = x.astype(np.float32)
            fixed, coded = (arrays.quantize(values, QSGD(bits, 128, "max", e))
                            for e in (None, "elias"))  # fmt: skip
            assert coded.size <= fixed.size + 40 * (4 + 1) + 3


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda a: QSGD(4, entropy="huffman"), ValueError, "entropy must be None or 'elias'"),
    (lambda a: a.quantize(a.f(5), ELIAS4, out=a.u(99)), ValueError, "out must be None with QSGD"),
    (lambda a: a.quantize_feedback_(a.f(5), a.f(5), ELIAS4, out=a.u(99)), ValueError,
     "out must be None with QSGD"),
    (lambda a: a.sum_quantized(a.u(2, 16), ELIAS4, 5), ValueError,
     r"codec must have entropy=None, got QSGD\(.*elias_decode each"),
    (lambda a: a.reduce_quantized(a.u(2, 16), ELIAS4, 5), ValueError, "must have entropy=None"),
    (lambda a: a.elias_encode(a.u(16), BlockFloat(), 5), TypeError,
     "codec must be a QSGD or a BlockInt, got BlockFloat"),
    (lambda a: a.elias_encode(a.u(16), 4, 5), TypeError, "codec must be"),
    (lambda a: a.elias_encode(a.u(16), ELIAS4, 5), ValueError,
     r"payload must have 8 bytes, got shape \[16\]"),
    (lambda a: a.elias_encode(a.u(2, 4), ELIAS4, 5), ValueError, r"got shape \[2, 4\]"),
    (lambda a: a.elias_encode(a.u(8, dtype="int32"), ELIAS4, 5), TypeError, "must be uint8"),
    (lambda a: a.elias_decode(a.u(4), ELIAS4, 5), ValueError, "payload must have at least 8 bytes"),
    (lambda a: a.elias_decode(a.u(14), ELIAS4, 5), ValueError,
     "payload must have 8 to 12 bytes, a multiple of 4, got 14"),
    (lambda a: a.elias_decode(a.u(16), ELIAS4, 5), ValueError, "payload must have 8 to 12 bytes"),
    (lambda a: a.elias_decode(a.u(12), ELIAS4, -1), ValueError, "n must"),
    (lambda a: a.elias_encode(a.u(8), ELIAS4, 5, segments=a.table((0, 4, 0, 0))), ValueError,
     "segments cover 4 elements, n has 5"),
    (lambda a: a.dequantize(a.u(8), ELIAS4, 5), ValueError, "block 0 is malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong_arguments(a: Any, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(a)


def test_too_many_elements_for_places_of_32_bits() -> None:
    form = form_of(8, 65536)
    assert elias.longest_bytes(wire.one_segment(2**32 - 2**20), form) < 2**33
    with pytest.raises(ValueError, match="n must be smaller: 4294967296 elements may take"):
        elias.longest_bytes(wire.one_segment(2**32), form)


def test_compiled() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return ops.dequantize(ops.quantize(x, ELIAS4, seed=2), ELIAS4, x.numel())

    x = torch.randn(300)
    wanted = ops.dequantize(ops.quantize(x, ELIAS4, seed=2), ELIAS4, 300)
    # Before torch 2.10 or so a graph holds lengths that depend on values only if asked to.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(there_and_back(x), wanted)


def test_block_integers_too() -> None:
    x, codec = torch.randn(500), BlockInt(4)
    fixed = ops.quantize(x, codec)
    coded = ops.elias_encode(fixed, codec, 500)
    assert torch.equal(ops.elias_decode(coded, codec, 500), fixed)
    assert fixed.numel() == blocks.table_bytes(wire.one_segment(500), codec.block_format)
