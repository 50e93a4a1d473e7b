"""The 1-bit optimizers on real ranks are bit-identical to an independent simulation."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_onebit as cases
from ranks import Worlds

import pydist

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

# Steps, ranks, parameters. "transposed" is used by nobody in step 6.
MISSING = [(1, 0, "matrix"), (4, 0, "vector"), *[(6, rank, "transposed") for rank in range(4)],
           (6, 1, "channels_last")]  # fmt: skip
BAD = [(2, 1, "vector"), (5, 0, "scalar")]
EVENTS: dict[str, dict[str, Any]] = {
    "adam": {"missing": MISSING, "bad": BAD},
    "lamb": {"missing": MISSING, "bad": BAD},
    # Syncs in steps 4 to 6 and 8, and because that one fails in step 9; then in step 13. Between
    # them a bad gradient concerns one rank alone.
    "zero_one": {
        "missing": [*MISSING, (11, 0, "block")], "steps": 14, "skipped": 3,
        "bad": [*BAD, (8, 1, "vector"), (7, 0, "matrix"), (11, 0, "vector")],
    },
}  # fmt: skip
USUAL: dict[str, dict[str, Any]] = {
    "adam": {"warmup_steps": 3},
    "lamb": {"warmup_steps": 3},
    "zero_one": {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 3,
                 "local_step_clipper": 4, "lrs": [0.0] + [0.01] * 9 + [0.0] + [0.02] * 3},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "two_phase": {"algorithm": "two_phase"},
    "all_gather": {"algorithm": "all_gather", "codec": pydist.Sign("l1", block=32)},
    "papers": {"bias_correction": False, "algorithm": "two_phase", "codec": pydist.BlockInt(4)},
}


def assert_equal_replicas(results: list[list[bytes]]) -> None:
    assert all(result == results[0] for result in results), "replicas differ"


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_simulation(worlds: Worlds, ranks: int, option: str, kind: str) -> None:
    options = {**USUAL[kind], **OPTIONS[option]}
    assert_equal_replicas(worlds(ranks).run(cases.equals_oracle, kind, options, EVENTS[kind]))


def test_many_chunks(worlds: Worlds) -> None:
    """A parameter that does not fit into a message, and a small one."""
    options = {"warmup_steps": 2, "codec": pydist.BlockInt(8, block=65536)}
    other = {"shapes": {"vector": (2**20 + 3,), "matrix": (7, 5)}, "steps": 4}
    assert_equal_replicas(worlds(2).run(cases.equals_oracle, "adam", options, other))
