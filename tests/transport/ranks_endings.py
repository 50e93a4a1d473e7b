"""What ranks do in test_endings.py: come late, leave, fail, and begin again."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks_faults import raised_by
from torch.nn.parallel import DistributedDataParallel

import pydist
from pydist.encoding.coders import ReduceCoder

QSGD = pydist.QSGD(4)


def late(rank: int, ranks: int, who: int, seconds: float) -> list[tuple[str, str]]:
    """A rank is late for the first call of a group, past its timeout; then all try again."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    found = []
    if rank != who:
        found.append(raised_by(lambda: pydist.all_reduce(torch.ones(9), QSGD, group=group)))
    dist.barrier()
    for turn in range(2):
        x = torch.full((9,), float(rank))
        pydist.all_reduce(x, QSGD, op="sum", group=group, step=turn)
        assert bool((x == sum(range(ranks))).all())
    return found


def late_in_turns(rank: int, ranks: int) -> None:
    """Every rank in turn is the one that missed the others; the group works in the end."""
    group = dist.new_group(timeout=timedelta(seconds=0.7))
    for who in range(ranks):
        if rank == who:
            kind, message = raised_by(lambda: pydist.all_reduce(torch.ones(9), QSGD, group=group))
            assert kind == "PydistError" and "did not come within 0.7 s" in message, message
            missing = [other for other in range(ranks) if other != who]
            assert any(str(other) in message for other in missing), message
        dist.barrier()
    x = torch.ones(9)
    assert bool((pydist.all_reduce(x, QSGD, op="sum", group=group, step=0) == ranks).all())


def killed(rank: int, ranks: int, who: int) -> tuple[tuple[str, str], float]:
    """One rank dies while another is busy elsewhere; the third waits for the busy one."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    pydist.all_reduce(torch.ones(8), QSGD, group=group, step=0)
    if rank == who:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == (who + 1) % ranks:
        time.sleep(2.0)
    begun = time.monotonic()
    raised = raised_by(lambda: pydist.all_reduce(torch.ones(8), QSGD, group=group, step=1))
    return raised, time.monotonic() - begun


def fails_itself(rank: int, ranks: int, who: int, where: str) -> list[tuple[str, str]]:
    """A rank's own code raises in a phase; all ranks raise in that call, and say who and why."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    pydist.all_reduce(torch.ones(8), QSGD, group=group, step=0)

    def broken(*args: Any) -> None:
        raise MemoryError("no memory left")

    def reduced(step: int) -> None:
        x = torch.ones(200_000)
        pydist.all_reduce(x, QSGD, group=group, step=step, algorithm="two_phase")

    usual = getattr(ReduceCoder, where)
    with mock.patch.object(ReduceCoder, where, broken if rank == who else usual):
        return [raised_by(partial(reduced, step)) for step in (1, 2)]


def lives(rank: int, ranks: int, store: str, count: int) -> list[tuple[int, int, int]]:
    """Times out, destroys the process group and makes it again, in one process.

    Returns:
        File descriptors, threads and models that are there after each life.
    """
    dist.destroy_process_group()
    found, meeting = [], dist.FileStore(f"{store}.meeting", ranks)
    for era in range(count):
        meeting.set(f"{era}/{rank}", "")
        meeting.wait([f"{era}/{other}" for other in range(ranks)], timedelta(seconds=30))
        dist.init_process_group(
            "gloo", init_method=f"file://{store}.{era}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=2),
        )  # fmt: skip
        _one_life(rank)
        dist.destroy_process_group()
        deadline = time.monotonic() + 10
        while (_pydist_threads() or _models()) and time.monotonic() < deadline:
            time.sleep(0.05)
            gc.collect()
        threads = len(os.listdir("/proc/self/task"))
        found.append((len(os.listdir("/proc/self/fd")), threads, _models()))
    return found


def _models() -> int:
    return sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects())


def _pydist_threads() -> int:
    return sum(thread.name.startswith("pydist") for thread in threading.enumerate())


def _one_life(rank: int) -> None:
    ddp = DistributedDataParallel(torch.nn.Linear(50, 50))
    pydist.ddp.compress(ddp, QSGD, min_numel=16)
    found = []
    for step in range(4):
        if step == 2 and rank == 0:  # DDP itself exchanges something in step 1
            time.sleep(3.5)
        found.append(raised_by(lambda: ddp(torch.randn(2, 50)).sum().backward()))
    assert "PydistError" in [kind for kind, _ in found], found


SCRIPT = """
import atexit, os, signal, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist, pydist

store, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=120))
pydist.all_reduce(torch.ones(100), pydist.QSGD(4))
if rank == 1:
    print("stuck", flush=True)
    time.sleep(600)
if how == "interrupt":
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    pydist.all_reduce(torch.ones(100), pydist.QSGD(4))
for _ in range(4):
    pydist.all_reduce(torch.ones(100_000), pydist.QSGD(4), async_op=True)
sys.exit(3)
"""
