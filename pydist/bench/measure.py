"""Runs cases: in each repeat a read, a copy, the kernel and its rivals, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pydist.bench.cases import Case
from pydist.bench.timing import (
    Buffers,
    CpuClock,
    CudaClock,
    Ring,
    Sample,
    Task,
    cold_bytes,
    copy_of,
    ratio,
    spread,
)

RIVAL_REPEATS = 5  # rivals are up to a hundred times slower; their place is known soon enough
COPY_BYTES = 1 << 30  # CUDA: read and written by the copy that all sizes are held to

Report = dict[str, Any]


def references(numel: int, device: str, cold: int) -> dict[str, Task]:
    """The bandwidths that kernels are held to: a read and a copy of ``numel`` float32."""
    source, target = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    reads = Ring.filled(Buffers(source=source), cold)
    copies = Ring.filled(Buffers(source=source, target=target), cold)
    return {
        "read": Task(lambda s: s.source.sum(), reads, 4 * numel),
        "copy": Task(lambda s: s.target.copy_(s.source), copies, 8 * numel),
    }


def check_rivals(case: Case) -> None:
    """Raises AssertionError where a rival answers something else than the kernel."""
    buffers = case.make()
    answer = case.run(copy_of(buffers))
    for rival in case.rivals:
        try:
            other = rival.run(copy_of(buffers))
        except Exception:
            continue  # it fails again when it is timed, and is reported then
        if other is not None and answer is not None and not torch.equal(other, answer):
            raise AssertionError(f"{rival.name} and {case.name} ({case.dtype}) differ")


@dataclass
class Series:
    """One thing that is timed again and again.

    Attributes:
        bytes: Bytes it must move at the least.
        sample: Takes one sample.
        repeats: Samples to take.
        samples: Those taken.
    """

    bytes: float
    sample: Sample
    repeats: int
    samples: list[float] = field(default_factory=list)

    def report(self) -> Report:
        """What was found."""
        seconds = spread(self.samples)
        return {
            "bytes": self.bytes,
            "samples": self.samples,
            "seconds": seconds,
            "gigabytes_per_second": self.bytes / seconds["median"] / 1e9,
        }


class Bench:
    """Times cases on one device.

    Attributes:
        repeats: Samples of each row.
        threads: Numbers of CPU threads, one row each; ``[0]`` on CUDA.
    """

    def __init__(self, device: str, repeats: int, threads: list[int], clock: str) -> None:
        self.device, self.repeats, self.threads = device, repeats, threads
        self.clock = CudaClock() if device == "cuda" else CpuClock(clock)
        self.cold = cold_bytes(device)
        self._references: dict[int, dict[str, Task]] = {}
        self._reference_samples: dict[tuple[int, int, str], Sample] = {}

    def run(self, case: Case, advance: Callable[[], object]) -> list[Report]:
        """One row for each number of threads; ``advance`` is called after each repeat."""
        check_rivals(case)
        ring = Ring.filled(case.make(), self.cold)
        kernel = Task(case.run, ring, case.bytes)
        plans, failed = {}, {}
        for threads in self.threads:
            self._use(threads)
            plan = {"kernel": Series(case.bytes, self.clock.computed(kernel), self.repeats)}
            if isinstance(self.clock, CudaClock):
                plan["hot"] = Series(case.bytes, self.clock.computed(kernel.hot()), self.repeats)
                plan["called"] = Series(case.bytes, self.clock.called(kernel), RIVAL_REPEATS)
            for rival in case.rivals:
                if not (rival.threaded or threads == self.threads[0]):
                    continue
                try:
                    sample = self.clock.called(Task(rival.run, ring, case.bytes))
                    plan[f"rival {rival.name}"] = Series(case.bytes, sample, RIVAL_REPEATS)
                except Exception as error:  # of another library: its row says why
                    failed[rival.name] = f"{type(error).__name__}: {error}"[:200]
            plans[threads] = {**self._reference_series(case.numel, threads), **plan}
        for repeat in range(self.repeats):
            for threads, plan in plans.items():
                self._use(threads)
                for series in plan.values():
                    if repeat < series.repeats:
                        series.samples.append(series.sample())
            advance()
        return [self._row(case, kernel, threads, plans[threads], failed) for threads in plans]

    def _use(self, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)

    def _reference_series(self, numel: int, threads: int) -> dict[str, Series]:
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            numel = min(self._references) if self._references else min(COPY_BYTES, free // 8) // 4
        if numel not in self._references:
            self._references = {numel: references(numel, self.device, self.cold)}
            self._reference_samples.clear()
        found = {}
        for name, task in self._references[numel].items():
            key = (threads, numel, name)
            if key not in self._reference_samples:
                self._reference_samples[key] = self.clock.computed(task)
            found[name] = Series(task.bytes, self._reference_samples[key], self.repeats)
        return found

    def _row(
        self, case: Case, kernel: Task, threads: int, plan: dict[str, Series], failed: Report
    ) -> Report:
        found = {name: series.report() for name, series in plan.items()}
        read, copy, own = (found.pop(name) for name in ("read", "copy", "kernel"))
        row = {
            "kernel": case.kernel,
            "variant": case.variant,
            "dtype": case.dtype,
            "numel": case.numel,
            "threads": threads,
            **own,
            "of_read": ratio(own, read),
            "of_copy": ratio(own, copy),
            "read": read,
            "copy": copy,
        }
        if isinstance(self.clock, CudaClock):
            row |= {"hot": found.pop("hot"), "called": found.pop("called")}
            row["host_seconds"] = self.clock.host_seconds(kernel)
        row["rivals"] = {name.removeprefix("rival "): entry for name, entry in found.items()}
        row["rivals_failed"] = failed
        return row
