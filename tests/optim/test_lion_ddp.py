"""DistributedLion attached to DDP equals the plain path; misuse and disagreement raise."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_attached as cases
import torch
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

MANY = {"bucket_cap_mb": 0.001}  # many buckets, rebuilt in another order after the first step


def assert_equal_replicas(results: list[list[bytes]]) -> None:
    assert all(result == results[0] for result in results), "replicas differ"


# --------------------------------------------------------------------------- attached == plain


@pytest.mark.parametrize(
    ("kind", "options", "ddp_options"),
    [
        ("plain", {}, {}),
        ("plain", {"seed": 8}, MANY),
        ("plain", {"aggregate": "average"}, {**MANY, "gradient_as_bucket_view": True}),
        ("plain", {"ties": "zero"}, {**MANY, "static_graph": True}),
        ("plain", {"exact_skip": True}, {**MANY, "find_unused_parameters": True}),
        ("plain", {"binarization_range": 0.01}, MANY),
        ("accumulate", {"momentum_dtype": torch.bfloat16}, MANY),
        ("accumulate", {}, {**MANY, "gradient_as_bucket_view": True}),
        ("branches", {}, {**MANY, "find_unused_parameters": True}),
        ("branches", {"exact_skip": True}, {"find_unused_parameters": True}),
        ("branches", {}, {**MANY, "find_unused_parameters": True, "gradient_as_bucket_view": True}),
        ("strided", {"aggregate": "average"}, MANY),
        ("strided", {}, {"gradient_as_bucket_view": True}),
        ("not_finite", {}, MANY),
        ("not_finite", {"exact_skip": True}, MANY),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_attached_equals_plain(
    worlds: Worlds, ranks: int, kind: str, options: dict[str, Any], ddp_options: dict[str, Any]
) -> None:
    args = (options, ddp_options, kind)
    assert_equal_replicas(worlds(ranks).run(cases.attached_equals_plain, *args))


def test_attached_alone(worlds: Worlds) -> None:
    worlds(1).run(cases.attached_equals_plain, {}, MANY, "plain")


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("exact", [False, True], ids=["usual", "exact_skip"])
def test_not_finite_keeps_momenta(worlds: Worlds, exact: bool, attach: bool) -> None:
    assert_equal_replicas(worlds(2).run(cases.not_finite_keeps_momenta, exact, attach))


# --------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("how", ["clip", "replaced", "scaler", "scaler_unscale"])
def test_gradients_changed_while_attached(worlds: Worlds, how: str) -> None:
    for kind, message in worlds(2).run(cases.changed_gradients, how):
        assert kind == "RuntimeError" and "Use the plain path: do not call attach()" in message
        scaled = how.startswith("scaler")
        wanted = "called by a GradScaler" if scaled else "the gradient of 'module.0.weight'"
        assert wanted in message, message


def test_misuse_of_attach(worlds: Worlds) -> None:
    for results in worlds(2).run(cases.twice):
        wanted = [
            ("RuntimeError", "attach() was called before"),
            ("RuntimeError", "another DistributedLion is attached to it: call its detach() first"),
            ("RuntimeError", "register_comm_hook"),
            ("ValueError", "parameters that the optimizer does not have"),
            ("TypeError", "ddp must be a DistributedDataParallel, got Sequential"),
            ("RuntimeError", "step() without votes"),
            ("PydistError", "was voted on before and step() was not called"),
        ]
        for (kind, message), (wanted_kind, part) in zip(results, wanted, strict=True):
            assert kind == wanted_kind and part in message, (kind, message)
        assert "ddp.no_sync()" in results[-1][1]


def test_equal_gradients_warn_once(worlds: Worlds) -> None:
    for averaged, local, no_sync in worlds(2).run(cases.plain_use_of_ddp):
        assert len(averaged) == 1 and "ddp.no_sync()" in averaged[0]
        assert not local and not no_sync
    assert worlds(1).run(cases.plain_use_of_ddp) == [[[], [], []]]


# --------------------------------------------------------------------------- disagreement


def test_other_buckets(worlds: Worlds) -> None:
    for kind, message in worlds(3).run(cases.other_buckets):
        assert kind == "MismatchError" and "on rank 1" in message, message


MODELS = {
    "shape": ("MismatchError", "parameter 0 is", "[4, 6]"),
    "strides": ("MismatchError", "parameter 0 is", "[1, 4]"),
    "dtype": ("MismatchError", "parameter 1 is", "torch.float16"),
    "float64": ("PydistError", "rank 1: params must be float32", "torch.float64"),
    "number": ("MismatchError", "parameters is 2 on ranks 0, 2 and 1 on rank 1", "parameter 1"),
    "name": ("MismatchError", "parameter 1 is", "'c'"),
    "none": ("PydistError", "rank 1: optimizer got an empty parameter list", ""),
    "aggregate": ("MismatchError", 'aggregate is "majority" on ranks 0, 2', '"average" on rank 1'),
    "ties": ("MismatchError", 'ties is "hash" on ranks 0, 2', '"zero" on rank 1'),
    "seed": ("MismatchError", "seed is 0 on ranks 0, 2 and 1 on rank 1", ""),
    "momentum_dtype": ("MismatchError", "momentum_dtype is", "torch.bfloat16"),
    "binarization_range": ("MismatchError", "binarization_range is null on ranks 0, 2", "1.0"),
    "wrong_aggregate": ("PydistError", "rank 1: aggregate must be one of", "'mode'"),
    "wrong_lr": ("PydistError", "rank 1: lr must be from 0 to 3.4028235e+38, got -1.0", ""),
}


@pytest.mark.parametrize("what", MODELS)
def test_other_model(worlds: Worlds, what: str) -> None:
    kind, *parts = MODELS[what]
    results = worlds(3).run(cases.other_model, what)
    for rank, (raised, message) in enumerate(results):
        if rank == 1 and kind == "PydistError":  # its own mistake, as it is
            assert raised in ("TypeError", "ValueError"), (raised, message)
            assert parts[0].removeprefix("rank 1: ") in message
        else:
            assert raised == kind, (raised, message)
            assert all(part in message for part in parts), message


@pytest.mark.parametrize(("size", "dtype"), [(4, "float32"), (3, "float64")])
def test_other_added_group(worlds: Worlds, size: int, dtype: str) -> None:
    for rank, (kind, message) in enumerate(worlds(2).run(cases.other_added_group, size, dtype)):
        if dtype == "float32":
            assert kind == "MismatchError" and "[3]" in message and "[4]" in message
        else:
            assert kind == ("TypeError" if rank else "PydistError"), message
            assert "params must be float32, float16 or bfloat16, got torch.float64" in message


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("lr", "param_groups[0].lr is 0.01 on ranks 0, 2 and 0.02 on rank 1"),
        ("betas", "param_groups[0].betas is [0.9, 0.99] on ranks 0, 2 and [0.8, 0.99] on rank 1"),
        ("weight_decay", "param_groups[0].weight_decay is 0.0 on ranks 0, 2 and 0.1 on rank 1"),
        ("step", "step is 0 on ranks 0, 2 and 5 on rank 1"),
        ("bad_lr", "rank 1: param_groups[0]: lr must be from 0 to 3.4028235e+38, got nan"),
        (
            "bad_betas",
            "rank 1: param_groups[0]: betas must be two numbers in [0, 1), got (1.5, 0.9)",
        ),
    ],
)
def test_other_setting_in_a_step(worlds: Worlds, what: str, part: str, attach: bool) -> None:
    for kind, message in worlds(3).run(cases.other_setting_in_a_step, what, attach):
        assert kind == ("PydistError" if what.startswith("bad") else "MismatchError"), message
        assert part in message, message


@pytest.mark.parametrize("scaled", [False, True])
def test_sparse_gradient_on_one_rank(worlds: Worlds, scaled: bool) -> None:
    for kind, message in worlds(3).run(cases.sparse_gradient, scaled):
        assert kind == "PydistError", (kind, message)
        assert "rank 1: gradient of 'weight' is sparse" in message, message


def test_sparse_gradient_while_attached(worlds: Worlds) -> None:
    for kind, message in worlds(2).run(cases.sparse_gradient_attached):
        assert kind == "PydistError", (kind, message)
        assert "rank 0: gradient of '0.weight' is sparse" in message, message
