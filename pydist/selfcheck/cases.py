"""The inputs of ``pydist check``: lengths, types, special values, numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pydist.formats import wire
from pydist.kernels.lion import LionOptions
from pydist.reference import signs as reference
from pydist.reference.signs import F32, U8, Storage, Ties
from pydist.selfcheck import blocks as block_cases
from pydist.selfcheck import compare
from pydist.selfcheck import elias as elias_cases
from pydist.selfcheck import raw as raw_cases
from pydist.selfcheck import ternary as ternary_cases
from pydist.selfcheck import topk as topk_cases
from pydist.selfcheck.backends import KernelRunner, runners
from pydist.selfcheck.bits import Bits, DifferenceError, store, widen
from pydist.selfcheck.runner import Runner

Cases = Iterator[Callable[[], None]]
"""Comparisons, each of which raises DifferenceError where a bit differs."""

LENGTHS = (0, 1, 7, 8, 31, 32, 33, 1001, 4099)
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16")
MOMENTA: tuple[Storage, ...] = ("float32", "bfloat16")
RANKS = (1, 2, 3, 4, 8, 9, 17, 256)
TIES: tuple[Ties, ...] = ("hash", "zero", "positive")

SPECIALS = np.array(
    [
        *(0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf),
        *(1e-45, -1e-45, 1e-40, -1e-40, 1.1754944e-38, -1.1754944e-38),  # subnormals, the border
        *(3.4028235e38, -3.4028235e38, 3.39e38, 65504.0, 65519.0, 65520.0),  # overflow borders
        *(5.9604645e-8, 2.9802322e-8, 2.9802326e-8, 6.1e-5, 1.0, -1.0),
    ],
    dtype=np.float32,
)


def some_values(rng: np.random.Generator, n: int) -> F32:
    """Random values of many magnitudes with zeros, subnormals, NaN and infinities among them."""
    x = rng.standard_normal(n).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 30, n)).astype(np.float32)
    x[rng.random(n) < 0.1] = 0.0
    here = rng.random(n) < 0.1
    x[here] = rng.choice(SPECIALS, int(here.sum()))
    return x


def some_bits(rng: np.random.Generator, n: int, storage: Storage, *, finite: bool = False) -> Bits:
    """:func:`some_values` as they are stored; with ``finite``, 1 where one is not finite."""
    bits = store(some_values(rng, n), storage)
    if finite:
        bits[~np.isfinite(widen(bits))] = store(np.ones(1, np.float32), storage)
    return bits


def some_segments(rng: np.random.Generator, n: int) -> wire.IntArray:
    """A random table that covers ``n`` elements: short and empty rows, gaps, odd first elements."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 5)))
    lengths = np.diff([0, *cuts.tolist(), n]).tolist()
    table = wire.segments(
        lengths,
        ordinals=rng.integers(0, 1000, len(lengths)).tolist(),
        firsts=rng.integers(0, 2**40, len(lengths)).tolist(),
    )
    table[:, 0] += np.cumsum(rng.integers(0, 3, len(lengths))) * wire.WORD_BITS
    return table


def some_payloads(rng: np.random.Generator, ranks: int, n: int) -> U8:
    """Random votes; a third of the columns nearly unanimous, so that carries run far."""
    payloads = rng.integers(0, 256, (ranks, wire.payload_bytes(n)), dtype=np.uint8)
    payloads[:, ::3] |= rng.integers(0, 256, payloads[:, ::3].shape, dtype=np.uint8)
    return payloads


# --------------------------------------------------------------------------- cases by kernel


def _pack_signs(run: Runner, rng: np.random.Generator) -> Cases:
    for n in LENGTHS:
        for storage in STORAGES:
            for zero_bit in (0, 1):
                x = some_bits(rng, n, storage)
                yield partial(compare.check_pack_signs, run, x, zero_bit=zero_bit)
                clean = some_bits(rng, n, storage, finite=True)
                table = some_segments(rng, n)
                yield partial(
                    compare.check_pack_signs, run, clean, zero_bit=zero_bit, segments=table
                )


def _unpack_votes(run: Runner, rng: np.random.Generator) -> Cases:
    for n in LENGTHS:
        for storage in STORAGES:
            for count in (1, 2):
                planes = some_payloads(rng, count, n)
                yield partial(compare.check_unpack_votes, run, planes, n, storage=storage)
            for ranks in RANKS:
                planes = some_payloads(rng, wire.planes_for(ranks), n)
                for mean in (False, True):
                    yield partial(
                        compare.check_unpack_votes,
                        run,
                        planes,
                        n,
                        ranks=ranks,
                        mean=mean,
                        storage=storage,
                    )


def _count_votes(run: Runner, rng: np.random.Generator) -> Cases:
    for n in LENGTHS:
        for ranks in RANKS:
            yield partial(compare.check_count_votes, run, some_payloads(rng, ranks, n))


def _majority_vote(run: Runner, rng: np.random.Generator) -> Cases:
    for n in LENGTHS:
        for ranks in RANKS:
            for ties in TIES:
                seed, step = int(rng.integers(2**32)), int(rng.integers(2**40))
                yield partial(
                    compare.check_majority_vote,
                    run,
                    some_payloads(rng, ranks, n),
                    ties=ties,
                    seed=seed,
                    step=step,
                    n=n,
                )
                table = some_segments(rng, n)
                payloads = some_payloads(rng, ranks, 32 * wire.segments_words(table))
                yield partial(
                    compare.check_majority_vote,
                    run,
                    payloads,
                    ties=ties,
                    seed=seed,
                    step=step,
                    segments=table,
                )


def _lion_pack(run: Runner, rng: np.random.Generator) -> Cases:
    yield from _lion_pack_close_calls(run, rng)
    for n in LENGTHS:
        for storage in STORAGES:
            for momentum_storage in MOMENTA:
                for spread in (None, 0.5):
                    options = LionOptions(
                        0.9, 0.99, zero_bit=int(rng.integers(2)), binarization_range=spread,
                        seed=int(rng.integers(2**32)), rank=int(rng.integers(65535)),
                        step=int(rng.integers(2**40)),
                    )  # fmt: skip
                    grad = some_bits(rng, n, storage)
                    momentum = some_bits(rng, n, momentum_storage, finite=True)
                    yield partial(compare.check_lion_pack, run, grad, momentum, options)
                    table = some_segments(rng, n)
                    yield partial(compare.check_lion_pack, run, grad, momentum, options, table)


def _lion_pack_close_calls(run: Runner, rng: np.random.Generator) -> Cases:
    """Directions whose sign, and thresholds whose comparison, the last rounding decides."""
    n, beta1 = 4099, 0.9
    grad = rng.standard_normal(n).astype(np.float32)
    momentum = (-(1.0 - beta1) / beta1 * grad.astype(np.float64)).astype(np.float32)
    for zero_bit in (0, 1):
        options = LionOptions(beta1, 0.99, zero_bit=zero_bit)
        yield partial(compare.check_lion_pack, run, grad, momentum, options)
    draws = reference.draws16(1, 2 << 2, 3, 0, 0, n).astype(np.float64)
    for spread in (0.3, 0.1, 1e-3):  # where c / r and c * (1 / r) round apart
        even = ((draws / 32768 - 1) * spread).astype(np.float32)
        options = LionOptions(0.5, 0.5, binarization_range=spread, seed=1, rank=2, step=3)
        yield partial(compare.check_lion_pack, run, even, even, options)
    largest = np.full(n, 0x7F7F, dtype=np.uint16)
    edge = rng.uniform(3.38e38, 3.4e38, n).astype(np.float32)  # some round to infinity in bfloat16
    yield partial(compare.check_lion_pack, run, edge, largest, LionOptions(beta1, 0.0))


def _lion_apply(run: Runner, rng: np.random.Generator) -> Cases:
    for n in LENGTHS:
        for storage in STORAGES:
            param = some_bits(rng, n, storage)
            for count in (1, 2):
                planes = some_payloads(rng, count, n)
                yield partial(
                    compare.check_lion_apply, run, param, planes, lr=3e-4, weight_decay=0.1
                )
            for ranks in RANKS:
                planes = some_payloads(rng, wire.planes_for(ranks), n)
                yield partial(
                    compare.check_lion_apply,
                    run,
                    param,
                    planes,
                    lr=1e-3,
                    weight_decay=0.01,
                    ranks=ranks,
                )


KERNELS: dict[str, Callable[[KernelRunner, np.random.Generator], Cases]] = {
    "pack_signs": _pack_signs,
    "unpack_votes": _unpack_votes,
    "count_votes": _count_votes,
    "majority_vote": _majority_vote,
    "lion_pack": _lion_pack,
    "lion_apply": _lion_apply,
    "quantize": block_cases.quantize_cases,
    "quantize_feedback": block_cases.feedback_cases,
    "sum_quantized": block_cases.sum_cases,
    "reduce_quantized": block_cases.reduce_cases,
    "elias_encode": elias_cases.elias_cases,
    "elias_decode": elias_cases.malformed_cases,
    "ternary_scale": ternary_cases.scale_cases,
    "ternary_pack": ternary_cases.pack_cases,
    "ternary_sum": ternary_cases.sum_cases,
    "ternary_unpack": ternary_cases.unpack_cases,
    "topk_select": topk_cases.select_cases,
    "topk_feedback": topk_cases.feedback_cases,
    "topk_scatter": topk_cases.scatter_cases,
    "topk_reduce": topk_cases.reduce_cases,
    "sum_values": raw_cases.sum_values_cases,
}


def check_kernel(
    run: KernelRunner, kernel: str, seed: int = 0
) -> tuple[int, DifferenceError | None]:
    """Compares one kernel of one backend with the reference.

    Args:
        run: The backend.
        kernel: A name of :data:`KERNELS`.
        seed: Seed of the inputs.

    Returns:
        The number of cases tried, and the first difference; the cases end with it.
    """
    cases = 0
    try:
        for case in KERNELS[kernel](run, np.random.default_rng(seed)):
            cases += 1
            case()
    except DifferenceError as difference:
        return cases, difference
    return cases, None


def check_all(
    device: str | None = None,
) -> Iterator[tuple[KernelRunner, str, int, DifferenceError | None]]:
    """Checks every kernel of every backend here: backend, kernel, cases, difference.

    Args:
        device: ``"cpu"`` or ``"cuda"``: the backends on it alone.
    """
    for run in runners(device):
        for kernel in KERNELS:
            yield run, kernel, *check_kernel(run, kernel)
