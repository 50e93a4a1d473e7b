"""Optimizers among other people's tools and ways of working, each with its whole kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ranks_optim_checkpoints as checkpoints
import ranks_optim_faults as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

KIND = pytest.mark.parametrize("kind", checkpoints.KINDS)


@KIND
def test_memory_format(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.memory_format, kind)


def test_memory_format_attached(worlds: Worlds) -> None:
    worlds(2).run(cases.memory_format_attached)


def test_ranks_of_other_strides(worlds: Worlds) -> None:
    for error, text in worlds(2).run(cases.other_strides):
        assert error == "MismatchError" and "'a.weight'" in text, (error, text)


# --------------------------------------------------------------------------- attached


@pytest.mark.parametrize(
    ("kind", "unused"), [("lion", False), ("lion", True), ("sign", False), ("lion_exact", False)]
)
def test_join(worlds: Worlds, kind: str, unused: bool) -> None:
    worlds(2).run(cases.joined, kind, unused)


@pytest.mark.parametrize("how", ["thawed", "added", "ignored"])
def test_parameters_outside_buckets(worlds: Worlds, how: str) -> None:
    worlds(2).run(cases.outside_buckets, how)


def test_second_optimizer(worlds: Worlds) -> None:
    for raised in worlds(2).run(cases.second_optimizer):
        for name, (error, text) in raised.items():
            assert error == "RuntimeError", (name, error, text)
        assert "another DistributedLion is attached to it" in raised["attach"][1]
        assert "attach() was called before" in raised["again"][1]
        assert raised["torch's"][1].startswith("AdamW.step(): a DistributedLion is attached")
        assert raised["pydist's"][1].startswith("Signum.step(): a DistributedLion is attached")
        assert "detach() without attach()" in raised["detached"][1]


# --------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("kind", ["lion", "adam"])
def test_partitions(worlds: Worlds, kind: str) -> None:
    for zero, experts, stages in worlds(2).run(cases.partitions, kind):
        assert "ZeroRedundancyOptimizer gives every rank other parameters" in zero[1], zero
        assert experts[0] == "MismatchError" and "'expert.weight'" in experts[1], experts
        assert "'expert.bias'" in experts[1] and "'shared.weight' for one" in experts[1], experts
        assert stages[0] == "MismatchError" and "'stage0.weight'" in stages[1], stages


def test_replicas_without_a_seed(worlds: Worlds) -> None:
    for warned in worlds(2).run(cases.replicas_that_differ):
        assert any("'weight', 'bias' differed between ranks" in one for one in warned), warned


@KIND
def test_swapped(worlds: Worlds, kind: str) -> None:
    for raised in worlds(2).run(cases.swapped, kind):
        assert "'0.weight'" in raised["values"][1] or kind == "zero_one", raised
        if kind != "sign":  # which has no state, and takes what all ranks have put there
            assert all(error for error, _ in raised.values()), raised
            assert "'2.weight'" in raised["data"][1], raised


@pytest.mark.parametrize("kind", ["lion", "adam", "zero_one"])
def test_made_before_values(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.made_before_values, kind)


@pytest.mark.parametrize("kind", ["lion", "signum"])
def test_sharded_later(worlds: Worlds, kind: str) -> None:
    worlds(4).run(cases.sharded_later, kind)


# --------------------------------------------------------------------------- tools


@KIND
def test_compiled(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.compiled, kind)


@KIND
def test_packed(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.packed, kind)


@KIND
def test_statistics(worlds: Worlds, kind: str) -> None:
    for stats in worlds(2).run(cases.statistics, kind):
        assert stats["step"] == stats["steps"] == 6 and stats["skipped_steps"] == 0
        assert stats["wire_bytes"] > 0 and stats["ratio"] > 0 and stats["world_size"] == 2


@pytest.mark.parametrize("kind", ["lion", "signum", "adam", "zero_one"])
def test_wrong_types(worlds: Worlds, kind: str) -> None:
    for raised in worlds(2).run(cases.wrong_types, kind):
        for (error, text), name in zip(raised, ["lr", "weight_decay", "seed"], strict=True):
            assert error and name in text, (name, error, text)


def test_types_are_part_of_the_interface(tmp_path: Path) -> None:
    """What type checkers of users say; an option that is misspelt or of a wrong type."""
    pytest.importorskip("mypy")
    lines = ["import pydist, torch", "def f(p: torch.nn.Parameter) -> None:"]
    wrong = []
    for name in ("DistributedLion", "Signum", "SignSGD", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        more = {"OneBit": ", warmup_steps=2", "ZeroOn": ", var_freeze_step=2"}.get(name[:6], "")
        lines.append(f"    pydist.optim.{name}([p], lr=0.1{more}).step()")
        for bad in ('lr="fast"', "lr=0.1, algorithm='fastest'", "lr=0.1, sed=1"):
            lines.append(f"    pydist.optim.{name}([p], {bad}{more})")
            wrong.append(len(lines))
    file = tmp_path / "user.py"
    file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", str(file)]  # strict, with the cache of make lint
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    ).stdout
    places = [int(line.split(":")[1]) for line in found.splitlines() if ": error:" in line]
    assert places == wrong, found


@KIND
def test_loaded_as_people_do(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.as_people_load, kind)
