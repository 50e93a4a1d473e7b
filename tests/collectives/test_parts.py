"""Reduce-scatter and all-gather on two levels over real ranks: the simulated bits, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_parts as cases
import torch
from ranks import Worlds
from test_collectives import same_on_all_ranks

from pydist import QSGD, BlockInt, Raw, Sign, Ternary, TopK, simulate

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

MANY = [QSGD(4), QSGD(2, block=64, entropy="elias"), Ternary(), TopK(0.1, block=64), Sign(None)]
GRIDS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2)]  # ranks, ranks of a node
ALL_GRIDS = [
    grid if grid == (4, 2) else pytest.param(*grid, marks=pytest.mark.soak) for grid in GRIDS
]


def sizes_of(ranks: int) -> list[int]:
    return [0, 1001] if ranks == 4 else [257]


@pytest.mark.parametrize(("ranks", "local"), ALL_GRIDS)
def test_gathers_equal_one_level(worlds: Worlds, ranks: int, local: int) -> None:
    args = (local, sizes_of(ranks))
    same_on_all_ranks(worlds(ranks).run(cases.gathers_equal_one_level, *args))


@pytest.mark.parametrize(("ranks", "local"), ALL_GRIDS)
def test_scatters_equal_simulation(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.scatters_equal_simulation, local, sizes_of(ranks))


def test_in_many_chunks(worlds: Worlds) -> None:
    args = (2, [3001], 2000, MANY)
    same_on_all_ranks(worlds(4).run(cases.gathers_equal_one_level, *args))
    worlds(4).run(cases.scatters_equal_simulation, *args)


@pytest.mark.parametrize(("ranks", "local"), [(3, 3), (4, 2), (4, 1)])
def test_is_the_flat_call_of_node_sums(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.is_the_flat_call_of_node_sums, local)


@pytest.mark.parametrize("local", [1, 2, 4])
def test_in_place_and_counted(worlds: Worlds, local: int) -> None:
    worlds(4).run(cases.in_place_and_counted, local)


@pytest.mark.parametrize(("ranks", "local"), [pytest.param(2, 1, marks=pytest.mark.soak), (4, 2)])
def test_not_finite_on_one_rank_is_nan_on_all(worlds: Worlds, ranks: int, local: int) -> None:
    worlds(ranks).run(cases.not_finite, local)


@pytest.mark.parametrize(("ranks", "local"), [(4, 2), (3, 3)])
def test_traffic(worlds: Worlds, ranks: int, local: int) -> None:
    """Across, 1 / local of the encoded bytes; inside, plain values, or what came from across."""
    n, nodes, head = 64 * 30, ranks // local, 16
    code, agreed = n // 64 * (64 + 4), {"agreement": head, "confirmation": head}
    flags = (local - 1) * head
    sent = {
        "across": (nodes - 1) * (code + head), "scattered": (local - 1) * (4 * nodes * n + head),
        "gathered": (local - 1) * (nodes * code + head),
    }  # fmt: skip
    for scatter, gather in worlds(ranks).run(cases.traffic, local, n):
        for found, inside in ((scatter, sent["scattered"]), (gather, sent["gathered"])):
            across = {name: (nodes - 1) * size for name, size in agreed.items()}
            both = {name: 2 * (local - 1) * size for name, size in agreed.items()}
            wanted = across | {"phase 1": sent["across"]}, both | {"phase 1": inside + flags}
            assert found["across"] == {k: v for k, v in wanted[0].items() if v}
            assert found["inside"] == wanted[1]


# --------------------------------------------------------------------------- errors

DIFFERENCES: dict[str, tuple[list[int], dict[str, Any], str]] = {
    "codec of a rank": ([3], {"codec": QSGD(5)}, "codec is"),
    "codec of a node": ([2, 3], {"codec": BlockInt(4)}, "codec is"),
    "codec of a column": ([1, 3], {"codec": QSGD(5)}, "codec is"),
    "length of a node": ([0, 1], {"n": 65}, "numel is"),
    "step of a rank": ([0], {"step": 2}, "step is 2 on rank 0"),
    "a wrong argument of one rank": ([1], {"seed": -1}, "seed must be"),
    "another call on a rank": ([2], {"kind": "all_reduce"}, "all_reduce"),
    "another call on a column": ([0, 2], {"kind": "all_reduce"}, "all_reduce"),
}


@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(worlds: Worlds, name: str, kind: str) -> None:
    who, change, words = DIFFERENCES[name]
    for rank, (error, message) in enumerate(worlds(4).run(cases.differs, kind, who, change)):
        expected = ("MismatchError", "PydistError", "ValueError")
        assert error in expected and words in message, f"rank {rank}: {error}: {message}"


def test_codecs_inside_differ(worlds: Worlds) -> None:
    args = ("reduce_scatter", [2, 3], {"inner": BlockInt(8)})
    for error, message in worlds(4).run(cases.differs, *args):
        assert error in ("MismatchError", "PydistError") and "inner is" in message


# --------------------------------------------------------------------------- without ranks


def test_wrong_simulations() -> None:
    inputs = [torch.ones(8)] * 4
    for nodes in (0, -1, 3, 5):
        with pytest.raises(ValueError, match=rf"nodes={nodes} cannot share 4 inputs evenly"):
            simulate.reduce_scatter(inputs, QSGD(4), nodes=nodes)
    with pytest.raises(ValueError, match="inner=Raw.* needs nodes"):
        simulate.reduce_scatter(inputs, QSGD(4), inner=Raw())
    with pytest.raises(TypeError, match="codec must be"):
        simulate.reduce_scatter(inputs, "x", nodes=2)  # type: ignore[arg-type]


def test_places_draw_apart() -> None:
    """Equal parts of a node's ranks: each is rounded with draws of its own."""
    part = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    shares = simulate.reduce_scatter([part.repeat(4)] * 4, QSGD(2), nodes=2)
    assert len({share.numpy().tobytes() for share in shares}) == 4
