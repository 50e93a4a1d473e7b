"""Distributed Lion as a vote of the replicas of each shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks_fsdp_lion as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("ranks", "inside", "options", "low"),
    [
        (4, 2, {}, False),
        (4, 2, {"aggregate": "average", "exact_skip": True}, True),
        (4, 4, {"ties": "zero"}, False),
        (3, 1, {"binarization_range": 0.5, "seed": 7}, False),
    ],
)
def test_equals_reference(
    worlds: Worlds, ranks: int, inside: int, options: dict[str, Any], low: bool
) -> None:
    results = worlds(ranks).run(
        cases.equals_reference, inside, {"exact_skip": True, **options}, low
    )
    assert all(result == results[0] for result in results), "replicas differ"


def test_other_shards_are_no_replicas(worlds: Worlds) -> None:
    for kind, message in worlds(4).run(cases.other_shards_are_no_replicas):
        assert kind == "MismatchError" and "shard of parameter" in message, message


def test_strided_shards_are_no_replicas(worlds: Worlds) -> None:
    for kind, message in worlds(4).run(cases.strided_shards_are_no_replicas):
        assert kind == "MismatchError" and "shard of parameter" in message, message


def test_partial_gradients(worlds: Worlds) -> None:
    worlds(4).run(cases.partial_gradients)


def test_one_bit_optimizers_take_no_shards(worlds: Worlds) -> None:
    for kind, message in worlds(4).run(cases.refused_by_others):
        assert kind == "TypeError" and "got DTensor" in message, message


def test_one_shard_fails(worlds: Worlds) -> None:
    results = worlds(4).run(cases.one_shard_fails)
    for rank in (1, 3):
        assert results[rank][0] == "MismatchError" and "param_groups[0].lr" in results[rank][1]
    for rank in (0, 2):
        assert results[rank][0] == "PydistError" and "another shard" in results[rank][1]


def test_resume(worlds: Worlds, tmp_path: Path) -> None:
    worlds(4).run(cases.resume, str(tmp_path))
