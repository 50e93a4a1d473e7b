"""The 1-bit optimizers on real ranks equal an independent simulation to the bit."""

from __future__ import annotations

from typing import Any

import cases_onebit as cases
import pytest
import torch
from ranks import Worlds

import pydist

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

EVENTS = {
    "missing": [(1, 0, "matrix"), (4, 0, "vector"), (5, 0, "one"), (5, 1, "one"), (5, 2, "one"),
                (5, 3, "one"), (6, 1, "transposed")],
    "bad": [(2, 1, "vector"), (5, 0, "scalar")],
}  # fmt: skip
USUAL: dict[str, dict[str, Any]] = {"adam": {"warmup_steps": 3}}
OPTIONS: dict[str, dict[str, Any]] = {
    "two_phase": {"algorithm": "two_phase"},
    "all_gather": {"algorithm": "all_gather", "codec": pydist.Sign("l2", block=32)},
    "papers": {"bias_correction": False, "algorithm": "two_phase", "codec": pydist.BlockInt(4)},
}


def assert_equal_replicas(results: list[list[bytes]]) -> None:
    assert all(result == results[0] for result in results), "replicas differ"


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_simulation(worlds: Worlds, ranks: int, option: str, kind: str) -> None:
    options = {**USUAL[kind], **OPTIONS[option]}
    assert_equal_replicas(worlds(ranks).run(cases.equals_oracle, kind, options, EVENTS))
