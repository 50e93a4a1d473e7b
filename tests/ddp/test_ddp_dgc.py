"""Momentum, clipping and schedules of the DDP hook, over real ranks: equal to the specification."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import ranks_ddp as cases
import ranks_ddp_dgc as more
import ranks_ddp_state as cases_state
import torch
import torch.distributed.checkpoint as dcp
from ranks import RankFailure, Worlds
from ranks_ddp_checkpoint import resumed
from test_collectives import same_on_all_ranks

import pydist
from pydist import QSGD, BlockInt, Raw, Sign, TopK
from pydist.ddp import Schedule
from pydist.training.advice import BucketSize, advise

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

DGC: dict[str, Any] = {"momentum": 0.9, "clip_norm": 0.01}
OWNERS: dict[str, Any] = {"algorithm": "two_phase"}
DENSITIES = Schedule(
    [(0, TopK(0.25, block=64)), (2, TopK(0.0625, block=64)), (3, TopK(0.03, block=96))]
)
BITS = Schedule(
    [
        (0, {"*.bias": Sign("l1"), "*": QSGD(8, block=128)}),
        (2, BlockInt(4, block=32)),
        (3, None),
        (4, QSGD(2, block=32)),
        (5, {"left.*": TopK(0.1, block=32), "*": Sign("l2", block=64)}),
    ]
)
TO_RAW = Schedule([(0, TopK(0.1, block=32)), (2, Raw("bfloat16"))])
# Codec, dtype, mode, options, chunk, steps.
MOMENTUM: list[tuple[Any, ...]] = [
    ("topk", "float32", "many", DGC | OWNERS, 700),
    ("topk16", "bfloat16", "plain", DGC, None),
    ("sparse", "float16", "unused", {"momentum": 0.5, "residual_dtype": torch.bfloat16}, None),
    ("mixed", "float32", "no_sync", {"momentum": 0.9, "exact_skip": True}, 700),
    ("coded", "bfloat16", "static", {"momentum": 0.8} | OWNERS, None),
    ("topk_long", "float32", "view", {"clip_norm": 0.002, "op": "sum"}, None),
    ("raw16", "float32", "huge", {"momentum": 0.9, "warmup_steps": 1}, None),
]
SCHEDULES: list[tuple[Any, ...]] = [
    (DENSITIES, "float32", "many", DGC | OWNERS, 700, 5),
    (DENSITIES, "bfloat16", "unused", {"exact_skip": True} | OWNERS, None, 5),
    (BITS, "float32", "plain", {"momentum": 0.9} | OWNERS, None, 7),
    (BITS, "float16", "view", OWNERS, None, 7),
    (TO_RAW, "float32", "plain", OWNERS, 700, 4),
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_momentum_conforms(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.conforms, MOMENTUM, timeout=120))


def test_raw_momentum_is_not_rounded(worlds: Worlds) -> None:
    """Only what is stored has the residuals' type."""
    options = {"momentum": 0.9, "residual_dtype": torch.bfloat16} | OWNERS
    worlds(1).run(cases.conforms, [(c, "float32", "plain", options, None) for c in ({}, TO_RAW)])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_schedules_conform(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.conforms, SCHEDULES, timeout=120))


def test_any_buckets(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(3).run(more.any_buckets))


# --------------------------------------------------------------------------- not finite, scales


@pytest.mark.parametrize("exact", [False, True], ids=["usual", "exact_skip"])
def test_not_finite(worlds: Worlds, exact: bool) -> None:
    for codec in (more.TOPK, more.STAGES):
        same_on_all_ranks(worlds(3).run(cases_state.skipped, exact, codec, more.DGC))


@pytest.mark.parametrize(
    ("local_after", "grouped", "options"),
    [(None, False, {}), (None, False, {"exact_skip": True}), (3, False, {}), (3, True, {})],
    ids=["schedule", "exact_skip", "local", "subgroup"],
)
def test_released_beside_a_nan(
    worlds: Worlds, local_after: int | None, grouped: bool, options: dict[str, Any]
) -> None:
    """A residual that was to be sent with a NaN is sent with the next gradients instead."""
    results = worlds(2).run(more.released, local_after, grouped, options)
    for name, gradient in results[0][1].items():
        entering = [bare[name] + left.get(name, 0.0) for _, bare, left in results]
        assert not torch.equal(entering[1], results[1][1][name]) or gradient.numel() < 100
        mean = (entering[0] + entering[1]) / 2
        local = local_after is not None and not grouped
        for rank, (got, _, _) in enumerate(results):
            assert torch.equal(got[name], entering[rank] if local else mean), (rank, name)


@pytest.mark.parametrize("how", ["scaler", "rescale"])
def test_momenta_and_clipping_follow_the_loss_scale(worlds: Worlds, how: str) -> None:
    same_on_all_ranks(worlds(2).run(cases_state.scaled, how, more.DGC))


# --------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("how", ["file", "dcp"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_resume(worlds: Worlds, tmp_path: Path, ranks: int, how: str) -> None:
    options = more.DGC | {"codec": more.STAGES}
    same_on_all_ranks(worlds(ranks).run(resumed, str(tmp_path), how, options))


def test_other_world(worlds: Worlds) -> None:
    """Every new rank takes the mean of the old ranks' momenta."""
    saved = worlds(2).run(more.to_other_world, None)
    for momenta in worlds(3).run(more.to_other_world, saved):
        for name, found in momenta.items():
            old = [one["parameters"][name]["momentum"] for one in saved]
            assert found.any() and torch.equal(found, (old[0] + old[1]) / 2), name


def test_loss_scales_that_differ(worlds: Worlds, tmp_path: Path) -> None:
    """In local steps each rank has its own loss scale: what ranks share has rank 0's unit."""
    saved = worlds(2).run(more.loaded, None)
    for one in saved:
        one["scale"] = 8.0
    unlike = copy.deepcopy(saved)  # the same, but rank 1 had other scales: powers of two
    unlike[1]["scale"], unlike[1]["rescaled"] = 2.0, 64.0
    for entry in unlike[1]["parameters"].values():
        for kept in ("residual", "owner", "momentum"):
            if kept in entry:
                entry[kept] *= 16.0
    for folder in ("", str(tmp_path)):  # files, and a distributed checkpoint
        for found, wanted in zip(worlds(2).run(more.loaded, unlike, folder), unlike, strict=True):
            same_state(found, wanted)
        wanted = worlds(1).run(more.loaded, saved)[0]
        same_state(worlds(1).run(more.loaded, unlike, folder)[0], wanted)
    unlike[1]["step"] = 4
    with pytest.raises(RankFailure, match="saved at different moments: step is 3 on rank 0"):
        worlds(1).run(more.loaded, unlike)


def same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    scalars = ("step", "scale", "rescaled")
    assert [found[x] for x in scalars] == [wanted[x] for x in scalars]
    for name, entry in wanted["parameters"].items():
        for kept, values in entry.items():
            if isinstance(values, torch.Tensor):
                assert torch.equal(found["parameters"][name][kept], values), (name, kept)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_checkpoint_without_residuals(worlds: Worlds, tmp_path: Path, momentum: float) -> None:
    assert worlds(1).run(more.without_residuals, str(tmp_path), momentum) == [[1]]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_of_others(tmp_path: Path) -> None:
    dcp.save({"loss_scales": torch.ones(3), "momentum/x": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="holds no state of pydist"):
        pydist.ddp.saved_world_size(str(tmp_path))


def test_without_momentum(worlds: Worlds) -> None:
    for kind, message in worlds(1).run(more.without_momentum):
        assert kind == "ValueError" and "momentum is 0.0 here" in message, message


def test_own_scale(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(more.own_scale))


# --------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("codec", "codec is"),
        ("momentum", "momentum is 0.9 on ranks 0, 2 and 0.5 on rank 1"),
        ("clip_norm", "clip_norm is null on ranks 0, 2 and 1.0 on rank 1"),
    ],
)
def test_other_options(worlds: Worlds, what: str, part: str) -> None:
    for kind, message in worlds(3).run(more.other, what):
        assert kind == "MismatchError" and part in message, message


def test_refused_step(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(more.refused_step))


def test_refused_after_other_buckets(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(more.refused_late))


def test_misuse(worlds: Worlds) -> None:
    parts = [
        "momentum must be at least 0 and below 1, got 1.0", "momentum must be", "clip_norm must be",
        "local_after must not be negative, got -1", "local_after needs op='mean', got 'sum'",
        "local_after excludes exact_skip", "subgroup is used after local_after", "got int",
        "error_every must not be negative, got -2",
    ]  # fmt: skip
    for found in worlds(1).run(more.misuse):
        for (kind, message), part in zip(found, parts, strict=True):
            assert kind in ("ValueError", "TypeError") and part in message, (kind, message)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must not be empty"),
        ([(1, None)], "stages must begin with step 0, got 1"),
        ([(0, None), (0, QSGD(4))], r"stages\[1\] must begin after step 0, got 0"),
        ([QSGD(4)], r"stages\[0\] must be a pair"),
        ([(0, BITS)], r"the codec of stages\[0\] must not be a Schedule"),
    ],
)
def test_wrong_schedule(stages: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Schedule(stages)


# --------------------------------------------------------------------------- post-local SGD


def test_post_local(worlds: Worlds) -> None:
    """As torch's own hook, on two ranks and on two pairs."""
    same_on_all_ranks(worlds(2).run(more.post_local, None, 2, 5))
    pairs = worlds(4).run(more.post_local, [[0, 1], [2, 3]], 0, 4)
    assert pairs[0] == pairs[1] and pairs[2] == pairs[3] and pairs[0] != pairs[2]


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "subgroup"])
def test_clipping_in_local_steps(worlds: Worlds, grouped: bool) -> None:
    worlds(2).run(more.clipped_local, grouped)


def test_into_local_steps(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(3).run(more.into_local))


# --------------------------------------------------------------------------- observation


@pytest.mark.parametrize("every", [1, 3, 0])
def test_compression_error(worlds: Worlds, every: int) -> None:
    """Norms are float32 in pieces: five digits are right."""
    for found, wanted in worlds(2).run(more.measured, every):
        for step, (error, when) in enumerate(found):
            if every == 0:
                assert math.isnan(error) and when == -1
                continue
            assert when == step - step % every
            assert error == pytest.approx(wanted[when], rel=1e-5)


KIB = 1024


@pytest.mark.parametrize(
    ("sizes", "verdict", "cap"),
    [
        # Eight-fold compression: 16 MB a step are 2 MiB of payload, four buckets of one chunk.
        ([(1024 * KIB, 128 * KIB, 3)] * 16, "larger", 4.0),
        ([(4096 * KIB, 512 * KIB, 3)] * 4, "keep", 4.0),
        ([(16384 * KIB, 2048 * KIB, 3)], "smaller", 4.0),
        # One parameter alone: no cap makes its bucket smaller.
        ([(16384 * KIB, 2048 * KIB, 1)], "keep", 4.0),
        # A hundredfold: a chunk would be the whole model, so it is a quarter of it.
        ([(1024 * KIB, 10 * KIB, 3)] * 100, "larger", 25.0),
        # Little data: rather one bucket than round trips.
        ([(80 * KIB, 10 * KIB, 3)] * 5, "larger", 0.39),
        ([], "unknown", 0.0),
    ],
)
def test_advice(sizes: list[tuple[int, int, int]], verdict: str, cap: float) -> None:
    advice = advise([BucketSize(*size) for size in sizes])
    assert (advice.verdict, advice.bucket_cap_mb) == (verdict, cap)
    assert advice.buckets == len(sizes)


def test_advice_of_a_state(worlds: Worlds) -> None:
    for advice in worlds(2).run(more.advised):
        assert advice.verdict == "larger" and advice.buckets == 5, advice
        assert 0 < advice.bucket_cap_mb <= 0.02 and "try" in str(advice), advice
