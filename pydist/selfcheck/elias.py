"""Elias codes against their reference: backend, comparisons, inputs of ``pydist check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.formats.elias import MalformedError
from pydist.reference import blocks as block_reference
from pydist.reference import elias as reference
from pydist.reference.signs import U8
from pydist.selfcheck.bits import DifferenceError, assert_same_bits
from pydist.selfcheck.runner import Runner
from pydist.selfcheck.segments import some_block_segments

LENGTHS = (0, 1, 31, 33, 64, 1001)
BLOCKS = (32, 64, 480, 1056)


# --------------------------------------------------------------------------- comparisons


def check_elias(
    run: Runner,
    payload: U8,
    n: int,
    form: BlockFormat,
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless a fixed payload is coded as the reference does, and back."""
    what = f"on {run.name} (n={n}, {form})"
    expected = reference.elias_encode(payload, form, n, segments=segments)
    coded = run.elias_encode(payload, n, form, segments)
    assert_same_bits(coded, expected, f"elias_encode {what}")
    back = run.elias_decode(coded, n, form, segments)
    assert_same_bits(back, payload, f"elias_decode {what}")


def verdict(decode: Callable[[], U8]) -> tuple[U8 | None, str]:
    """What a decoder answers: a payload, or its objection."""
    try:
        return decode(), ""
    except ValueError as error:
        return None, str(error) if isinstance(error, MalformedError) else "length"


def check_malformed(
    run: Runner,
    payload: U8,
    n: int,
    form: BlockFormat,
    segments: wire.IntArray | None = None,
) -> bool:
    """Raises DifferenceError unless any bytes get the reference's answer; whether they are fine."""
    what = f"elias_decode of changed bytes on {run.name} (n={n}, {form})"
    wanted, objection = verdict(lambda: reference.elias_decode(payload, form, n, segments=segments))
    got, answer = verdict(lambda: run.elias_decode(payload, n, form, segments))
    if answer != objection:
        raise DifferenceError(f"{what}: says {answer!r}, the reference {objection!r}")
    if wanted is not None:
        assert got is not None
        assert_same_bits(got, wanted, what)
    return not objection


# --------------------------------------------------------------------------- inputs


def some_fixed(
    rng: np.random.Generator, n: int, form: BlockFormat, segments: wire.IntArray | None = None
) -> U8:
    """A fixed payload as encoders write it: blocks sparse, dense, constant, zero, or NaN."""
    table = wire.one_segment(n) if segments is None else segments
    payload = np.zeros(blocks.table_bytes(table, form), dtype=np.uint8)
    scales = payload[blocks.table_code_bytes(table, form) :]
    top = form.levels
    for offset, length, _, _ in table.tolist():
        for begin in range(0, length, form.block):
            size, index = min(form.block, length - begin), (offset + begin) // form.block
            scale = np.float32(rng.choice([0.0, 1.0, 3e38, 1e-40, np.nan]))
            scales[4 * index : 4 * index + 4] = np.array([scale], dtype="<f4").view(np.uint8)
            if np.isnan(scale):
                continue
            spread = float(rng.choice([0, 0.05, 0.3, 1, top / 2, 99]))
            levels = np.clip(np.rint(rng.standard_normal(size) * spread), -top, top)
            if rng.random() < 0.2:
                levels[:] = rng.integers(-top, top + 1)
            codes = block_reference.pack_codes((levels + top).astype(np.uint8), form.bits)
            payload[index * form.block_bytes :][: codes.size] = codes
    return payload


def changed(rng: np.random.Generator, payload: U8) -> U8:
    """A payload with a few bytes changed, or another length."""
    payload = payload.copy()
    for _ in range(int(rng.integers(1, 4))):
        if not payload.size:
            break
        at = int(rng.integers(payload.size))
        kind = rng.integers(4)
        if kind == 0:
            payload[at] ^= np.uint8(1 << rng.integers(8))
        elif kind == 1:
            payload[at] = rng.integers(256)
        elif kind == 2:
            payload[at : at + 4] = rng.choice([0, 255])
        else:
            payload = np.resize(payload, max(0, payload.size + 4 * int(rng.integers(-2, 3))))
    return payload


Cases = Iterator[Callable[[], None]]


def _forms(rng: np.random.Generator) -> Iterator[BlockFormat]:
    for bits in range(2, 9):
        yield BlockFormat("levels", bits, int(rng.choice(BLOCKS)), "max")


def elias_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every number of bits; lengths and segments in turn."""
    for i, n in enumerate(LENGTHS):
        for form in _forms(rng):
            table = some_block_segments(rng, n, form) if (i + form.bits) % 2 else None
            payload = some_fixed(rng, n, form, table)
            yield partial(check_elias, run, payload, n, form, table)


def malformed_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Payloads with a few bytes changed."""

    def case(form: BlockFormat, n: int, payload: U8) -> None:
        check_malformed(run, payload, n, form)

    for i in range(100):
        form = BlockFormat("levels", 2 + i % 7, int(rng.choice(BLOCKS[:3])), "max")
        n = int(rng.integers(1, 300))
        coded = reference.elias_encode(some_fixed(rng, n, form), form, n)
        yield partial(case, form, n, changed(rng, coded))
