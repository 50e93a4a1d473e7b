"""Sums of plain values are bit-identical to their reference: instruction sets, types, places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doors import DOOR_GROUPS, Door

from pydist import ops
from pydist.formats import wire
from pydist.selfcheck import raw as cases
from pydist.selfcheck import store


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1871)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
def test_every_pair_of_types(
    door: Door, rng: np.random.Generator, special: bool, mean: bool
) -> None:
    for source in door.storages:
        for storage in door.storages:
            for n in (0, 1, 31, 33, 1001):
                for ranks in (1, 3):
                    values = cases.some_rows(rng, ranks, n, source, special=special)  # type: ignore[arg-type]
                    cases.check_sum_values(door, values, mean=mean, storage=storage)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, rng: np.random.Generator, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("torch has no such tensors")
    for source in door.storages:
        for n in (1, 33, 2049):
            values = cases.some_rows(rng, 2, n, source, special=True)  # type: ignore[arg-type]
            cases.check_sum_values(
                door.using(layout=layout), values, mean=True, storage=door.storages[n % 2]
            )  # type: ignore[arg-type]


@pytest.mark.parametrize("group", DOOR_GROUPS)
def test_large_arrays_with_one_thread_and_several(group: list[tuple[str, str]]) -> None:
    values = np.random.default_rng(2).standard_normal((2, 2**18 + 77)).astype(np.float32)
    for kind, isa in group:
        for threads in (1, 3):
            door = Door(kind, isa, "dense", threads)
            cases.check_sum_values(door, values, mean=False, storage="float32")
    for place in (0, 2**17 - 1, 2**17, 2**18 + 76):  # in every task of the thread pool
        bad = values.copy()
        bad[1, place] = np.inf
        for kind, isa in group:
            _, flags = Door(kind, isa, threads=3).sum_values(bad, mean=False, storage="float32")
            assert flags == wire.FLAG_NON_FINITE, f"infinity at {place} on {kind} {isa}"


def test_finite_sum_beyond_the_range_of_storage_raises_the_flag(door: Door) -> None:
    """65519 is the last that float16 rounds to a finite number; alone or as a sum."""
    for top, flags in ((65519.0, 0), (65520.0, 1)):
        row = np.array([[1, 2, top, 3]], dtype=np.float32)
        for values in (row, np.concatenate([row - 1, np.ones_like(row)])):
            assert door.sum_values(values, mean=False, storage="float16")[1] == flags, values
    assert door.sum_values(row, mean=False, storage="float32")[1] == 0


def test_order_of_ranks_decides(door: Door) -> None:
    """1e8 + 1 - 1e8 is 0 from left to right, and 1 in another order."""
    values = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    assert door.sum_values(values, mean=False, storage="float32")[0] == 0
    assert door.sum_values(values[[0, 2, 1]], mean=False, storage="float32")[0] == 1


def test_negative_zero_and_subnormals_stay(door: Door) -> None:
    values = np.array([[-0.0, 1e-45, -1e-40]], dtype=np.float32)
    out, _ = door.sum_values(values, mean=False, storage="float32")
    assert out.tobytes() == values.tobytes()
    twice, _ = door.sum_values(values.repeat(2, 0), mean=False, storage="float32")
    assert twice.tobytes() == (2 * values[0]).tobytes()


def test_flushing_threads_keep_subnormals() -> None:
    x = torch.full((1, 100), 1e-40)
    torch.set_flush_denormal(True)
    try:
        out = ops.sum_values(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, x[0])


def test_store_is_what_the_kernel_does(rng: np.random.Generator) -> None:
    """One rank's sum is a cast."""
    x = cases.some_rows(rng, 1, 999, "float32", special=True)
    out = ops.sum_values(torch.from_numpy(x), dtype=torch.bfloat16)
    assert out.view(torch.uint16).numpy().tobytes() == store(x[0], "bfloat16").tobytes()
