"""What ranks do in test_faults.py: disagree, stall, die, talk nonsense."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks_collectives import VOTES, check, inputs

import pydist
from pydist import PydistError
from pydist.collectives import flat as collectives
from pydist.formats import wire
from pydist.optim import DistributedLion

SHORT = 3.0  # seconds: timeout of the groups that break


def raised_by(call: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what a call raises; empty where it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def still_works(rank: int, ranks: int, group: dist.ProcessGroup | None = None) -> None:
    for turn in range(2):
        tensors = inputs(ranks, 777, torch.float32, seed=turn)
        x = tensors[rank].clone()
        pydist.all_reduce(x, VOTES, op="vote", step=turn, group=group, algorithm="two_phase")
        check(x, tensors, "after the error", op="vote", step=turn)


def short_group(ranks: int) -> dist.ProcessGroup:
    group = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=SHORT))
    pydist.all_reduce(torch.ones(8), VOTES, group=group)
    return group


# --------------------------------------------------------------------------- disagreement


def differs(rank: int, ranks: int, who: int, usual: dict[str, Any], other: dict[str, Any]) -> Any:
    """One rank calls with other arguments; afterwards the group is as good as before."""
    options = {"op": "vote", "step": 1, "n": 64, "dtype": "float32", **usual}
    if rank == who:
        options.update(other)
    x = torch.ones(options.pop("n"), dtype=getattr(torch, options.pop("dtype")))
    before, counter = x.clone(), collectives.state_dict()
    result = raised_by(lambda: pydist.all_reduce(x, VOTES, **options))
    collectives.load_state_dict(counter)  # only the rank without a step of its own counted
    assert torch.equal(x, before), "the tensor was touched"
    still_works(rank, ranks)
    return result


def bad_tensor(rank: int, ranks: int, who: int, kind: str) -> Any:
    """One rank brings what cannot be reduced; ``step=None`` counts on all ranks alike."""
    bad: dict[str, Callable[[], Any]] = {
        "int64": lambda: torch.ones(5, dtype=torch.int64),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(3, device="meta"),
        "list": lambda: [1.0],
        "expanded": lambda: torch.ones(1).expand(5),
    }
    x = bad[kind]() if rank == who else torch.ones(5)
    result = raised_by(lambda: pydist.all_reduce(x, VOTES, op="sum"))
    still_works(rank, ranks)
    counted = torch.tensor([1.0])
    pydist.all_reduce(counted, VOTES)  # raises if the counters differ
    return result


def one_of_eight_differs(rank: int, ranks: int) -> list[tuple[str, str]]:
    """The calls around a failed one, already in flight, are served."""
    xs = [torch.ones(50 + (i == 3 and rank == 1)) for i in range(8)]
    works = [pydist.all_reduce(x, VOTES, op="sum", step=0, async_op=True) for x in xs]
    results = [raised_by(work.wait) for work in works]
    for i, x in enumerate(xs):
        assert i == 3 or bool((x == ranks).all())
    assert raised_by(works[3].wait) == results[3], "a second wait() says something else"
    return results


def optimizer_against_all_reduce(rank: int, ranks: int) -> tuple[str, str]:
    param = torch.nn.Parameter(torch.ones(10))
    opt = DistributedLion([("w", param)], lr=0.1)
    param.grad = torch.ones(10)
    if rank == 0:
        counter = collectives.state_dict()
        result = raised_by(lambda: pydist.all_reduce(torch.ones(10), VOTES, op="vote", step=0))
        collectives.load_state_dict(counter)  # the optimizers count their own steps
    else:
        result = raised_by(opt.step)
    assert bool((param == 1).all())
    still_works(rank, ranks)
    opt.step()
    assert bool(param.isclose(torch.tensor(0.9)).all())
    return result


def numbers_of_numpy(rank: int, ranks: int) -> None:
    import numpy as np

    x = torch.ones(5)
    pydist.all_reduce(x, VOTES, op="sum", seed=np.int64(3), step=np.int64(4))
    assert bool((x == ranks).all())


# --------------------------------------------------------------------------- malformed


@contextmanager
def speaking(name: str, value: Any) -> Any:
    with mock.patch.object(wire, name, value):
        yield


def other_version(rank: int, ranks: int, name: str, value: Any) -> tuple[str, str]:
    """One rank's headers have another magic or version from the first byte on."""
    with speaking(name, value if rank == 1 else getattr(wire, name)):
        result = raised_by(lambda: pydist.all_reduce(torch.ones(9), VOTES))
    still_works(rank, ranks)
    return result


def malformed_payload_header(
    rank: int, ranks: int, algorithm: str
) -> tuple[tuple[str, str], tuple[str, str], float]:
    """One rank agrees properly and then sends a message that is not one of pydist's."""
    group = short_group(ranks)
    pack = wire.Header.pack

    def garbled(self: wire.Header) -> bytes:
        message = pack(self)
        return message if self.codec == wire.CODECS["agreement"] else b"HTTP" + message[4:]

    def call() -> None:
        pydist.all_reduce(torch.ones(99), VOTES, group=group, algorithm=algorithm)

    started = time.monotonic()
    with mock.patch.object(wire.Header, "pack", garbled if rank == 1 else pack):
        first = raised_by(call)
    second = raised_by(call)
    took = time.monotonic() - started
    still_works(rank, ranks)  # the world is another group
    return first, second, took


# --------------------------------------------------------------------------- lost ranks


def stalls(
    rank: int, ranks: int, who: int, in_flight: int
) -> tuple[list[tuple[str, str]], tuple[str, str], float, float]:
    """One rank sleeps longer than the group's timeout; the others must not."""
    group = short_group(ranks)
    if rank == who:
        time.sleep(2 * SHORT)
    started = time.monotonic()
    works = []
    results = []
    try:
        for i in range(in_flight):
            works.append(pydist.all_reduce(torch.ones(99), VOTES, group=group, step=i,
                                           async_op=True))  # fmt: skip
        results = [raised_by(work.wait) for work in works]
    except PydistError as error:  # an earlier one had failed already
        results = [(type(error).__name__, str(error))]
    took = time.monotonic() - started
    started = time.monotonic()
    again = raised_by(lambda: pydist.all_reduce(torch.ones(9), VOTES, group=group))
    took_again = time.monotonic() - started
    dist.barrier()
    still_works(rank, ranks)
    return results, again, took, took_again


def killed_in_a_loop(rank: int, ranks: int, who: int, n: int) -> tuple[str, str, float, float]:
    """One rank dies without a word while all reduce; it sends the time of its death ahead."""
    group = short_group(ranks)
    for turn in range(10_000):
        if rank == who and turn == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        try:
            pydist.all_reduce(torch.ones(n), VOTES, group=group, algorithm="two_phase")
        except PydistError as error:
            took = time.monotonic() - started
            started = time.monotonic()
            again = raised_by(lambda: pydist.all_reduce(torch.ones(n), VOTES, group=group))
            assert again[0] == "PydistError" and "earlier" in again[1], again
            assert turn >= 19, f"failed in turn {turn}: {error}"
            return type(error).__name__, str(error), took, time.monotonic() - started
    raise AssertionError("nothing failed")


def killed_in_a_step(rank: int, ranks: int, who: int) -> tuple[str, str, float]:
    """The same while an optimizer steps."""
    group = short_group(ranks)
    param = torch.nn.Parameter(torch.ones(5000))
    opt = DistributedLion([("w", param)], lr=0.1, group=group)
    for turn in range(10_000):
        if rank == who and turn == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        param.grad = torch.ones(5000)
        started = time.monotonic()
        try:
            opt.step()
        except PydistError as error:
            return type(error).__name__, str(error), time.monotonic() - started
    raise AssertionError("nothing failed")
