"""Damaged state of optimizers: mended with a warning, or refused by name, on every rank."""

from __future__ import annotations

import pytest
import ranks_optim_checkpoints as checkpoints
import ranks_optim_damage as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

KIND = pytest.mark.parametrize("kind", checkpoints.KINDS)

# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("kind", "key"),
    [("lion", "momentum"), ("adam", "residual"), ("zero_one", "residual")],
)
def test_own_state_is_mended(worlds: Worlds, kind: str, key: str) -> None:
    results = worlds(2).run(cases.poisoned, kind, key)
    assert all(raised == ("", "") for raised, _, _ in results), results
    _, messages, stats = results[0]
    assert any(f"{key} of '2.weight' were not finite" in one for one in messages), messages
    assert stats["dropped_elements"] == 1 and stats["skipped_steps"] >= 1, stats


@pytest.mark.parametrize(("kind", "key"), [("adam", "exp_avg"), ("lamb", "exp_avg_sq")])
def test_common_state_is_refused(worlds: Worlds, kind: str, key: str) -> None:
    for (error, text), _, _ in worlds(2).run(cases.poisoned, kind, key):
        assert error and "'2.weight'" in text, (error, text)


@pytest.mark.parametrize("kind", ["lion", "adam"])
def test_standing_still(worlds: Worlds, kind: str) -> None:
    for error, text in worlds(2).run(cases.standing_still, kind):
        assert error and "100 steps in a row were skipped" in text, (error, text)


@pytest.mark.parametrize("kind", ["lion", "lion_exact", "adam", "lamb", "zero_one"])
def test_damaged_memory(worlds: Worlds, kind: str) -> None:
    for raised in worlds(2).run(cases.damaged_memory, kind):
        for name, (error, text) in raised.items():
            if name == "gone" and kind.startswith("lion"):
                assert not error, (name, error, text)  # a momentum may begin anew
            else:
                assert error and "2.weight" in text, (name, error, text)


@KIND
def test_damaged_states(worlds: Worlds, kind: str) -> None:
    for counts in worlds(2).run(cases.damaged_states, kind, 12, 1):
        assert counts["refused"] >= 3, counts


@pytest.mark.soak
@KIND
def test_many_damaged_states(worlds: Worlds, kind: str) -> None:
    for counts in worlds(2).run(cases.damaged_states, kind, 80, 2):
        assert counts["refused"] >= 20 and counts["loaded"] >= 1, counts
