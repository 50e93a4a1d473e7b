"""pydist.all_reduce over real ranks: the specification's bits, any order, any group."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_collectives as cases
import torch
from ranks import World, Worlds

import pydist
from pydist.transport.exchange import CHUNK_BYTES

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

DTYPES = ["float32", "float16", "bfloat16"]


def same_on_all_ranks(results: list[list[bytes]]) -> None:
    for rank, result in enumerate(results[1:], start=1):
        differing = [i for i, (a, b) in enumerate(zip(results[0], result, strict=True)) if a != b]
        assert not differing, f"ranks 0 and {rank} differ in results {differing[:5]}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_reference(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.equals_reference, [0, 1, 33, 1001], DTYPES, None))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_reference_in_many_chunks(worlds: Worlds, ranks: int) -> None:
    # 53 words a chunk: no multiple of the ranks, and more chunks than may be in flight.
    args = ([1001, 15_003], ["float32"], 53)
    same_on_all_ranks(worlds(ranks).run(cases.equals_reference, *args))


@pytest.mark.parametrize("ranks", [3])
def test_equals_reference_beyond_one_chunk(worlds: Worlds, ranks: int) -> None:
    args = ([CHUNK_BYTES * 8 + 4097], ["float32"], None)
    same_on_all_ranks(worlds(ranks).run(cases.equals_reference, *args, timeout=120))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_shape_and_stride(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.shapes))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_step_counter(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.step_counter)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_not_finite_on_one_rank_is_nan_on_all(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.not_finite)
    worlds(ranks).run(cases.not_finite_in_last_chunk)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_eight_in_flight_waited_in_reverse(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.waited_in_reverse)


def test_wait_has_a_timeout(worlds: Worlds) -> None:
    waited = worlds(3).run(cases.wait_has_a_timeout)
    assert max(waited) < 1.2


@pytest.mark.parametrize("with_groups", [False, True], ids=["world", "pairs_too"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_order_trap(worlds: Worlds, ranks: int, with_groups: bool) -> None:
    worlds(ranks).run(cases.order_trap, 20, 0.004, with_groups)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [3, 4])
def test_order_trap_for_long(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.order_trap, 2000, 0.004, True, timeout=1700)


def test_disjoint_subgroups(worlds: Worlds) -> None:
    worlds(4).run(cases.disjoint_subgroups)


def test_subgroup_then_larger_group(worlds: Worlds) -> None:
    worlds(4).run(cases.subgroup_then_larger)


@pytest.mark.parametrize("wait", [True, False], ids=["waited", "in_flight"])
def test_destroyed_group_leaves_no_threads(worlds: Worlds, wait: bool) -> None:
    worlds(3).run(cases.destroyed_group, wait)


@pytest.mark.parametrize("destroy", [True, False], ids=["destroyed", "not_destroyed"])
def test_exit_without_waiting(destroy: bool, tmp_path: Path) -> None:
    world = World(2, destroy=destroy)
    world.run(cases.started_again, str(tmp_path / "store"))
    world.run(cases.left_in_flight)
    world.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_finished_calls_keep_no_tensors(worlds: Worlds, ranks: int) -> None:
    assert worlds(ranks).run(cases.keeps_no_tensors) == [0] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_traffic(worlds: Worlds, ranks: int) -> None:
    """(n - 1) / n of a payload in either phase, plus a header a message."""
    n = 32 * 12 * 100
    share = (ranks - 1) * (n // 8 // ranks + 16)
    ends = (ranks - 1) * 16
    expected = {"agreement": ends, "phase 1": share, "phase 2": share, "confirmation": ends}
    assert worlds(ranks).run(cases.traffic, n) == [expected] * ranks


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match=r"group=None: no process group; .*init_process_group"):
        pydist.all_reduce(torch.ones(3), pydist.Sign(scale=None))
