"""Top-k blocks against their reference: the comparisons, and the inputs of ``pydist check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from pydist.formats.topk import TopKFormat
from pydist.formats.wire import IntArray
from pydist.reference import topk as reference
from pydist.reference.signs import F32, U8, Storage
from pydist.selfcheck.bits import (
    Bits,
    assert_same_bits,
    assert_same_flags,
    storage_of,
    store,
    widen,
)
from pydist.selfcheck.runner import Order, Runner
from pydist.selfcheck.segments import some_block_segments as some_segments

FORMATS = [
    TopKFormat(density, block, values)
    for block, densities in ((32, (0.001, 0.25)), (64, (0.2, 0.26, 1.0)), (1056, (0.004, 0.05)))
    for density in densities
    for values in ("float32", "float16", "bfloat16")
]
LENGTHS = (0, 1, 31, 33, 64, 1001, 2113)
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16")


# --------------------------------------------------------------------------- comparisons


def check_select(
    run: Runner,
    x: Bits,
    form: TopKFormat,
    order: Order = Order(),  # noqa: B008  (frozen)
    segments: IntArray | None = None,
) -> None:
    """Raises DifferenceError unless selecting, decoding and clearing equal their reference."""
    what = f"topk_select on {run.name} ({storage_of(x)}, n={x.size}, {form}, {order})"
    payload, flags = run.topk_select(x, form, order, segments)
    expected, raised = reference.select(
        widen(x), form, seed=order.seed, step=order.step, segments=segments
    )
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)
    check_scatter(run, expected[None], x.size, form, storage=storage_of(x), segments=segments)
    if storage_of(x) != "float32":  # moving NaN about as float32 would change it
        return
    cleared, flags = run.topk_clear(x, expected, form, segments)
    wanted = reference.clear(widen(x), expected, form, segments=segments)
    assert_same_bits(cleared, wanted, f"topk_clear after {what}")
    assert_same_flags(flags, 0, what)


def check_feedback(
    run: Runner,
    x: Bits,
    residual: Bits,
    form: TopKFormat,
    order: Order = Order(),  # noqa: B008  (frozen)
    segments: IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``topk_feedback`` equals its reference."""
    storage = storage_of(residual)
    what = (
        f"topk_feedback on {run.name} ({storage_of(x)}, residual {storage}, n={x.size}, {form}, "
        f"{order})"
    )
    payload, new, flags = run.topk_feedback(x, residual, form, order, segments)
    expected, expected_new, raised = reference.feedback(
        widen(x), widen(residual), form, storage=storage, seed=order.seed, step=order.step,
        segments=segments,
    )  # fmt: skip
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_bits(new, store(expected_new, storage), f"{what}: residual")
    assert_same_flags(flags, raised, what)


def check_scatter(
    run: Runner,
    payloads: U8,
    n: int,
    form: TopKFormat,
    *,
    mean: bool = False,
    storage: Storage = "float32",
    segments: IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``topk_scatter`` equals its reference."""
    what = f"topk_scatter on {run.name} ({storage}, ranks={len(payloads)}, n={n}, {form})"
    out, flags = run.topk_scatter(payloads, n, form, mean=mean, storage=storage, segments=segments)
    expected = reference.scatter(payloads, form, n, mean=mean, segments=segments)
    assert_same_bits(out, store(expected, storage), what)
    assert_same_flags(flags, 0, what)


def check_reduce(
    run: Runner,
    payloads: U8,
    n: int,
    form: TopKFormat,
    order: Order = Order(),  # noqa: B008  (frozen)
    *,
    mean: bool = False,
    segments: IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``topk_reduce`` equals its reference."""
    what = f"topk_reduce on {run.name} (ranks={len(payloads)}, n={n}, {form}, {order})"
    payload, flags = run.topk_reduce(payloads, n, form, order, mean=mean, segments=segments)
    expected, raised = reference.reduce(
        payloads, form, n, mean=mean, seed=order.seed, step=order.step, segments=segments
    )
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)


# --------------------------------------------------------------------------- inputs


def some_values(rng: np.random.Generator, n: int, block: int, *, finite: bool = False) -> F32:
    """Blocks of their own kinds: normal, heavy-tailed, constant, few values, sparse, tiny, huge."""
    x = rng.standard_normal(n)
    kinds: list[Callable[[Any], Any]] = [
        lambda y: y, lambda y: y**9, np.sign, lambda y: np.round(2 * y), lambda y: y * (y > 2.5),
        lambda y: y * 1e-41, lambda y: y * 1e37, np.zeros_like, lambda y: np.full_like(y, -0.5),
    ]  # fmt: skip
    for begin in range(0, n, block):
        part = slice(begin, begin + block)
        x[part] = kinds[rng.integers(len(kinds))](x[part])
    x[rng.random(n) < 0.03] *= 0.0
    y = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    if n and not finite and rng.random() < 0.4:
        y[rng.integers(n)] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    return y


def some_bits(
    rng: np.random.Generator, n: int, form: TopKFormat, storage: Storage, *, finite: bool = False
) -> Bits:
    """:func:`some_values` as they are stored (where finite is asked for, held to 1e4)."""
    x = some_values(rng, n, form.block, finite=finite)
    return store(np.clip(x, -1e4, 1e4) if finite and storage == "float16" else x, storage)


def some_order(rng: np.random.Generator) -> Order:
    """A random seed and step."""
    return Order(int(rng.integers(2**32)), int(rng.integers(2**40)))


def some_payloads(
    rng: np.random.Generator,
    ranks: int,
    n: int,
    form: TopKFormat,
    segments: IntArray | None = None,
) -> U8:
    """What some ranks have selected, from values that share some of their places."""
    common = some_values(rng, n, form.block)
    rows = []
    for rank in range(ranks):
        with np.errstate(all="ignore"):
            x = common + rng.integers(0, 2) * some_values(rng, n, form.block, finite=True)
        rows.append(reference.select(x, form, seed=rank, segments=segments)[0])
    return np.stack(rows)


# --------------------------------------------------------------------------- cases by kernel

Cases = Iterator[Callable[[], None]]


def _inputs(
    rng: np.random.Generator,
) -> Iterator[tuple[int, int, TopKFormat, IntArray | None]]:
    for turn, n in enumerate(LENGTHS):
        for i, form in enumerate(FORMATS):
            if i % 3 != turn % 3:  # a third of them a length, another one each time
                continue
            table = some_segments(rng, n, form) if i % 2 else None
            yield i, n, form, table


def select_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Formats, lengths and types in turn."""
    for i, n, form, table in _inputs(rng):
        x = some_bits(rng, n, form, STORAGES[(i // 2 + n) % 3])
        yield partial(check_select, run, x, form, some_order(rng), table)


def feedback_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Formats, lengths and types in turn."""
    storages: tuple[Storage, ...] = ("float32", "bfloat16")
    for i, n, form, table in _inputs(rng):
        x = some_bits(rng, n, form, STORAGES[(i // 2 + n) % 3])
        residual = some_bits(rng, n, form, storages[i // 3 % 2], finite=True)
        yield partial(check_feedback, run, x, residual, form, some_order(rng), table)


def scatter_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Formats, lengths, types and numbers of ranks in turn."""
    for i, n, form, table in _inputs(rng):
        payloads = some_payloads(rng, (1, 2, 3, 5)[i % 4], n, form, table)
        yield partial(
            check_scatter, run, payloads, n, form,
            mean=bool(rng.integers(2)), storage=STORAGES[(i // 2 + n) % 3], segments=table,
        )  # fmt: skip


def reduce_cases(run: Runner, rng: np.random.Generator) -> Cases:
    """Formats, lengths and numbers of ranks in turn."""
    for i, n, form, table in _inputs(rng):
        payloads = some_payloads(rng, (1, 2, 3, 5)[i % 4], n, form, table)
        yield partial(
            check_reduce, run, payloads, n, form, some_order(rng),
            mean=bool(rng.integers(2)), segments=table,
        )  # fmt: skip
