"""Ranks that are late, leave or fail: everyone hears of it, and what can go on goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_endings as cases
from ranks import World, Worlds

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("who", [0, 1, 2])
def test_late_for_the_first_call(worlds: Worlds, who: int) -> None:
    for rank, found in enumerate(worlds(3).run(cases.late, who, 0.5)):
        if rank != who:
            ((kind, message),) = found
            assert kind == "PydistError" and "did not come within 0.5 s" in message, message
            assert f"rank {who} " in message, message


def test_late_in_turns(worlds: Worlds) -> None:
    worlds(3).run(cases.late_in_turns)


def test_killed_while_another_is_busy() -> None:
    """Within the group's minute: the connections of the one that died say so at once."""
    world = World(3, fork=True)
    try:
        for (kind, message), took in world.run(cases.killed, 2, lost=2):
            assert kind == "PydistError" and "rank 2 was lost: the connection ended" in message
            assert took < 20
    finally:
        world.kill()


@pytest.mark.parametrize("where", ["encode", "reduce", "decode"])
def test_a_rank_that_fails_fails_everywhere(worlds: Worlds, where: str) -> None:
    for first, second in worlds(3).run(cases.fails_itself, 1, where):
        assert first[0] == second[0] == "PydistError"
        assert "step 1: a collective failed: rank 1: no memory left" in first[1], first
        assert "an earlier call on this process group failed" in second[1], second


def test_nothing_stays_of_a_failed_group(tmp_path: Path) -> None:
    world = World(2, destroy=False, fork=True)
    try:
        for found in world.run(cases.lives, str(tmp_path / "store"), 2):
            assert found[0] == found[1], f"descriptors, threads, models: {found}"
            assert found[0][2] == 0
    finally:
        world.kill()


@pytest.mark.parametrize("how", ["interrupt", "exit"])
def test_ends_while_a_peer_is_stuck(tmp_path: Path, how: str) -> None:
    """The group's timeout is two minutes, and nothing waits for it."""
    arguments = [sys.executable, "-c", cases.SCRIPT, str(tmp_path / "store")]
    stuck = subprocess.Popen([*arguments, "1", how], stdout=subprocess.DEVNULL)
    try:
        begun = time.monotonic()
        done = subprocess.run([*arguments, "0", how], capture_output=True, text=True, timeout=100)
        assert done.returncode == (3 if how == "exit" else -signal.SIGINT), done.stderr
        assert ("KeyboardInterrupt" in done.stderr) == (how == "interrupt")
        assert "terminate called" not in done.stderr
        assert time.monotonic() - begun < 60
    finally:
        stuck.kill()
        stuck.wait()
