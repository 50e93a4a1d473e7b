"""Agreements that no call waits for: a difference is raised all the same, on every rank."""

from __future__ import annotations

import pytest
import ranks_behind as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]


def test_equal_calls(worlds: Worlds) -> None:
    worlds(3).run(cases.equal_calls)


def test_a_difference_is_raised_by_the_next_call(worlds: Worlds) -> None:
    for text in worlds(3).run(cases.a_difference):
        assert text == "call: ranks disagree: numel is 7 on ranks 0, 2 and 8 on rank 1"


def test_a_problem_is_raised_on_every_rank(worlds: Worlds) -> None:
    for text in worlds(3).run(cases.a_problem):
        assert text == "call: rank 1: no memory"


def test_public_collectives_agree_first(worlds: Worlds) -> None:
    worlds(2).run(cases.one_behind)
