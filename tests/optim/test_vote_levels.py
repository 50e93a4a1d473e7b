"""Votes on two levels give the bits of one level, plain and attached, and send less."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_vote_levels as cases
import torch
from ranks import Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

CASES: list[tuple[str, dict[str, Any], str, bool, int | None]] = [
    ("lion", {}, "float32", False, None),
    ("lion", {"ties": "zero", "algorithm": "two_phase"}, "bfloat16", False, 40),
    ("lion", {"aggregate": "average", "algorithm": "two_phase"}, "float32", False, None),
    ("lion", {"exact_skip": True, "momentum_dtype": torch.bfloat16}, "float16", False, None),
    ("lion", {"algorithm": "all_gather", "aggregate": "average"}, "float32", True, None),
    ("signum", {"ties": "positive", "algorithm": "two_phase"}, "float32", True, 40),
    ("sign_sgd", {"ties": "zero"}, "bfloat16", True, None),
]


@pytest.mark.parametrize("local", [2, 4])
def test_equals_one_level(worlds: Worlds, local: int) -> None:
    listed = CASES[:: 3 if local == 4 else 1]
    found = worlds(4).run(cases.equals_one_level, local, listed, timeout=120)
    weights = [[result[0] for result in results] for results in found]
    same_on_all_ranks(weights)


@pytest.mark.soak
@pytest.mark.parametrize("local", [2, 3])
def test_equals_one_level_of_six(worlds: Worlds, local: int) -> None:
    worlds(6).run(cases.equals_one_level, local, CASES, timeout=170)


def test_sends_less(worlds: Worlds) -> None:
    """Two of two: 2 bits of counts for half the elements, and 1 bit of results for half of them.

    Of 200,400 elements: 2 * 100,200 / 8 / 2 to the other node, and 100,200 / 8 / 2 back. On one
    level a rank sends 3 of 4 quarters of 25,050 bytes twice; 2 of 3 leave the node.
    """
    for flat, across in worlds(4).run(cases.sends_less, 2):
        assert flat == pytest.approx(2 * 0.75 * 25_050, rel=0.01)
        assert across == pytest.approx(0.75 * 25_050, rel=0.01)


def test_only_one_has_a_mesh(worlds: Worlds) -> None:
    for kind, message in worlds(4).run(cases.only_one_has_a_mesh):
        assert kind == "MismatchError" and "mesh is" in message, f"{kind}: {message}"


@pytest.mark.parametrize("who", [0, 3])
def test_differs(worlds: Worlds, who: int) -> None:
    words = ("lr", "levels must be 'votes'", "mesh: ", "mesh must be a DeviceMesh")
    for rank, found in enumerate(worlds(4).run(cases.differs, who)):
        for (kind, message), expected in zip(found, words, strict=True):
            assert expected in message or "form a grid" in message, f"rank {rank}: {kind} {message}"
