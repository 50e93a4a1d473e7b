"""FSDP2 with compressed gradients and weights: like plain FSDP2, like the specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks_fsdp as cases
import ranks_fsdp1 as cases1
import ranks_fsdp_recipes as recipes
import ranks_fsdp_state as states
from ranks import Worlds
from torch.distributed.fsdp._fully_shard import _fsdp_common

from pydist import QSGD, BlockFloat, BlockInt, Sign, Ternary, TopK

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
        (2, TopK(0.1, block=96), BlockInt(8, block=96), True, "usual"),
        (3, TopK(0.02, block=32, values="bfloat16"), QSGD(8, block=64), True, "bfloat16"),
        (2, TopK(0.05, block=256, values="float16"), BlockInt(8), "auto", "offload"),
        (2, QSGD(4, block=64, entropy="elias"), BlockInt(8, block=96), False, "sum"),
        (3, QSGD(3, block=96, entropy="elias"), BlockInt(8), True, "bfloat16"),
        (2, Ternary(), BlockInt(8, block=96), False, "sum"),
        (3, Ternary(None), QSGD(8, block=64), False, "bfloat16"),
        (2, Ternary(1.5), BlockInt(8), False, "offload"),
    ],
)  # fmt: skip
def test_equals_reference(
    worlds: Worlds, ranks: int, gradients: Any, parameters: Any, feedback: Any, kind: str
) -> None:
    args = (gradients, parameters, feedback, kind)
    assert_equal_replicas(worlds(ranks).run(cases.equals_reference, *args))


# --------------------------------------------------------------------------- bytes, weights, NaN


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_as_predicted(worlds: Worlds, ranks: int) -> None:
    sent = worlds(ranks).run(states.bytes_as_predicted)
    assert all(one == sent[0] for one in sent)


def test_all_ranks_compute_with_the_same_weights(worlds: Worlds) -> None:
    assert_equal_replicas(worlds(4).run(states.equal_weights))


@pytest.mark.parametrize(
    ("codec", "feedback"),
    [
        (BlockInt(4), True), (TopK(0.1, block=64), True), (Ternary(), False),
        (QSGD(4, block=64, entropy="elias"), True),
    ],
)  # fmt: skip
def test_not_finite(worlds: Worlds, codec: Any, feedback: bool) -> None:
    assert_equal_replicas(worlds(2).run(states.not_finite, codec, feedback))


# --------------------------------------------------------------------------- checkpoints


def test_resumes_to_the_bit(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(states.resumes, str(tmp_path))


def test_as_torchtitan_writes_it(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(recipes.as_torchtitan, str(tmp_path))


def test_takes_over_from_another_world(worlds: Worlds) -> None:
    saved = worlds(4).run(states.residuals_of)
    worlds(2).run(states.takes_over, saved)


# --------------------------------------------------------------------------- what goes past


PAST = {
    "dtypes": ("parameters", {"parameters of several dtypes travel as bytes": 2}),
    "double": ("gradients", {"codecs do not take torch.float64": 6}),
    "smaller_mesh": ("parameters", {"resharded over other ranks after forward": 6}),
    "unwatched": ("gradients", {"cannot tell which parameters the buffer holds": 6}),
}


@pytest.mark.parametrize("kind", PAST)
def test_past_pydist(worlds: Worlds, kind: str) -> None:
    direction, reasons = PAST[kind]
    for stats in worlds(4 if kind == "smaller_mesh" else 2).run(states.past_pydist, kind):
        calls = {reason: entry["calls"] for reason, entry in stats[direction].items()}
        assert calls == reasons, stats
        assert all(entry["bytes"] > 0 for entry in stats[direction].values())
        if kind == "unwatched":
            assert not stats["parameters"]


# --------------------------------------------------------------------------- errors


def test_disagreement(worlds: Worlds) -> None:
    for how, wanted in (("codec", "QSGD(bits=4"), ("gradients", "parameters is")):
        for kind, message in worlds(2).run(states.disagreement, how):
            assert kind == "MismatchError" and wanted in message, message
            assert "on rank 0" in message and "on rank 1" in message, message


def test_misuse(worlds: Worlds) -> None:
    wanted = [
        ("ValueError", "gradients, parameters, across: at least one must be a codec"),
        ("TypeError", "codec must be a pydist codec, got str"),
        ("ValueError", "no part of it was given to torch.distributed.fsdp.fully_shard, got a Net"),
        ("ValueError", "signs without a magnitude"),
        ("ValueError", "error_feedback=True needs a codec for gradients"),
        ("ValueError", "seed"),
        ("ValueError", "compress was not called on it"),
        ("ValueError", "pydist.fsdp.compress(model, codec, error_feedback=True)"),
        ("ValueError", "error_feedback=False: TopK(density=0.001"),
        ("ValueError", "rounds at random to one level for a whole layer"),
        ("ValueError", "parameters=TopK(density=0.5"),
        ("ValueError", "is compressed already with other arguments; call pydist.fsdp.restore"),
    ]
    for results in worlds(2).run(states.misuse):
        for (kind, message), (type_name, text) in zip(results, wanted, strict=True):
            assert kind == type_name and text in message, (kind, message, text)


def test_several_meshes(worlds: Worlds) -> None:
    if not hasattr(_fsdp_common, "ShardPlacementResult"):
        pytest.skip("this torch has one mesh a module")
    for kind, message in worlds(4).run(states.several_meshes):
        assert kind == "ValueError" and "has 2 parameter groups" in message, message


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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("ranks", "codec", "feedback"),
    [
        (2, QSGD(4, block=64), False), (3, QSGD(3, block=32), True),
        (4, Sign("l1", block=64), True), (3, TopK(0.1, block=64), True),
        (2, QSGD(4, block=64, entropy="elias"), False), (3, Ternary(), False),
    ],
)  # fmt: skip
def test_fsdp1_equals_reference(worlds: Worlds, ranks: int, codec: Any, feedback: bool) -> None:
    assert_equal_replicas(worlds(ranks).run(cases1.equals_reference, codec, feedback))


@pytest.mark.parametrize(
    ("codec", "strategy"),
    [
        (BlockInt(8, block=64), "FULL_SHARD"),
        (QSGD(4, block=64), "NO_SHARD"),
        (QSGD(4, block=64, entropy="elias"), "NO_SHARD"),
        (Ternary(), "NO_SHARD"),
    ],
)
def test_fsdp1_hook_equals_flat(worlds: Worlds, codec: Any, strategy: str) -> None:
    assert_equal_replicas(worlds(2).run(cases1.hook_equals_flat, codec, strategy))


# --------------------------------------------------------------------------- replicas of a model


def test_across_equals_plain(worlds: Worlds) -> None:
    assert_equal_replicas(worlds(4).run(cases.across_equals_plain))


@pytest.mark.parametrize(
    ("codec", "inside"),
    [(QSGD(4, block=64), None), (BlockInt(8, block=32), BlockInt(8)), (Sign("l1", block=96), None)],
)
def test_across_equals_reference(worlds: Worlds, codec: Any, inside: Any) -> None:
    assert_equal_replicas(worlds(4).run(cases.across_equals_reference, codec, inside))
