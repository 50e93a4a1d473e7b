"""All-reduce on two levels over real ranks: the simulated bits, or an error on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_hierarchy as cases
import torch
from ranks import World, Worlds
from test_collectives import same_on_all_ranks

from pydist import QSGD, BlockInt, Raw, Sign, simulate
from pydist.collectives.hierarchical import Shares

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

GRIDS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2)]  # ranks, ranks of a node
DTYPES = ["float32", "float16", "bfloat16"]


IN_CI = [(2, 1), (4, 2)]


@pytest.mark.parametrize(
    ("ranks", "local"),
    [grid if grid in IN_CI else pytest.param(*grid, marks=pytest.mark.soak) for grid in GRIDS],
)
def test_equals_simulation(worlds: Worlds, ranks: int, local: int) -> None:
    sizes = [0, 33, 1001] if ranks == 4 else [257]
    same_on_all_ranks(worlds(ranks).run(cases.equals_simulation, local, sizes, DTYPES, None))


def test_equals_simulation_in_many_chunks(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(4).run(cases.equals_simulation, 2, [6_003], ["float32"], 700))


@pytest.mark.parametrize(("ranks", "local"), [(3, 3), (4, 2), (4, 1)])
def test_is_the_flat_call_of_node_sums(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.is_the_flat_call_of_node_sums, local)


@pytest.mark.parametrize(("ranks", "local"), [(3, 1), (4, 2)])
def test_votes(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.votes, local)


@pytest.mark.parametrize("local", [1, 2, 4])
def test_near_the_exact_mean(worlds: Worlds, local: int) -> None:
    worlds(4).run(cases.near_the_exact_mean, local)


def test_mesh_and_shapes(worlds: Worlds) -> None:
    worlds(4).run(cases.mesh_and_shapes, 2)


@pytest.mark.parametrize(("ranks", "local"), [(2, 2), (4, 2)])
def test_not_finite_on_one_rank_is_nan_on_all(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.not_finite, local)


def test_many_calls_in_flight(worlds: Worlds) -> None:
    worlds(4).run(cases.in_flight, 2, 3, 0.005)


@pytest.mark.soak
def test_many_calls_in_flight_for_long(worlds: Worlds) -> None:
    worlds(4).run(cases.in_flight, 2, 60, 0.02, timeout=170)


@pytest.mark.parametrize(("ranks", "local"), [(4, 2), (3, 3)])
def test_traffic(worlds: Worlds, ranks: int, local: int) -> None:
    """Across, 1 / local of the payload's two phases; inside, plain values twice."""
    n, nodes = 64 * 30 * local, ranks // local
    share = n // local
    for sent in worlds(ranks).run(cases.traffic, local, n):
        code = -(-share // 64 // nodes) * (64 + 4) + 16
        assert sent["across"] == 2 * (nodes - 1) * code
        assert sent["inside"] == 2 * (local - 1) * (4 * share + 16)


# --------------------------------------------------------------------------- errors

DIFFERENCES: dict[str, tuple[list[int], dict[str, Any], str]] = {
    "codec of a rank": ([3], {"codec": QSGD(5)}, "codec is"),
    "codec of a node": ([2, 3], {"codec": BlockInt(4)}, "codec is"),
    "codecs inside": ([2, 3], {"inner": BlockInt(8)}, "inner is"),
    "codec of a column": ([1, 3], {"codec": QSGD(5)}, "codec is"),
    "length of a node": ([0, 1], {"n": 65}, "numel is 65 on rank"),
    "step of a rank": ([0], {"step": 2}, "step is 2 on rank 0"),
    "a wrong argument of one rank": ([1], {"op": "max"}, "op must be one of"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(worlds: Worlds, name: str) -> None:
    who, change, words = DIFFERENCES[name]
    for rank, (kind, message) in enumerate(worlds(4).run(cases.differs, 2, who, change)):
        expected = ("MismatchError", "PydistError", "ValueError")
        assert kind in expected and words in message, f"rank {rank}: {kind}: {message}"


@pytest.mark.parametrize(
    "kind",
    [
        "swapped on one rank",
        "swapped on two ranks",
        "one group twice",
        "the world and a node",
        "crosswise",
    ],
)
def test_no_grid(worlds: Worlds, kind: str) -> None:
    for error, message in worlds(4).run(cases.no_grid, kind):
        assert error == "ValueError" and "do not form a grid" in message, message


def test_wrong_arguments(worlds: Worlds) -> None:
    worlds(4).run(cases.wrong)


def test_a_lost_rank_fails_all_nodes() -> None:
    world = World(4)
    try:
        for kind, message in world.run(cases.a_lost_rank, lost=3):
            assert kind == "PydistError", message
    finally:
        world.kill()


# --------------------------------------------------------------------------- without ranks


@pytest.mark.parametrize("unit", [32, 96])
@pytest.mark.parametrize("local", [1, 2, 3, 8])
def test_shares_are_whole_units(local: int, unit: int) -> None:
    for n in (0, 1, 31, 96, 97, 1000, 3 * 96 * 8):
        shares = Shares(n, local, unit)
        lengths = [shares.length(rank) for rank in range(local)]
        assert shares.share % unit == 0 and sum(lengths) == n <= shares.padded
        assert lengths == sorted(lengths, reverse=True)


def test_wrong_simulations() -> None:
    tensors = [torch.ones(5)] * 4
    for nodes in (0, -1, 3, 5):
        with pytest.raises(ValueError, match=rf"nodes={nodes} cannot share 4 tensors evenly"):
            simulate.all_reduce(tensors, QSGD(4), nodes=nodes)
    with pytest.raises(ValueError, match="inner=Raw.* needs nodes"):
        simulate.all_reduce(tensors, QSGD(4), inner=Raw())
    with pytest.raises(TypeError, match="codec must be"):
        simulate.all_reduce(tensors, "x", nodes=2)  # type: ignore[arg-type]


def test_draws_differ_between_nodes() -> None:
    """16 workers with one vector and QSGD inside: the error of their mean falls as it should."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    one = simulate.all_gather([x], QSGD(3))[0] - x
    mean = simulate.all_reduce([x] * 16, Raw(), nodes=8, inner=QSGD(3)) - x
    # Standard deviation falls by 4; draws equal in all nodes would leave half.
    assert float(mean.norm() / one.norm()) < 1 / 3.5


def test_votes_of_simulated_nodes() -> None:
    """Two workers of three outvote nobody: their node has one voice."""
    tensors = [torch.full((4,), v) for v in (1.0, -3.0, 1.0, -3.0, 5.0, 5.0)]
    out = simulate.all_reduce(tensors, Sign(None), op="vote", nodes=3)
    assert bool((out == -1).all())
