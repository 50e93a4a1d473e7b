"""Sharded models in other people's ways of working: copies, readers, experts, damage."""

from __future__ import annotations

import pytest
import ranks_fsdp_faults as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]
both = pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])


@both
def test_readers_change_nothing(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.read_meanwhile, kind)


@both
def test_copies_go_on(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.copied, kind)


def test_damaged_states(worlds: Worlds) -> None:
    worlds(2).run(cases.damaged_states, 30)


@pytest.mark.soak
def test_many_damaged_states(worlds: Worlds) -> None:
    worlds(2).run(cases.damaged_states, 500)


@both
def test_damage_is_dropped_and_named(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.poisoned, kind)


def test_experts(worlds: Worlds) -> None:
    worlds(2).run(cases.experts)


def test_wrappers(worlds: Worlds) -> None:
    worlds(2).run(cases.wrapped)


@pytest.mark.parametrize(
    ("what", "mine", "theirs"),
    [
        ("keyword", "unexpected keyword argument 'min_nummel'", "rank 1"),
        ("model", "no part of it was given to", "rank 1"),
        ("seed", "seed is 0 on rank 0 and 5 on rank 1", "seed is 0 on rank 0 and 5 on rank 1"),
    ],
)
def test_wrong_on_one_rank(worlds: Worlds, what: str, mine: str, theirs: str) -> None:
    for rank, (kind, message) in enumerate(worlds(2).run(cases.one_rank_wrong, what)):
        assert kind and (mine if rank == 1 else theirs) in message, (rank, kind, message)
