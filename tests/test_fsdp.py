"""FSDP2 with compressed gradients and weights: like plain FSDP2, like the specification."""

from __future__ import annotations

from typing import Any

import cases_fsdp as cases
import cases_fsdp1 as cases1
import pytest
from ranks import Worlds

from pydist import QSGD, BlockFloat, BlockInt, Sign

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


def assert_equal_replicas(results: list[list[bytes]]) -> None:
    assert all(result == results[0] for result in results), "ranks differ"


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "usual"), (2, "kept"), (2, "columns"), (2, "bfloat16"), (2, "bfloat16_reduce"),
        (2, "float16"), (2, "offload"), (2, "accumulate"), (2, "sides"), (2, "unused"), (2, "sum"),
        (2, "prefetch"), (2, "checkpointed"), (2, "grouped"), (2, "double"), (4, "hybrid"),
    ],
)  # fmt: skip
def test_lossless_is_plain(worlds: Worlds, ranks: int, kind: str) -> None:
    assert_equal_replicas(worlds(ranks).run(cases.equals_plain, kind, False))


@pytest.mark.parametrize("kind", ["usual", "columns", "accumulate", "sides", "smaller_mesh"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_lossless_is_plain_with_exact_sums(worlds: Worlds, ranks: int, kind: str) -> None:
    """Gloo adds in another order than pydist, so these sums must be exact."""
    if kind == "smaller_mesh" and ranks == 3:
        pytest.skip("the smaller mesh has 2 ranks")
    assert_equal_replicas(worlds(ranks).run(cases.equals_plain, kind, True))


@pytest.mark.parametrize(
    ("ranks", "gradients", "parameters", "feedback", "kind"),
    [
        (2, QSGD(4, block=64), BlockInt(8, block=96), False, "usual"),
        (2, BlockInt(4, block=32), QSGD(8, block=64), True, "bfloat16"),
        (2, Sign("l1", block=64), BlockFloat(block=32), True, "sum"),
        (3, QSGD(3, block=96), BlockInt(4, block=32, rounding="stochastic"), True, "usual"),
        (3, BlockFloat("e5m2", block=64), BlockInt(5, block=64), False, "bfloat16_float32"),
        (4, Sign("l2", block=32), BlockInt(8), True, "usual"),
    ],
)  # fmt: skip
def test_equals_reference(
    worlds: Worlds, ranks: int, gradients: Any, parameters: Any, feedback: bool, kind: str
) -> None:
    args = (gradients, parameters, feedback, kind)
    assert_equal_replicas(worlds(ranks).run(cases.equals_reference, *args))


# --------------------------------------------------------------------------- FSDP1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("ranks", "strategy", "kind", "how"),
    [
        (2, "FULL_SHARD", "usual", "hook"), (2, "FULL_SHARD", "usual", "compress"),
        (2, "SHARD_GRAD_OP", "bfloat16", "compress"), (2, "NO_SHARD", "usual", "hook"),
        (2, "NO_SHARD", "usual", "compress"), (2, "FULL_SHARD", "bfloat16_reduce", "hook"),
        (2, "FULL_SHARD", "accumulate", "compress"), (2, "FULL_SHARD", "flat", "compress"),
        (2, "NO_SHARD", "bfloat16_reduce", "compress"), (4, "FULL_SHARD", "usual", "compress"),
        (4, "SHARD_GRAD_OP", "flat", "hook"), (4, "NO_SHARD", "usual", "compress"),
    ],
)  # fmt: skip
def test_lossless_is_plain_fsdp1(
    worlds: Worlds, ranks: int, strategy: str, kind: str, how: str
) -> None:
    assert_equal_replicas(worlds(ranks).run(cases1.equals_plain, strategy, kind, how))
