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
HOST_CALLS = 200  # enqueued without waiting: fewer than a stream's queue of launches holds
_COLD_CACHES = 2.0
_MEMORY_SHARE = 8
_WARMUP = 2
_MOST_CALLS = 1000
# The device spins this long before a sample, while the host enqueues the graph: 1.5 ms or so, and
# 2 µs for each call in it. Where that was too short, the sample is taken again with more.
_HEAD_START_CYCLES = 3_000_000
_HEAD_START_CYCLES_A_CALL = 4_000
_HEAD_STARTS = (1, 2, 4, 8)

Buffers = SimpleNamespace  # tensors by name
Sample = Callable[[], float]
"""Takes one sample: seconds per call."""


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

    def call(self) -> None:
        """Does it once."""
        self.run(self.ring.next())

    def hot(self) -> Task:
        """The same on one set of buffers alone, which stays in a cache that is large enough."""
        return Task(self.run, Ring(self.ring.sets[:1]), self.bytes)


class CpuClock:
    """Times calls on the CPU.

    Attributes:
        now: Seconds: of the wall, or those that the calling thread had a core.
    """

    def __init__(self, kind: str = "wall") -> None:
        self.now = time.thread_time if kind == "cpu" else time.perf_counter

    def seconds(self, task: Task, calls: int) -> float:
        """Seconds of one call: the mean of ``calls`` that follow each other."""
        start = self.now()
        for _ in range(calls):
            task.call()
        return (self.now() - start) / calls

    def called(self, task: Task) -> Sample:
        """Warms up; what it returns times calls as a program makes them."""
        for _ in range(_WARMUP):
            task.call()
        calls = _calls(self.seconds(task, 1))
        return lambda: self.seconds(task, calls)

    computed = called
    """On the CPU there is nothing but the call."""


class CudaClock:
    """Times calls on the current CUDA device with events.

    Attributes:
        late: Samples whose replay began before the host had enqueued all of it, even with the
            longest head start: they may hold time of the host.
    """

    def __init__(self) -> None:
        self.late = 0

    def called(self, task: Task) -> Sample:
        """Warms up; what it returns times calls as a program makes them.

        Where the device is done sooner than the host can ask for more, this is the host's time.
        """
        for _ in range(_WARMUP):
            task.call()
        torch.cuda.synchronize()
        calls = _calls(self._between(lambda: _repeat(task, 3)) / 3)
        return lambda: self._between(lambda: _repeat(task, calls)) / calls

    def computed(self, task: Task) -> Sample:
        """What it returns times the device alone: a captured graph of many calls, replayed.

        One replay goes through all sets of buffers, or through a thousand where there are more: by
        the time the next begins, those have driven each other out of any cache smaller than they
        are together.
        """
        for _ in range(_WARMUP):
            task.call()
        torch.cuda.synchronize()
        once = self._between(lambda: _repeat(task, 3)) / 3
        calls = max(min(len(task.ring.sets), _MOST_CALLS), _calls(once))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _repeat(task, calls)
        graph.replay()
        torch.cuda.synchronize()
        return lambda: self._replayed(graph, calls) / calls

    def host_seconds(self, task: Task) -> float:
        """Seconds until a call returns to a program that does not wait for the device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        _repeat(task, HOST_CALLS)
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken / HOST_CALLS

    def _replayed(self, graph: torch.cuda.CUDAGraph, calls: int) -> float:
        """Seconds of one replay that the device began when all of it had been enqueued."""
        cycles = _HEAD_START_CYCLES + calls * _HEAD_START_CYCLES_A_CALL
        for times in _HEAD_STARTS:
            torch.cuda._sleep(times * cycles)
            begin, end = _enqueue(graph.replay)
            early = not begin.query()
            seconds = _elapsed(begin, end)
            if early:
                return seconds
        self.late += 1
        return seconds

    @staticmethod
    def _between(work: Callable[[], object]) -> float:
        return _elapsed(*_enqueue(work))


def _enqueue(work: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    return begin, end


def _elapsed(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _repeat(task: Task, calls: int) -> None:
    for _ in range(calls):
        task.call()


def _calls(seconds: float) -> int:
    return min(_MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(1e-9, seconds))))


def cold_bytes(device: str) -> int:
    """Bytes that buffers of one task must have together to be cold: twice the largest cache."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return int(_COLD_CACHES * properties.L2_cache_size)
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


def ratio(task: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
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
