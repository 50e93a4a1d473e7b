"""DistributedLion on real ranks: the plain path is bit-identical to an independent simulation."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_lion as cases
import torch
from ranks import World, Worlds

from pydist import _C
from pydist.optim import DistributedLion

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


def assert_equal_replicas(results: list[list[bytes]]) -> None:
    assert all(result == results[0] for result in results), "replicas differ"


# --------------------------------------------------------------------------- bit for bit

RULES: dict[str, dict[str, Any]] = {
    "hash": {"ties": "hash", "seed": 5},
    "zero": {"ties": "zero"},
    "positive": {"ties": "positive", "algorithm": "two_phase"},
    "average": {"aggregate": "average", "algorithm": "two_phase"},
    "average_gathered": {"aggregate": "average", "algorithm": "all_gather"},
    "stochastic": {"binarization_range": 0.8, "seed": 9},
    "exact_skip": {"exact_skip": True},
}
EVENTS = {
    "missing": [(1, 0, "matrix"), (2, 0, "vector"), (3, 0, "one"), (3, 1, "one"), (3, 2, "one"),
                (4, 1, "channels_last"), (4, 1, "transposed")],
    "bad": [(2, 1, "vector", "nan"), (4, 0, "transposed", "inf"), (4, 1, "block", "-inf")],
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_simulation(worlds: Worlds, ranks: int, rule: str) -> None:
    other = {"groups": True, **EVENTS}
    assert_equal_replicas(worlds(ranks).run(cases.equals_oracle, RULES[rule], other))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
def test_equals_simulation_of_half_precision(
    worlds: Worlds, dtype: str, momentum_dtype: str
) -> None:
    for aggregate in ("majority", "average"):
        options = {"aggregate": aggregate, "momentum_dtype": momentum_dtype}
        other = {"dtype": dtype, "strided": True, **EVENTS}
        assert_equal_replicas(worlds(3).run(cases.equals_oracle, options, other))


@pytest.mark.parametrize("rule", ["hash", "exact_skip"])
def test_parameter_that_no_rank_used(worlds: Worlds, rule: str) -> None:
    """It keeps value and momentum; that of one rank alone moves everywhere."""
    missing = [(s, w, n) for s in (1, 2, 3) for w in (0, 1) for n in ("vector", "matrix", "block")]
    missing += [(s, 0, "one") for s in (1, 2, 3)]
    other = {"missing": missing, "bad": [(2, 1, "channels_last", "nan")]}
    assert_equal_replicas(worlds(2).run(cases.equals_oracle, RULES[rule], other))


def test_no_rank_has_any_gradient(worlds: Worlds) -> None:
    missing = [(s, w, n) for s in (0, 3) for w in (0, 1) for n in cases.NAMES]
    assert_equal_replicas(worlds(2).run(cases.equals_oracle, {}, {"missing": missing}))


# --------------------------------------------------------------------------- as any optimizer


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {"aggregate": "average"}),
        ("float32", {"momentum_dtype": torch.bfloat16, "exact_skip": True}),
        ("bfloat16", {"binarization_range": 0.5, "seed": 3}),
    ],
    ids=["float32", "bfloat16", "bfloat16_momentum", "stochastic"],
)
def test_resume(worlds: Worlds, dtype: str, options: dict[str, Any]) -> None:
    worlds(2).run(cases.resume, dtype, options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_schedulers(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.schedulers)


@pytest.mark.parametrize("ranks", [1, 3])
def test_closure_and_tensor_as_learning_rate(worlds: Worlds, ranks: int) -> None:
    assert_equal_replicas(worlds(ranks).run(cases.closure_and_tensor_lr))


@pytest.mark.parametrize("ranks", [1, 2])
def test_add_param_group(worlds: Worlds, ranks: int) -> None:
    assert_equal_replicas(worlds(ranks).run(cases.added_group))


def test_frozen_parameters(worlds: Worlds) -> None:
    worlds(2).run(cases.frozen)


@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("exact_skip", [True, False], ids=["exact", "plain"])
def test_grad_scaler(worlds: Worlds, unscale: bool, exact_skip: bool) -> None:
    assert_equal_replicas(worlds(3).run(cases.scaler, unscale, exact_skip))


def test_clipping(worlds: Worlds) -> None:
    assert_equal_replicas(worlds(2).run(cases.clipped))


def test_mixed_instruction_sets() -> None:
    isas = _C.supported_isas()
    wanted = [isas[i % len(isas)] for i in range(3)]
    world = World(3, env=[{"PYDIST_ISA": isa} for isa in wanted])
    try:
        for aggregate in ("majority", "average"):
            results = world.run(cases.mixed_instruction_sets, aggregate)
            assert [isa for isa, _ in results] == wanted
            assert_equal_replicas([params for _, params in results])
    finally:
        world.close()


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="no process group"):
        DistributedLion([torch.nn.Parameter(torch.ones(3))])
