"""The DDP hook where ranks die, stall, dawdle, disagree and bring NaN; and how it starts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_ddp_faults as cases
from ranks import World, Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


# --------------------------------------------------------------------------- death


@pytest.mark.parametrize(
    ("where", "codec", "destroy"),
    [
        ("backward", "sign", True),
        ("reduce", "topk", False),
        ("decode", "all", True),
        ("backward", "qsgd", False),
    ],
)
def test_killed(worlds: Worlds, tmp_path: Path, where: str, codec: str, destroy: bool) -> None:
    """The others raise and end in order; the last checkpoint goes on bit for bit."""
    ranks, who, death, steps = 3, 1, 5, 8
    world = World(ranks, destroy=destroy, fork=True)
    try:
        args = (who, codec, where, death, str(tmp_path))
        for message, again, step in world.run(cases.killed, *args, lost=who):
            assert step == death, f"failed in step {step}: {message}"
            assert "compression_hook" in message and f"step {death}" in message, message
            assert f"a collective failed: rank {who} was lost" in message, message
            assert again[0] == "PydistError" and "an earlier call" in again[1], again
        world.close(lost=who)
    finally:
        world.kill()
    wanted = worlds(ranks).run(cases.straight, codec, steps)
    for rank, (start, got) in enumerate(
        worlds(ranks).run(cases.taken_up, codec, str(tmp_path), steps)
    ):
        assert start == 4, "the last checkpoint before the fault"
        for what, one, other in zip(cases.WHOLE, got, wanted[rank], strict=True):
            assert one == other, f"{what} of rank {rank} differ"


def test_checkpoint_of_different_steps(worlds: Worlds) -> None:
    for kind, message in worlds(3).run(cases.mixed_checkpoint, 3):
        assert kind == "ValueError", message
        assert "step is 3 on ranks 0, 1 and 2 on rank 2" in message, message


@pytest.mark.parametrize("codec", ["sign", "topk"])
def test_shrinks(worlds: Worlds, tmp_path: Path, codec: str) -> None:
    """Four ranks, then three: what was not sent is kept, training goes on, replicas are equal."""
    before = worlds(4).run(cases.shrunk, codec, str(tmp_path), 6)
    after = worlds(3).run(cases.shrunk, codec, str(tmp_path), 12)
    assert [one["start"] for one in after] == [6] * 3
    for name, wanted in before[0]["left"].items():
        found = after[0]["found"][name]
        assert wanted.any()
        # Each element was rounded a few times in float32, at the size of its parts.
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max(), name
    same_on_all_ranks([one["parameters"] for one in after])
    for one in after:
        assert one["loss"][1] < one["loss"][0] < before[0]["loss"][0]


# --------------------------------------------------------------------------- stalls and delays


@pytest.mark.parametrize(
    ("where", "codec"),
    [
        ("stopped", "qsgd"),
        ("backward", "topk"),
        pytest.param("reduce", "sign", marks=pytest.mark.soak),
        pytest.param("decode", "all", marks=pytest.mark.soak),
    ],
)
def test_stalled(worlds: Worlds, where: str, codec: str) -> None:
    """It stands still until the others have raised: were they to wait for it, all would hang."""
    who = 1
    for rank, (kind, message) in enumerate(worlds(3).run(cases.stalled, who, codec, where)):
        assert kind == "PydistError" and "a collective failed" in message, message
        assert "compression_hook, step 2" in message, message
        assert rank == who or f"no sign of rank {who} within 3 s" in message, message


@pytest.mark.parametrize(
    ("codec", "algorithm", "steps"),
    [
        ("all", "two_phase", 40),
        ("sign", "all_gather", 8),
        pytest.param("all", "two_phase", 2000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_delays(worlds: Worlds, codec: str, algorithm: str, steps: int) -> None:
    args = (codec, algorithm, steps)
    same_on_all_ranks(worlds(3).run(cases.delayed, *args, timeout=60 + steps))


# --------------------------------------------------------------------------- storms


@pytest.mark.parametrize("scaled", [False, True], ids=["guard", "scaler"])
@pytest.mark.parametrize("exact", [False, True], ids=["usual", "exact_skip"])
@pytest.mark.parametrize(
    ("codec", "steps"),
    [
        ("all", 30),
        *(pytest.param(codec, 200, marks=pytest.mark.soak) for codec in ("qsgd", "sign", "topk")),
    ],
)
def test_storm(worlds: Worlds, codec: str, steps: int, exact: bool, scaled: bool) -> None:
    args = (codec, exact, scaled, steps)
    same_on_all_ranks(worlds(3).run(cases.storm, *args, timeout=60 + steps))


# --------------------------------------------------------------------------- disagreement

MODELS: dict[tuple[str, bool], list[str]] = {
    ("shape", True): ["parameter 0 is", "[20, 20]", "[21, 20]"],
    ("number", True): ["parameters is 3 on ranks 0, 2 and 4 on rank 1", "parameter 3 is null"],
    ("fewer", True): ["parameters is 3 on ranks 0, 2 and 2 on rank 1", "null on rank 1"],
    ("order", True): ["parameter 0 is", '"a.weight"', '"b.weight"'],
    ("shape", False): ["parameter 1 is", "[20, 20]", "[20, 21]"],
    ("number", False): ["parameter 3 is null on ranks 0, 2"],
    ("fewer", False): ["parameter 2 is", "null on rank 1"],
    ("buckets", False): ["numel is 400 on ranks 0, 2 and 1200", "parameter 2 is null"],
}


@pytest.mark.parametrize("key", MODELS, ids=lambda key: f"{key[0]}-{'named' * key[1]}")
def test_other_model(worlds: Worlds, key: tuple[str, bool]) -> None:
    for kind, message in worlds(3).run(cases.other_model, *key):
        assert kind == "MismatchError", message
        for part in [*MODELS[key], "on ranks 0, 2", "on rank 1"]:
            assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("exact", [False, True], ids=["usual", "exact_skip"])
def test_refused(worlds: Worlds, exact: bool) -> None:
    results = worlds(3).run(cases.refused, exact)
    for (kind, message), _ in results:
        assert kind == "PydistError" and "no room for a bucket" in message, message
    same_on_all_ranks([parameters for _, parameters in results])


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("WIRE_VERSION", 7, "rank 0: header of rank 1: wire version 7, expected 2"),
        ("MAGIC", b"Ping", "rank 0: header of rank 1: magic b'Ping', expected b'PDst'"),
    ],
)
def test_other_wire_version(worlds: Worlds, name: str, value: Any, part: str) -> None:
    results = worlds(3).run(cases.other_version, name, value)
    for at_once, later, _ in results:
        for kind, message in (at_once, later):
            assert kind == "PydistError" and part in message, message
    same_on_all_ranks([parameters for _, _, parameters in results])
