"""Plain values against their reference: the comparison, and the inputs of ``pydist check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pydist.reference import raw as reference_raw
from pydist.reference.signs import Storage
from pydist.selfcheck.bits import (
    Bits,
    assert_same_bits,
    assert_same_flags,
    storage_of,
    store,
    widen,
)
from pydist.selfcheck.runner import Runner

LENGTHS = (0, 1, 7, 31, 32, 33, 1001, 4099)
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16")


def check_sum_values(run: Runner, values: Bits, *, mean: bool, storage: Storage) -> None:
    """Raises DifferenceError unless ``sum_values`` equals its reference."""
    what = (
        f"sum_values on {run.name} ({storage_of(values)} to {storage}, "
        f"{list(values.shape)}, mean={mean})"
    )
    out, flags = run.sum_values(values, mean=mean, storage=storage)
    expected, raised = reference_raw.sum_values(widen(values), storage, mean=mean)
    assert_same_bits(out, store(expected, storage), what)
    assert_same_flags(flags, raised, what)


def some_rows(
    rng: np.random.Generator, ranks: int, n: int, storage: Storage, *, special: bool
) -> Bits:
    """Random rows of many magnitudes with zeros of both signs, so that the order of sums shows.

    With ``special`` there are subnormals, NaN, infinities and numbers near the largest, too.
    """
    x = rng.standard_normal((ranks, n)).astype(np.float32)
    x *= np.exp2(rng.integers(-12, 12, x.shape)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0.0
    x[:, rng.random(n) < 0.1] = -0.0
    if special:
        odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3.4e38, 65519.0, 65520.0])
        here = rng.random(x.shape) < 0.05
        x[here] = rng.choice(odd.astype(np.float32), int(here.sum()))
    return store(x, storage)


def sum_values_cases(run: Runner, rng: np.random.Generator) -> Iterator[Callable[[], None]]:
    """Every pair of types; lengths and numbers of ranks in turn."""
    for i, n in enumerate(LENGTHS):
        for j, source in enumerate(STORAGES):
            for k, storage in enumerate(STORAGES):
                ranks = (1, 2, 3, 5)[(i + j + k) % 4]
                for special in (False, True):
                    values = some_rows(rng, ranks, n, source, special=special)
                    mean = bool(rng.integers(2))
                    yield partial(check_sum_values, run, values, mean=mean, storage=storage)
