"""What ranks do in test_flips.py: one bit of what arrives at one rank is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ranks_faults import raised_by
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import pydist
from pydist.transport import agreement, groups

CODECS: dict[str, Any] = {
    "vote": pydist.Sign(scale=None),
    "sign": pydist.Sign("l1"),
    "qsgd": pydist.QSGD(4),
    "elias": pydist.QSGD(4, norm="l2", entropy="elias"),
    "int": pydist.BlockInt(8, block=64),
    "float": pydist.BlockFloat("e4m3"),
    "ternary": pydist.Ternary(clip=2.5),
    "topk": pydist.TopK(0.05),
    "raw": pydist.Raw(),
}
N = 5000


FILLED = 0xA5
"""What memory holds before a message arrives there: it may be longer than the message."""


class Flipper:
    """Counts the messages that arrive at a rank, and flips a bit of one of them.

    Attributes:
        seen: Bytes of each message so far.
        target: Which message, and which bit of it.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.target: tuple[int, int] | None = None
        self._expected: dict[int, tuple[Any, Tensor]] = {}

    def started(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def issue(output: Tensor, *args: Any) -> Any:
            output.fill_(FILLED)
            work = start(output, *args)
            self._expected[id(work)] = work, output
            return work

        return issue

    def waited(self, wait: Callable[[Any], None]) -> Callable[[Any], None]:
        def ended(work: Any) -> None:
            wait(work)
            _, output = self._expected.pop(id(work), (None, None))
            if output is None:
                return
            number, data = len(self.seen), output.numpy()
            self.seen.append(1 + int(np.flatnonzero(data != FILLED)[-1]))
            if self.target is not None and number == self.target[0]:
                data[self.target[1] // 8] ^= 1 << self.target[1] % 8

        return ended

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with (
            mock.patch.object(groups, "receive", self.started(groups.receive)),
            mock.patch.object(groups, "wait", self.waited(groups.wait)),
            # Ranks that see no difference do not answer; five seconds each would be long.
            mock.patch.object(agreement, "DESCRIBE_SECONDS", 0.3),
        ):
            yield


def all_reduced(rank: int, group: dist.ProcessGroup, name: str, algorithm: str) -> Tensor:
    x = torch.randn(N, generator=torch.Generator().manual_seed(rank))
    op = "vote" if name == "vote" else "mean"
    pydist.all_reduce(x, CODECS[name], op=op, group=group, algorithm=algorithm, step=1)
    return x


def trained(rank: int, group: dist.ProcessGroup, name: str, algorithm: str) -> Tensor:
    """A step of the DDP hook, with a codec for each of several parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    ddp = DistributedDataParallel(model, process_group=group)
    codec = {"0.*": pydist.BlockInt(8), "1.*": pydist.TopK(0.05)}
    pydist.ddp.compress(ddp, codec, min_numel=8, algorithm=algorithm)
    ddp(torch.randn(4, 40, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


CALLS = {"all_reduce": all_reduced, "ddp": trained}


def flips(rank: int, ranks: int, call: str, name: str, algorithm: str, count: int) -> list[Any]:
    """Makes a call ``count`` times, each on a group of its own and with another bit flipped.

    Returns:
        Of every flip: the exchange, the bit, what this rank raised, whether its result is right,
        and what its next call on the group raised.
    """
    flipper, found = Flipper(), []
    rng, who = np.random.default_rng(7), 1

    def once(group: dist.ProcessGroup) -> Tensor:
        return CALLS[call](rank, group, name, algorithm)

    def short() -> dist.ProcessGroup:
        group = dist.new_group(timeout=timedelta(seconds=8))
        pydist.all_reduce(torch.ones(8), CODECS["vote"], group=group)
        return group

    with flipper.at_work():
        group = short()
        begin = len(flipper.seen)
        expected = once(group)
        sizes = flipper.seen[begin:]
    for _ in range(count):
        exchange = int(rng.integers(len(sizes)))
        bit = int(rng.integers(8 * sizes[exchange]))
        flipper.target, flipper.seen = None, []
        with flipper.at_work():
            group = short()
            result: list[Tensor] = []
            flipper.target = (len(flipper.seen) + exchange, bit) if rank == who else None
            raised = raised_by(lambda: result.append(once(group)))  # noqa: B023
            right = bool(result) and torch.equal(result[0], expected)
            again = raised_by(lambda: pydist.all_reduce(torch.ones(8), CODECS["vote"], group=group))  # noqa: B023
        dist.barrier()
        dist.destroy_process_group(group)
        found.append((exchange, bit, raised, right, again))
    return found
