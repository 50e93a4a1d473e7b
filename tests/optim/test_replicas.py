"""Parameters that have become different on a rank are found, and named on every rank."""

from __future__ import annotations

import pytest
import ranks_replicas as cases
from ranks import Worlds

pytestmark = pytest.mark.multiprocess


def test_by_hand(worlds: Worlds) -> None:
    for answer in worlds(3).run(cases.by_hand, 1):
        for message, name in zip(answer, ("0.weight", "1.bias", "packed"), strict=False):
            assert f"checksum of the values of {name} is " in message, message
            assert "on ranks 0, 2 and " in message and "on rank 1" in message, message
        assert "parameters is 3 on ranks 0, 2 and 2 on rank 1" in answer[3]


@pytest.mark.parametrize(
    ("every", "named", "step"), [(1, True, 4), (3, True, 6), (3, False, 6), (0, True, -1)]
)
def test_hook(worlds: Worlds, every: int, named: bool, step: int) -> None:
    for found, message in worlds(2).run(cases.hook, 1, every, named):
        assert found == step
        if every:
            name = "2.weight" if named else "parameter"
            assert f"checksum of the values of {name}" in message and "on rank 1" in message


@pytest.mark.parametrize("kind", cases.OPTIMIZERS)
def test_optimizers(worlds: Worlds, kind: str) -> None:
    for found, message in worlds(2).run(cases.optimizer, 1, kind, 5, False):
        # 0/1 Adam talks to nobody in local steps: at the next sync.
        assert found == 5 or (kind == "zero_one_adam" and 5 <= found <= 9), (found, message)
        assert "checksum of the values of '2.weight' is " in message, message


def test_attached(worlds: Worlds) -> None:
    for found, message in worlds(2).run(cases.optimizer, 1, "lion", 5, True):
        assert found == 5 and "checksum of the values of '2.weight' is " in message, message


def test_equal_replicas_are_left_alone(worlds: Worlds) -> None:
    for kind in cases.OPTIMIZERS:
        for found, _ in worlds(2).run(cases.optimizer, -1, kind, 1, False):
            assert found == -1


def test_wrong_arguments(worlds: Worlds) -> None:
    (found,) = worlds(1).run(cases.wrong_arguments)
    assert len(found) == 6 and all("replica_check_every" in message for message in found), found
