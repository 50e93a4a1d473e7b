"""Block formats against their reference: the comparisons, and the inputs of ``pydist check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.kernels.block_formats import EncodeOptions
from pydist.reference import blocks as reference
from pydist.reference.signs import F32, U8, Storage
from pydist.selfcheck.bits import (
    Bits,
    assert_same_bits,
    assert_same_flags,
    storage_of,
    store,
    widen,
)
from pydist.selfcheck.runner import Runner
from pydist.selfcheck.segments import some_block_segments as some_segments

FORMATS = [
    *(BlockFormat("sign", 1, 64, norm) for norm in ("l1", "l2")),
    *(
        BlockFormat("levels", bits, 64, norm, stochastic)
        for bits in range(2, 9)
        for norm in ("max", "l2")
        for stochastic in (False, True)
    ),
    *(BlockFormat(scheme, 8, 64, "max") for scheme in ("e4m3", "e5m2")),
]
BLOCKS = (32, 64, 512, 1056)
LENGTHS = (0, 1, 31, 33, 64, 1001, 2113)
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16")


def _draws(options: EncodeOptions) -> reference.Draws:
    return reference.Draws(options.seed, options.rank, options.phase, options.step)


# --------------------------------------------------------------------------- comparisons


def check_quantize(
    run: Runner,
    x: Bits,
    form: BlockFormat,
    options: EncodeOptions = EncodeOptions(),  # noqa: B008  (frozen)
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``quantize`` equals its reference, and its decoder too."""
    what = f"quantize on {run.name} ({storage_of(x)}, n={x.size}, {form}, {options})"
    payload, flags = run.quantize(x, form, options, segments)
    expected, raised = reference.quantize(
        widen(x), form, zero_bit=options.zero_bit, draws=_draws(options), segments=segments
    )
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)
    check_sum(run, expected[None], x.size, form, storage=storage_of(x), segments=segments)


def check_quantize_feedback(
    run: Runner,
    x: Bits,
    residual: Bits,
    form: BlockFormat,
    options: EncodeOptions = EncodeOptions(),  # noqa: B008  (frozen)
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``quantize_feedback`` equals its reference."""
    storage = storage_of(residual)
    what = (
        f"quantize_feedback on {run.name} ({storage_of(x)}, residual {storage}, n={x.size}, "
        f"{form}, {options})"
    )
    payload, new, flags = run.quantize_feedback(x, residual, form, options, segments)
    expected, expected_new, raised = reference.quantize_feedback(
        widen(x), widen(residual), form, storage=storage, zero_bit=options.zero_bit,
        draws=_draws(options), segments=segments,
    )  # fmt: skip
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_bits(new, store(expected_new, storage), f"{what}: residual")
    assert_same_flags(flags, raised, what)


def check_sum(
    run: Runner,
    payloads: U8,
    n: int,
    form: BlockFormat,
    *,
    mean: bool = False,
    storage: Storage = "float32",
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``sum_quantized`` equals its reference."""
    what = f"sum_quantized on {run.name} ({storage}, ranks={len(payloads)}, n={n}, {form})"
    out = run.sum_quantized(payloads, n, form, mean=mean, storage=storage, segments=segments)
    expected = reference.sum_quantized(payloads, form, n, mean=mean, segments=segments)
    assert_same_bits(out, store(expected, storage), what)


def check_reduce(
    run: Runner,
    payloads: U8,
    n: int,
    form: BlockFormat,
    options: EncodeOptions = EncodeOptions(phase=1),  # noqa: B008  (frozen)
    *,
    mean: bool = False,
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``reduce_quantized`` equals its reference."""
    what = f"reduce_quantized on {run.name} (ranks={len(payloads)}, n={n}, {form}, {options})"
    payload, flags = run.reduce_quantized(payloads, n, form, options, mean=mean, segments=segments)
    expected, raised = reference.reduce_quantized(
        payloads, form, n, mean=mean, zero_bit=options.zero_bit, draws=_draws(options),
        segments=segments,
    )  # fmt: skip
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)


# --------------------------------------------------------------------------- inputs


def some_values(rng: np.random.Generator, n: int, block: int, *, finite: bool = False) -> F32:
    """Blocks of many magnitudes: some of zeros, subnormals or numbers near the largest."""
    x = rng.standard_normal(n).astype(np.float32)
    scale = rng.choice(np.array([1, 1, 1e-3, 0, 1e-44, 1e-39, 2.0**-120, 1e30, 2.0**125]), n)
    per_block = scale[np.arange(n) // block]
    with np.errstate(all="ignore"):
        x = np.clip(x.astype(np.float64) * per_block, -3.4e38, 3.4e38).astype(np.float32)
    x[rng.random(n) < 0.05] = 0.0
    x[rng.random(n) < 0.05] *= np.float32(-0.0)
    if n and not finite and rng.random() < 0.5:
        x[rng.integers(n)] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    return x


def some_bits(
    rng: np.random.Generator, n: int, form: BlockFormat, storage: Storage, *, finite: bool = False
) -> Bits:
    """:func:`some_values` as they are stored (and infinite where that overflows)."""
    return store(some_values(rng, n, form.block, finite=finite), storage)


def some_options(rng: np.random.Generator) -> EncodeOptions:
    """Random scalars."""
    return EncodeOptions(
        zero_bit=int(rng.integers(2)), seed=int(rng.integers(2**32)),
        rank=int(rng.integers(65535)), phase=int(rng.integers(4)), step=int(rng.integers(2**40)),
    )  # fmt: skip


def some_payloads(
    rng: np.random.Generator,
    ranks: int,
    n: int,
    form: BlockFormat,
    segments: wire.IntArray | None = None,
) -> U8:
    """Payloads of random bytes with plausible scales: every code there is, malformed ones too."""
    table = wire.one_segment(n) if segments is None else segments
    size = blocks.table_code_bytes(table, form)
    count = blocks.table_blocks(table, form)
    codes = rng.integers(0, 256, (ranks, size), dtype=np.uint8)
    scales = np.abs(rng.standard_normal((ranks, count))).astype("<f4")
    scales[rng.random((ranks, count)) < 0.1] = 0
    scales[rng.random((ranks, count)) < 0.05] = rng.choice(
        np.array([np.nan, 1e-44, 3e38], np.float32)
    )
    return np.concatenate([codes, scales.view(np.uint8).reshape(ranks, 4 * count)], axis=1)


# --------------------------------------------------------------------------- cases by kernel

Cases = Iterator[Callable[[], None]]


def _forms(rng: np.random.Generator) -> Iterator[BlockFormat]:
    for form in FORMATS:
        block = int(rng.choice(BLOCKS))
        yield BlockFormat(form.scheme, form.bits, block, form.norm, form.stochastic)


def quantize_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every format; lengths and types in turn."""
    for n in LENGTHS:
        for i, form in enumerate(_forms(rng)):
            x = some_bits(rng, n, form, STORAGES[(i + n) % 3])
            yield partial(check_quantize, run, x, form, some_options(rng))
            table = some_segments(rng, n, form)
            yield partial(check_quantize, run, x, form, some_options(rng), table)


def feedback_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every format; lengths and types in turn."""
    storages: tuple[Storage, ...] = ("float32", "bfloat16")
    for n in LENGTHS:
        for i, form in enumerate(_forms(rng)):
            x = some_bits(rng, n, form, STORAGES[(i + n) % 3])
            residual = some_bits(rng, n, form, storages[i % 2], finite=True)
            table = some_segments(rng, n, form) if i % 3 else None
            yield partial(check_quantize_feedback, run, x, residual, form, some_options(rng), table)


def sum_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every format; lengths, types and numbers of ranks in turn."""
    for n in LENGTHS:
        for i, form in enumerate(_forms(rng)):
            table = some_segments(rng, n, form) if i % 2 else None
            payloads = some_payloads(rng, (1, 2, 3, 5)[i % 4], n, form, table)
            yield partial(
                check_sum, run, payloads, n, form,
                mean=bool(rng.integers(2)), storage=STORAGES[(i + n) % 3], segments=table,
            )  # fmt: skip


def reduce_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every format; lengths and numbers of ranks in turn."""
    for n in LENGTHS:
        for i, form in enumerate(_forms(rng)):
            table = some_segments(rng, n, form) if i % 2 else None
            payloads = some_payloads(rng, (1, 2, 3, 5)[i % 4], n, form, table)
            yield partial(
                check_reduce, run, payloads, n, form, some_options(rng),
                mean=bool(rng.integers(2)), segments=table,
            )  # fmt: skip
