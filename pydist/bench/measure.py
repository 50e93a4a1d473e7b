"""Runs cases: in each repeat a read, a copy, the kernel and its rivals, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pydist.bench.case import Case
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
COPY_BYTES = 1 << 30  # CUDA: the copy that all sizes are held to reads as many and writes as many
DIFFERS = "its answer is not the kernel's"

Report = dict[str, Any]
_RIVAL = "rival "  # before a rival's name in a plan


def references(numel: int, device: str, cold: int) -> dict[str, Task]:
    """The bandwidths that kernels are held to: a read and a copy of ``numel`` float32."""
    source, target = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    reads = Ring.filled(Buffers(source=source), cold)
    copies = Ring.filled(Buffers(source=source, target=target), cold)
    return {
        "read": Task(lambda s: s.source.sum(), reads, 4 * numel),
        "copy": Task(lambda s: s.target.copy_(s.source), copies, 8 * numel),
    }


def failing_rivals(case: Case) -> dict[str, str]:
    """Rivals that fail or answer something else than the kernel, and why they aren't timed."""
    if not case.rivals:
        return {}
    buffers = case.make()
    answer = case.run(copy_of(buffers))
    failed = {}
    for rival in case.rivals:
        try:
            other = rival.run(rival.make() if rival.make else copy_of(buffers))
            if other is not None and answer is not None and not torch.equal(other, answer):
                failed[rival.name] = DIFFERS
        except Exception as error:  # of another library: its row says why
            failed[rival.name] = brief(error)
    return failed


def brief(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        rows: A row for each number of threads; none where it was not measured.
        why: Why it was not.
        failed: Whether that is a fault, and not time or memory running out.
    """

    rows: list[Report] = field(default_factory=list)
    why: str = ""
    failed: bool = False


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


def _sample(plan: dict[str, Series], repeat: int) -> dict[str, str]:
    """One sample of each series; rivals that fail leave the plan, and are returned."""
    failed = {}
    for name, series in list(plan.items()):
        if repeat >= series.repeats:
            continue
        try:
            series.samples.append(series.sample())
        except Exception as error:
            if not name.startswith(_RIVAL):
                raise
            del plan[name]
            failed[name.removeprefix(_RIVAL)] = brief(error)
    return failed


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

    def measured(self, case: Case, advance: Callable[[], object]) -> Outcome:
        """:meth:`run`, which costs no other row where it fails."""
        try:
            return Outcome(self.run(case, advance))
        except torch.OutOfMemoryError as error:
            return Outcome(why=str(error).split(". ")[0])
        except Exception as error:  # a kernel, a capture, a clock: the other rows are still wanted
            return Outcome(why=brief(error), failed=True)
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def run(self, case: Case, advance: Callable[[], object]) -> list[Report]:
        """One row for each number of threads; ``advance`` is called after each repeat."""
        failed = failing_rivals(case)
        ring = Ring.filled(case.make(), self.cold)
        kernel = Task(case.run, ring, case.bytes)
        # What waits for the device can't be captured: a graph of it would break the context.
        clock = self.clock.called if case.reads_back else self.clock.computed
        plans = {}
        if isinstance(self.clock, CudaClock):
            self.clock.late = 0
        for threads in self.threads:
            self._use(threads)
            plan = {"kernel": Series(case.bytes, clock(kernel), self.repeats)}
            if isinstance(self.clock, CudaClock) or self._stays_hot(case.numel, ring):
                plan["hot"] = Series(case.bytes, clock(kernel.hot()), self.repeats)
            if isinstance(self.clock, CudaClock):
                plan["called"] = Series(case.bytes, self.clock.called(kernel), RIVAL_REPEATS)
            plan |= self._rivals(case, ring, threads, failed)
            hot = "hot" in plan and self.device == "cpu"
            plans[threads] = {**self._reference_series(case.numel, threads, hot), **plan}
        for repeat in range(self.repeats):
            for threads, plan in plans.items():
                self._use(threads)
                failed |= _sample(plan, repeat)
            advance()
        return [self._row(case, kernel, threads, plans[threads], failed) for threads in plans]

    def _rivals(
        self, case: Case, ring: Ring, threads: int, failed: dict[str, str]
    ) -> dict[str, Series]:
        """Those that can be timed; why another can't goes to ``failed``."""
        found = {}
        for rival in case.rivals:
            if rival.name in failed or not (rival.threaded or threads == self.threads[0]):
                continue
            try:
                its_ring = Ring.filled(rival.make(), self.cold) if rival.make else ring
                sample = self.clock.called(Task(rival.run, its_ring, case.bytes))
                found[f"{_RIVAL}{rival.name}"] = Series(case.bytes, sample, RIVAL_REPEATS)
            except Exception as error:
                failed[rival.name] = brief(error)
        return found

    def _use(self, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)

    def _stays_hot(self, numel: int, ring: Ring) -> bool:
        """Whether one set of buffers, and one of the copy's, fits the CPU's largest cache."""
        size = sum(x.nbytes for x in vars(ring.sets[0]).values())
        return max(size, 8 * numel) * 2 <= self.cold

    def _reference_series(self, numel: int, threads: int, hot: bool) -> dict[str, Series]:
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            numel = min(self._references) if self._references else min(COPY_BYTES, free // 8) // 4
        if numel not in self._references:
            self._references = {numel: references(numel, self.device, self.cold)}
            self._reference_samples.clear()
        found = {}
        tasks = dict(self._references[numel])
        if hot:
            tasks |= {f"hot {name}": task.hot() for name, task in tasks.items()}
        for name, task in tasks.items():
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
        if "hot" in found:
            row["hot"] = hot = found.pop("hot")
            for name in ("read", "copy"):
                if beside := found.pop(f"hot {name}", None):
                    hot |= {f"of_{name}": ratio(hot, beside), name: beside}
        if isinstance(self.clock, CudaClock):
            row["called"] = found.pop("called")
            row |= {"host_seconds": self.clock.host_seconds(kernel), "late": self.clock.late}
            row["captured"] = not case.reads_back
        row["rivals"] = {name.removeprefix(_RIVAL): entry for name, entry in found.items()}
        row["rivals_failed"] = failed
        return row
