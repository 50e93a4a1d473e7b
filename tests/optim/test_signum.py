"""SignSGD and Signum on real ranks are bit-identical to an independent simulation."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_signum as cases
import torch
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

BETAS = pytest.mark.parametrize("beta", [None, 0.9], ids=["signsgd", "signum"])
EVENTS = {
    "missing": [(1, 0, "matrix"), (3, 0, "one"), (3, 1, "one"), (3, 2, "one"), (3, 3, "one"),
                (2, 1, "block"), (4, 1, "transposed")],
    "bad": [(2, 1, "vector")],
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "hash": {"seed": 5},
    "zero": {"ties": "zero", "algorithm": "two_phase"},
    "average": {"aggregate": "average", "algorithm": "two_phase"},
}


@BETAS
@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_simulation(worlds: Worlds, ranks: int, rule: str, beta: float | None) -> None:
    results = worlds(ranks).run(cases.equals_oracle, beta, OPTIONS[rule], EVENTS)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(worlds: Worlds, dtype: str) -> None:
    other = {"dtype": dtype, **EVENTS}
    options: dict[str, Any] = {"momentum_dtype": torch.bfloat16, "exact_skip": True}
    worlds(3).run(cases.equals_oracle, 0.75, options, other)
    worlds(3).run(cases.equals_oracle, None, {"ties": "positive"}, other)


@BETAS
def test_attached_equals_plain_and_resumes(worlds: Worlds, beta: float | None) -> None:
    results = worlds(2).run(cases.attached, beta)
    assert results[0] == results[1]


@BETAS
def test_disagreement_raises_everywhere(worlds: Worlds, beta: float | None) -> None:
    for texts in worlds(2).run(cases.disagree, beta):
        for text, wanted in zip(texts, ["seed", "lr must be", "SignSGD", "lr is 0.1"], strict=True):
            assert wanted in text
