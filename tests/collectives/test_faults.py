"""Ranks that disagree, stall, die or talk nonsense: every rank raises, in time, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_faults as cases
import torch.distributed as dist
from ranks import World, Worlds

from pydist.transport.failures import Failures, Report

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

SLACK = 4.0  # seconds beyond a timeout, on a machine that others use too


# --------------------------------------------------------------------------- disagreement

DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "numel": ({}, {"n": 65}, ["numel is 64", "65"]),
    "empty": ({}, {"n": 0}, ["numel is 64", "0"]),
    "dtype": ({}, {"dtype": "bfloat16"}, ['dtype is "torch.float32"', '"torch.bfloat16"']),
    "op": ({}, {"op": "sum"}, ['op is "vote"', '"sum"']),
    "ties": ({}, {"ties": "zero"}, ['ties is "hash"', '"zero"']),
    "seed": ({}, {"seed": 7}, ["seed is 0", "7"]),
    "step": ({}, {"step": 2}, ["step is 1", "2"]),
    "counter": ({}, {"step": None}, ["step is 1"]),
    "algorithm": (
        {"algorithm": "two_phase"},
        {"algorithm": "all_gather"},
        ['algorithm is "two_phase"', '"all_gather"'],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_difference(worlds: Worlds, name: str, ranks: int) -> None:
    usual, other, values = DIFFERENCES[name]
    who = ranks - 1
    for kind, message in worlds(ranks).run(cases.differs, who, usual, other):
        assert kind == "MismatchError", message
        usual_ranks = "rank 0" if ranks == 2 else "ranks 0, 1"
        for part in [*values, f"on {usual_ranks}", f"on rank {who}"]:
            assert part in message, f"{part!r} is not in {message!r}"


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "op": ({"op": "max"}, "ValueError", "op must be one of vote, mean, sum, got 'max'"),
    "ties": ({"ties": "odd"}, "ValueError", "ties must be one of"),
    "seed": ({"seed": -1}, "ValueError", "seed must be in [0, 2**32), got -1"),
    "step": ({"step": -1}, "ValueError", "step must be in [0, 2**63), got -1"),
    "algorithm": ({"algorithm": "ring"}, "ValueError", "algorithm must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_on_one_rank(worlds: Worlds, name: str) -> None:
    other, kind, message = WRONG[name]
    results = worlds(3).run(cases.differs, 1, {}, other)
    assert results[1][0] == kind and message in results[1][1], results[1]
    for rank in (0, 2):
        assert results[rank][0] == "PydistError" and f"rank 1: {message}" in results[rank][1]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("int64", "TypeError", "tensor must be float32, float16 or bfloat16, got torch.int64"),
        ("sparse", "TypeError", "tensor must be dense, got layout torch.sparse_coo"),
        ("meta", "ValueError", "tensor must be on cpu or cuda, got meta"),
        ("list", "TypeError", "tensor must be a torch.Tensor, got list"),
        ("expanded", "ValueError", "tensor"),
    ],
)
def test_bad_tensor_on_one_rank(worlds: Worlds, kind: str, error: str, message: str) -> None:
    results = worlds(3).run(cases.bad_tensor, 2, kind)
    assert results[2][0] == error and message in results[2][1], results[2]
    for rank in (0, 1):
        assert results[rank][0] == "PydistError" and f"rank 2: {message}" in results[rank][1]


def test_one_of_eight_differs(worlds: Worlds) -> None:
    for results in worlds(3).run(cases.one_of_eight_differs):
        assert [kind for kind, _ in results] == [""] * 3 + ["MismatchError"] + [""] * 4
        assert "numel is 50 on ranks 0, 2 and 51 on rank 1" in results[3][1]


def test_optimizer_against_all_reduce(worlds: Worlds) -> None:
    for kind, message in worlds(3).run(cases.optimizer_against_all_reduce):
        assert kind == "MismatchError", message
        assert 'call is "all_reduce" on rank 0' in message
        assert '"DistributedLion.step" on ranks 1, 2' in message


@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_of_numpy(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.numbers_of_numpy)


# --------------------------------------------------------------------------- malformed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WIRE_VERSION", 7, "rank 0: header of rank 1: wire version 7, expected 2"),
        ("MAGIC", b"Ping", "rank 0: header of rank 1: magic b'Ping', expected b'PDst'"),
    ],
)
def test_other_wire_version(worlds: Worlds, name: str, value: Any, message: str) -> None:
    for kind, text in worlds(3).run(cases.other_version, name, value):
        assert kind == "PydistError" and message in text, text


@pytest.mark.parametrize("algorithm", ["two_phase", "all_gather"])
def test_malformed_message(worlds: Worlds, algorithm: str) -> None:
    results = worlds(3).run(cases.malformed_payload_header, algorithm)
    for rank, (first, second, took) in enumerate(results):
        assert first[0] == "PydistError" and second[0] == "PydistError", (first, second)
        if rank != 1:
            assert "malformed message from rank 1" in first[1], first
        assert took < cases.SHORT + SLACK


# --------------------------------------------------------------------------- lost ranks


@pytest.mark.parametrize("in_flight", [1, 8])
def test_stalled_rank(worlds: Worlds, in_flight: int) -> None:
    for rank, (results, again, took, took_again) in enumerate(
        worlds(3).run(cases.stalls, 1, in_flight)
    ):
        assert {kind for kind, _ in results} == {"PydistError"}, results
        assert rank == 1 or "no sign of rank 1 within 3 s" in results[0][1], results[0]
        assert took < cases.SHORT + SLACK, f"rank {rank} waited {took:.1f} s"
        assert again[0] == "PydistError" and took_again < 1, (again, took_again)
        assert "an earlier call on this process group failed" in again[1]


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("Timed out waiting 3000ms for recv operation to complete", "no sign of rank 5 within 3 s"),
        ("Application timeout caused pair closure", "no sign of rank 5 within 3 s"),
        ("Connection closed by peer", "rank 5 was lost: the connection ended"),
    ],
)
def test_who_is_lost(link: str, said: str) -> None:
    """Gloo tells only one of a rank's waits that its time is over; the other links just end."""
    store = dist.HashStore()
    ranks = [Failures(store, "group", [3, 5, 7], place, timeout=3) for place in range(3)]
    ranks[2].publish(Report(link="Connection closed by peer"))
    assert ranks[0].explain(Report(link=link)) == said


@pytest.mark.parametrize("n", [1000, 3_000_000], ids=["small", "chunks"])
def test_killed_rank(n: int) -> None:
    world = World(3)
    try:
        for kind, message, took, took_again in world.run(cases.killed_in_a_loop, 2, n, lost=2):
            assert kind == "PydistError" and "rank 2 was lost" in message, message
            assert took < cases.SHORT + SLACK and took_again < 1, (took, took_again)
    finally:
        world.kill()


def test_rank_killed_in_a_step() -> None:
    world = World(2)
    try:
        for kind, _, took in world.run(cases.killed_in_a_step, 0, lost=0):
            assert kind == "PydistError" and took < cases.SHORT + SLACK
    finally:
        world.kill()
