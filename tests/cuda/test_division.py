"""Division by a count of ranks (csrc/cuda/division.cuh) has the bits of IEEE division."""

from __future__ import annotations

from typing import Any

import emulated
import numpy as np
import pytest
from test_emulator import call, kernels

pytestmark = list(emulated.MARKS)
__all__ = ["kernels"]  # a fixture

DIVISORS = np.arange(1, 65536, dtype=np.float32)


def check(kernels: Any, x: Any, divisors: Any, *, counts: bool = False) -> None:
    out = np.empty((divisors.size, x.size), np.float32)
    said = call(kernels, "run_divisions", x, x.size, divisors, divisors.size, out, int(counts))
    assert said == "no error"
    with np.errstate(all="ignore"):
        expected = x / divisors[:, None]
    same = (out.view("u4") == expected.view("u4")) | (np.isnan(out) & np.isnan(expected))
    if not same.all():
        k, i = np.argwhere(~same)[0]
        raise AssertionError(
            f"{x[i]!r} / {divisors[k]}: {out[k, i]!r} and not {expected[k, i]!r}, "
            f"{(~same).sum()} of {same.size}"
        )


def runs(*parts: Any) -> Any:
    """Numbers of both signs, as many as whole runs have."""
    x = np.concatenate([np.asarray(part, np.float64).ravel() for part in parts]).astype("f4")
    x = np.concatenate([x, -x])
    return np.concatenate([x, x[: -x.size % 8]])


def test_every_divisor(kernels: Any) -> None:
    """Magnitudes of all kinds, most of them in runs that have no special number."""
    kernels.configure(0, races=False)
    rng = np.random.default_rng(16)
    plain = np.ldexp(rng.uniform(1, 2, 64), rng.integers(-109, 128, 64))
    edges = np.float32(2.0**-110) * np.array([1, 1 - 2.0**-24, 1 + 2.0**-23, 2], np.float32)
    tiny = [0.0, 1e-45, 3e-45, 1e-40, 2.0**-126, 2.0**-120 * 1.5, *edges]
    largest = np.finfo(np.float32).max
    special = [np.inf, np.nan, largest, np.nextafter(largest, np.float32(0)), 2.0**127, 1, 3]
    x = runs(
        plain, [0.0, 1, 2, 3, 5, 7, 2.0**-110, largest], np.arange(8) + 2**24 - 8, tiny, special
    )
    for divisors in np.array_split(DIVISORS, 8):
        check(kernels, x, np.ascontiguousarray(divisors))


def test_quotients_next_to_the_middle_between_two_floats(kernels: Any) -> None:
    """For every divisor, dividends whose quotients are as near to a tie as there are."""
    kernels.configure(0, races=False)
    rng = np.random.default_rng(17)
    for divisors in np.array_split(DIVISORS, 256):
        middles = 2 * rng.integers(2**23, 2**24, 2).astype(np.float64) + 1  # of 25 bits
        near = (middles * divisors[:, None].astype(np.float64)).astype(np.float32)
        check(kernels, runs(near[rng.permutation(len(near))[:32]]), np.ascontiguousarray(divisors))
        for d, x in zip(divisors[::16], near[::16], strict=True):
            up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))
            check(kernels, runs(x, up, down), np.array([d], np.float32))


def test_ties_between_subnormal_quotients(kernels: Any) -> None:
    """x / d = (k + 1/2) * 2**-149: of small dividends a corrected product would miss these."""
    kernels.configure(0, races=False)
    rng = np.random.default_rng(18)
    for d in (6, 10, 12, 96, 1000, 1536, 3072, 24576, 43690, 49152, 65534):
        most = 2**24 // (d // (d & -d))  # so that dividends have 24 bits
        odd = 2.0 * rng.integers(0, most // 2, 1000) + 1
        check(kernels, runs(np.sort(d // 2 * odd * 2.0**-149)), np.array([d], np.float32))


@pytest.mark.parametrize("d", [1, 2, 3, 5, 6, 7, 8, 11, 13, 49, 96, 100, 255, 333, 1023, 1025, 3000,
                               4097, 21845, 32767, 43691, 65521, 65535])  # fmt: skip
def test_every_count_of_votes(kernels: Any, d: int) -> None:
    kernels.configure(0, races=False)
    check(kernels, runs(np.arange(d + 1)), np.array([d], np.float32), counts=True)


def test_every_significand(kernels: Any) -> None:
    """All 2**23 of them, for divisors whose reciprocals are rounded worst."""
    kernels.configure(0, races=False)
    errors = np.abs((1 / DIVISORS).astype(np.float64) * DIVISORS - 1)
    significands = np.arange(2**23, 2**24, dtype=np.float32)
    check(kernels, significands, DIVISORS[[np.argmax(errors)]], counts=True)
