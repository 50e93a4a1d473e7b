"""The DDP hook's state over real ranks: skipped steps, disagreement, observation."""

from __future__ import annotations

import pytest
import ranks_ddp_state as cases
from ranks import Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_buckets(worlds: Worlds, ranks: int) -> None:
    for codec in (None, cases.SPARSE):
        same_on_all_ranks(worlds(ranks).run(cases.any_buckets, codec))


def test_entropy_changes_no_bit(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(3).run(cases.shortened))


def test_plain_registration(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(cases.plain_registration))


# --------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("exact", [False, True], ids=["usual", "exact_skip"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_not_finite(worlds: Worlds, ranks: int, exact: bool) -> None:
    for codec in (None, cases.SPARSE, cases.TRITS):
        same_on_all_ranks(worlds(ranks).run(cases.skipped, exact, codec))


@pytest.mark.parametrize("how", ["scaler", "rescale"])
def test_residuals_follow_the_loss_scale(worlds: Worlds, how: str) -> None:
    same_on_all_ranks(worlds(2).run(cases.scaled, how))


def test_grad_scaler(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(3).run(cases.grad_scaler))


# --------------------------------------------------------------------------- disagreement


@pytest.mark.parametrize(
    ("what", "kind", "part"),
    [
        ("codec", "MismatchError", "QSGD(bits=4"),
        ("seed", "MismatchError", "seed is 0 on ranks 0, 2 and 1 on rank 1"),
        ("exclude", "MismatchError", "exclude is null on ranks 0, 2"),
        ("invalid", "PydistError", "rank 1: warmup_steps must not be negative, got -1"),
        ("name", "MismatchError", "parameter 0 is"),
    ],
)
def test_other_state(worlds: Worlds, what: str, kind: str, part: str) -> None:
    for rank, (raised, message) in enumerate(worlds(3).run(cases.other_state, what)):
        if what == "invalid" and rank == 1:
            assert (raised, message) == ("ValueError", part.removeprefix("rank 1: "))
        else:
            assert raised == kind and part in message, (raised, message)


@pytest.mark.parametrize("static", [False, True], ids=["usual", "static_graph"])
def test_other_layout(worlds: Worlds, static: bool) -> None:
    for raised, message in worlds(3).run(cases.other_layout, static):
        assert raised == "MismatchError", message
        assert "parameter 2 is" in message and "on rank 1" in message, message
        assert "2.weight" in message and "None" in message, message


def test_fails_on_one_rank(worlds: Worlds) -> None:
    for raised, message in worlds(3).run(cases.fails_on_one_rank):
        assert raised == "PydistError", message
        assert "rank 1: a bucket holds a parameter that named_parameters did not name" in message


def test_after_destruction(worlds: Worlds) -> None:
    for raised, message in worlds(2).run(cases.after_destruction):
        assert raised == "PydistError" and "destroyed" in message, message


def test_misuse(worlds: Worlds) -> None:
    wanted = [
        ("ValueError", "named_parameters must be given"),
        ("ValueError", "ratio must be positive and finite, got 0.0"),
        ("TypeError", "model must be a DistributedDataParallel, got list"),
        ("TypeError", "bucket must be a GradBucket, got tuple"),
    ]
    for found in worlds(1).run(cases.no_names):
        for (kind, message), (wanted_kind, part) in zip(found, wanted, strict=True):
            assert kind == wanted_kind and part in message, (kind, message)


# --------------------------------------------------------------------------- in DDP


@pytest.mark.parametrize("ranks", [2, 3])
def test_join(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.joined))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sparse(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.sparse))


def test_checkpointed_and_compiled(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(cases.composed))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_types_that_codecs_do_not_take(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.odd_types))


def test_observation(worlds: Worlds) -> None:
    ranks = 3
    for warm, all_bytes, ratio in worlds(ranks).run(cases.observed):
        assert warm < all_bytes and ratio > 1
    # 4 bits per element and 4 bytes per block of 64, or float32; a few units of padding a rank.
    compressed, raw = [800, 600], [40, 1200, 30, 20]
    blocks = sum(-(-n // 64) for n in compressed) + 2
    units = sum(-(-n // 32) for n in raw) + 6
    step = 2 * (ranks - 1) * (36 * blocks + 128 * units + 2 * 16) / ranks
    assert (all_bytes - warm) / 2 <= 1.2 * step, (all_bytes, warm, step)
