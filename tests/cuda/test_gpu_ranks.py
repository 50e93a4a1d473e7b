"""Ranks with tensors on a CUDA device, all on device 0: gloo, and NCCL where it allows that."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_attached
import ranks_collectives
import ranks_gpu
import ranks_lion
from devices import on_cuda, on_each_device, with_messages
from ranks import Worlds

# The first call of a rank loads torch's CUDA libraries, several ranks at once.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]
SLOW_START = 120


def run(worlds: Worlds, ranks: int, case: Any, *args: Any) -> list[Any]:
    return worlds(ranks).run(case, *args, timeout=SLOW_START)


def assert_equal_replicas(results: list[Any]) -> None:
    assert all(result == results[0] for result in results), "replicas differ"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@on_each_device
def test_votes_equal_the_reference(worlds: Worlds, device: str, ranks: int) -> None:
    args = ([0, 33, 10_007], ["float32", "bfloat16"], 64, device)
    assert_equal_replicas(run(worlds, ranks, ranks_collectives.equals_reference, *args))


@pytest.mark.parametrize("rule", [{"seed": 5}, {"aggregate": "average"}, {"exact_skip": True},
                                  {"binarization_range": 0.8, "seed": 9}])  # fmt: skip
@on_each_device
def test_distributed_lion_equals_the_simulation(
    worlds: Worlds, device: str, rule: dict[str, Any]
) -> None:
    events = {"bad": [(2, 1, "vector", "nan")], "missing": [(1, 0, "matrix")]}
    other = {"device": device, "groups": True, "steps": 4, **events}
    assert_equal_replicas(run(worlds, 2, ranks_lion.equals_oracle, rule, other))


@with_messages
def test_distributed_lion_equals_that_of_the_cpu(
    worlds: Worlds, device: str, on_device: bool
) -> None:
    run(worlds, 2, ranks_gpu.lion_equals_cpu, device, on_device)


@pytest.mark.parametrize("kind", ["plain", "accumulate"])
@on_each_device
def test_attached_equals_plain(worlds: Worlds, device: str, kind: str) -> None:
    buckets = {"bucket_cap_mb": 0.001}
    case = ranks_attached.attached_equals_plain
    assert_equal_replicas(run(worlds, 2, case, {}, buckets, kind, device))


@pytest.mark.parametrize("unscale", [False, True])
@on_each_device
def test_gradient_scaler(worlds: Worlds, device: str, unscale: bool) -> None:
    assert_equal_replicas(run(worlds, 2, ranks_lion.scaler, unscale, True, device))


@on_cuda
def test_nccl_with_one_rank(worlds: Worlds, device: str) -> None:
    assert run(worlds, 1, ranks_gpu.over_nccl) == [""]


@on_cuda
def test_nccl_with_two_ranks_on_one_device(worlds: Worlds, device: str) -> None:
    """NCCL refuses two ranks on one device; should a later one allow it, they are tested."""
    refused = run(worlds, 2, ranks_gpu.over_nccl)
    worlds(2).kill()  # its communicator is broken
    if any(refused):
        pytest.skip(f"NCCL refuses: {refused[0]}")
