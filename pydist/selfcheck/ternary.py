"""Ternary kernels against their reference: the comparisons, and the inputs of ``pydist check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pydist.formats import ternary, wire
from pydist.kernels.block_formats import EncodeOptions
from pydist.reference import ternary as reference
from pydist.reference.blocks import Draws
from pydist.reference.signs import F32, U8, Storage
from pydist.selfcheck.bits import (
    Bits,
    assert_same_bits,
    assert_same_flags,
    storage_of,
    store,
    widen,
)
from pydist.selfcheck.blocks import some_options, some_values
from pydist.selfcheck.runner import Runner

LENGTHS = (0, 1, 7, 31, 33, 160, 161, 1001, 4096, 9001)
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16")
CLIPS = (2.5, None, 0.5, 1e30)
RANKS = (1, 2, 3, 4, 127, 128, 300)


# --------------------------------------------------------------------------- comparisons


def check_scale(
    run: Runner, x: Bits, clip: float | None, segments: wire.IntArray | None = None
) -> None:
    """Raises DifferenceError unless ``ternary_scale`` equals its reference."""
    what = f"ternary_scale on {run.name} ({storage_of(x)}, n={x.size}, clip={clip})"
    scalers, flags = run.ternary_scale(x, clip, segments)
    expected, raised = reference.scale(widen(x), clip, segments=segments)
    assert_same_bits(scalers, expected, what)
    assert_same_flags(flags, raised, what)


def check_pack(
    run: Runner,
    x: Bits,
    scalers: F32,
    shared: F32,
    options: EncodeOptions = EncodeOptions(),  # noqa: B008  (frozen)
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``ternary_pack`` equals its reference."""
    what = f"ternary_pack on {run.name} ({storage_of(x)}, n={x.size}, {scalers}, {shared}, "
    what += f"{options})"
    payload, flags = run.ternary_pack(x, scalers, shared, options, segments)
    draws = Draws(options.seed, options.rank, 0, options.step)
    expected, raised = reference.pack(
        widen(x), scalers, shared=shared, draws=draws, segments=segments
    )
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)


def check_sum(run: Runner, payloads: U8, n: int, segments: wire.IntArray | None = None) -> None:
    """Raises DifferenceError unless ``ternary_sum`` equals its reference."""
    what = f"ternary_sum on {run.name} (ranks={len(payloads)}, n={n})"
    sums, flags = run.ternary_sum(payloads, n, segments)
    assert_same_bits(sums, reference.sum_payloads(payloads, n, segments=segments), what)
    assert_same_flags(flags, 0, what)


def check_unpack(
    run: Runner,
    payloads: U8,
    scalers: F32,
    n: int,
    *,
    mean: bool = False,
    storage: Storage = "float32",
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless both decoders equal their reference, and each other."""
    ranks = len(payloads)
    what = f"on {run.name} ({storage}, ranks={ranks}, n={n}, mean={mean}, scalers={scalers})"
    expected, raised = reference.unpack(payloads, scalers, n, mean=mean, segments=segments)
    sums = reference.sum_payloads(payloads, n, segments=segments)
    same, _ = reference.values_of_sums(sums, scalers, n, ranks=ranks, mean=mean, segments=segments)
    assert_same_bits(same, expected, "ternary_unpack: the reference of sums")
    values, flags = run.ternary_unpack(
        payloads, scalers, n, mean=mean, storage=storage, segments=segments
    )
    assert_same_bits(values, store(expected, storage), f"ternary_unpack {what}")
    assert_same_flags(flags, raised, f"ternary_unpack {what}")
    values, flags = run.ternary_unpack_sums(
        sums, scalers, n, ranks=ranks, mean=mean, storage=storage, segments=segments
    )
    assert_same_bits(values, store(expected, storage), f"ternary_unpack_sums {what}")
    assert_same_flags(flags, raised, f"ternary_unpack_sums {what}")


# --------------------------------------------------------------------------- inputs


def some_bits(rng: np.random.Generator, n: int, storage: Storage, *, finite: bool = False) -> Bits:
    """Values of many magnitudes in stretches, as they are stored."""
    return store(some_values(rng, n, int(rng.choice([160, 5000])), finite=finite), storage)


def some_segments(rng: np.random.Generator, n: int) -> wire.IntArray:
    """A random table that covers ``n`` elements: short and empty rows, gaps, odd first elements."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 4)))
    lengths = np.diff([0, *cuts.tolist(), n]).tolist()
    table = wire.segments(
        lengths,
        ordinals=rng.integers(0, 1000, len(lengths)).tolist(),
        firsts=rng.integers(0, 2**40, len(lengths)).tolist(),
        block=ternary.UNIT,
    )
    table[:, 0] += np.cumsum(rng.integers(0, 2, len(lengths))) * ternary.UNIT
    return table


def some_scalers(rng: np.random.Generator, k: int) -> F32:
    """Scalers of every kind, those among them that no kernel writes."""
    usual = np.abs(rng.standard_normal(k)) + 0.1
    odd = rng.choice(np.array([0, 1e-44, 2.0**-110, 2.0**-111, 3e38, np.inf, np.nan, -1.0]), k)
    return np.where(rng.random(k) < 0.3, odd, usual).astype(np.float32)


def some_payloads(
    rng: np.random.Generator, ranks: int, n: int, segments: wire.IntArray | None = None
) -> U8:
    """Payloads of random trits; the columns of some are all plus or all minus."""
    size = ternary.table_bytes(wire.one_segment(n) if segments is None else segments)
    payloads = rng.integers(0, ternary.LARGEST_BYTE + 1, (ranks, size), dtype=np.uint8)
    payloads[:, ::7] = rng.choice(np.array([0, 121, 242], np.uint8))
    return payloads


# --------------------------------------------------------------------------- cases by kernel

Cases = Iterator[Callable[[], None]]


def _tables(rng: np.random.Generator, n: int) -> Iterator[wire.IntArray | None]:
    yield None
    yield some_segments(rng, n)


def scale_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every type and clip; lengths in turn."""
    for n in LENGTHS:
        for storage in STORAGES:
            for clip in CLIPS:
                for table in _tables(rng, n):
                    finite = bool(rng.integers(2))
                    x = some_bits(rng, n, storage, finite=finite)
                    yield partial(check_scale, run, x, clip, table)


def pack_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every type; scalers of the values, and any others."""
    for n in LENGTHS:
        for storage in STORAGES:
            for table in _tables(rng, n):
                x = some_bits(rng, n, storage, finite=True)
                own, _ = reference.scale(widen(x), 2.5, segments=table)
                options = some_options(rng)
                yield partial(check_pack, run, x, own, own * np.float32(1.5), options, table)
                x = some_bits(rng, n, storage)
                own, shared = (some_scalers(rng, len(own)) for _ in range(2))
                yield partial(check_pack, run, x, own, shared, options, table)


def sum_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every number of ranks."""
    for n in LENGTHS[:-2]:
        for ranks in RANKS:
            for table in _tables(rng, n):
                payloads = some_payloads(rng, ranks, n, table)
                yield partial(check_sum, run, payloads, n, table)


def unpack_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Every type; numbers of ranks in turn."""
    for n in LENGTHS:
        for i, storage in enumerate(STORAGES):
            for mean in (False, True):
                for table in _tables(rng, n):
                    ranks = RANKS[(i + n) % (len(RANKS) if n < 1000 else 4)]
                    payloads = some_payloads(rng, ranks, n, table)
                    scalers = some_scalers(rng, 1 if table is None else len(table))
                    yield partial(
                        check_unpack, run, payloads, scalers, n,
                        mean=mean, storage=storage, segments=table,
                    )  # fmt: skip
