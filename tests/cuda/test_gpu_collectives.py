"""Collectives of tensors on a CUDA device, all ranks on device 0, as one process simulates them."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_gpu_collectives as cases
from devices import with_messages
from ranks import Worlds

# The first call of a rank loads torch's CUDA libraries, several ranks at once.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]
SLOW_START = 120


def run(worlds: Worlds, ranks: int, case: Any, *args: Any) -> None:
    results = worlds(ranks).run(case, *args, timeout=SLOW_START)
    assert all(result == results[0] for result in results), "ranks differ"


@pytest.mark.parametrize("case", [cases.every_codec, cases.votes, cases.not_finite,
                                  cases.in_flight])  # fmt: skip
@with_messages
def test_collectives(worlds: Worlds, device: str, on_device: bool, case: Any) -> None:
    for ranks in (2,) if device == "cpu" else (2, 3):
        run(worlds, ranks, case, device, on_device)


@with_messages
def test_two_levels(worlds: Worlds, device: str, on_device: bool) -> None:
    run(worlds, 4, cases.two_levels, device, on_device)
