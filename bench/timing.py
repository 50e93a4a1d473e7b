"""Timing on the CPU and on CUDA: cold buffers, samples taken in turn, medians and ratios."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# A sample lasts at least this long: several calls where one is shorter.
SAMPLE_SECONDS = 2e-2
_COLD_CACHES = 2.0
_MEMORY_SHARE = 8
_WARMUP = 2


Buffers = SimpleNamespace  # tensors by name


def copy_of(buffers: Buffers) -> Buffers:
    """The same values in other memory."""
    return Buffers(**{name: x.clone() for name, x in vars(buffers).items()})


@dataclass
class Ring:
    """Sets of buffers used in turn, so that none is still in a cache when its turn comes again.

    Attributes:
        sets: What :meth:`next` hands out, one after the other.
    """

    sets: Sequence[Buffers]
    _turn: int = field(default=0, init=False)

    @classmethod
    def filled(cls, first: Buffers, cold_bytes: int) -> Ring:
        """A set and as many copies of it as reach ``cold_bytes`` together."""
        size = sum(x.nbytes for x in vars(first).values())
        more = max(0, math.ceil(cold_bytes / size) - 1)
        return cls([first, *(copy_of(first) for _ in range(more))])

    def next(self) -> Buffers:
        """The set whose use lies back furthest."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        run: Does it once, with one set of the ring.
        ring: Its buffers.
        bytes: Bytes it must move at the least.
    """

    run: Callable[[Buffers], object]
    ring: Ring
    bytes: float


class Clock:
    """Times calls on one device.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        now: Seconds on the CPU: of the wall, or those that the calling thread had a core.
    """

    def __init__(self, device: str, kind: str = "wall") -> None:
        self.device = device
        self.now = time.thread_time if kind == "cpu" else time.perf_counter

    def wait(self) -> None:
        """Returns when the device has done everything asked of it."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, task: Task, calls: int) -> float:
        """Seconds of one call: the mean of ``calls`` that follow each other."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                task.run(task.ring.next())
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / calls
        start = self.now()
        for _ in range(calls):
            task.run(task.ring.next())
        return (self.now() - start) / calls

    def calls_for(self, task: Task) -> int:
        """Warms up and finds how many calls make a sample."""
        for _ in range(_WARMUP):
            task.run(task.ring.next())
        self.wait()
        return max(1, math.ceil(SAMPLE_SECONDS / max(1e-9, self.seconds(task, 1))))


def cold_bytes(device: str) -> int:
    """Bytes that buffers of one task must have together to be cold: twice the largest cache."""
    if device == "cuda":
        cache = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        return int(_COLD_CACHES * cache)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    cache = max((_size(path.read_text()) for path in sizes), default=32 << 20)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(int(_COLD_CACHES * cache), memory // _MEMORY_SHARE)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "lower_quartile": values[0], "upper_quartile": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def compare(task: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Bandwidth of one series of samples over that of another, taken in the same repeats.

    Args:
        task: ``samples`` (seconds a repeat) and ``bytes``.
        other: Likewise.

    Returns:
        Median and quartiles of the ratios of each repeat, which a slow spell of the machine hardly
        moves, and the ratio of the two medians.
    """
    scale = task["bytes"] / other["bytes"]
    pairs = list(zip(task["samples"], other["samples"], strict=True))
    medians = statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)
    return spread([scale * b / a for a, b in pairs]) | {"of_medians": scale * medians}
