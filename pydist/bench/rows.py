"""Which rows are measured, and in which order; what fails costs no row but its own."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pydist.bench import options as arguments
from pydist.bench.case import BITS, COMPILED, Case, Maker
from pydist.bench.cases import cases
from pydist.bench.measure import DIFFERS, Bench, Outcome
from pydist.bench.show import title
from pydist.bench.workers import Workers

Report = dict[str, Any]
Goals = Callable[[Sequence[Report], Report], list[Report]]
"""What rows, on a machine, are held against: texts, what was measured, and verdicts."""
Measured = Callable[[int, Case], Outcome]

_NO_TIME = "no time left (--budget)"
_NO_FIGURES = "the row with the package's own module has no figures"


def no_goals(rows: Sequence[Report], machine: Report) -> list[Report]:
    """Figures without a verdict."""
    return []


def plan(options: argparse.Namespace) -> list[Case]:
    """All cases asked for: sizes that decide first; last, once more, those that are compiled.

    Compiling takes seconds per case, which would otherwise be missing for rows that decide. A case
    that comes again takes the place of its first row, so that all in a row stays side by side.
    """
    device, chosen = options.device, []

    def add(numel: int, compiled: bool) -> list[Case]:
        maker = Maker(numel, device, tuple(options.dtype), compiled)
        return list(cases(maker, options.kernels))

    for numel in arguments.in_order(options.sizes, device):
        chosen += add(numel, compiled=False)
    if options.no_rivals:
        for case in chosen:
            case.rivals.clear()
    elif options.compile:
        again = add(arguments.compiled_size(options.sizes, device), compiled=True)
        chosen += [case for case in again if case.compiled]
    return chosen


def label(case: Case) -> str:
    """The case in words."""
    dtype = "" if case.dtype == BITS else f" {case.dtype}"
    beside = f", beside {COMPILED}" if case.compiled else ""
    return f"{case.name}{dtype} {arguments.shown(case.numel)}{beside}"


@contextlib.contextmanager
def measuring(
    options: argparse.Namespace, module: str, advance: Callable[[], object]
) -> Iterator[Measured]:
    """What measures a case of the plan: this process, or others one after the other.

    Args:
        options: Those of the command.
        module: File of the compiled module to use; empty for the package's own.
        advance: Called after each repeat of a case.
    """
    if not options.isolate:
        bench = Bench(options.device, options.repeats, options.threads, options.clock)
        yield lambda number, case: bench.measured(case, advance)
        return
    workers = Workers(options, module)

    def measured(number: int, case: Case) -> Outcome:
        outcome = workers.measured(number, case)
        for _ in range(options.repeats):
            advance()
        return outcome

    try:
        yield measured
    finally:
        workers.end()


@dataclass
class Rows:
    """What was asked for, and what has been measured of it.

    Attributes:
        options: Those of the command.
        record: Takes ``planned`` (how many rows there should be), ``results``, ``skipped`` and
            ``goals``, which are up to date after every row; with ``--compare-module`` also
            ``other_module``, its results.
        save: Called after every row.
        goals: What the rows are held against.
    """

    options: argparse.Namespace
    record: Report
    save: Callable[[], None]
    goals: Goals = no_goals
    _rows: dict[tuple[Any, ...], Report] = field(default_factory=dict, init=False)

    def measure(self, console: Console) -> None:
        """Runs all cases, with a progress bar."""
        options, start = self.options, time.monotonic()
        # Short ones first: a name has what is left of a line.
        name = TextColumn("{task.description}")
        columns = (BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), name)
        chosen = plan(options)
        once = sum(not case.compiled for case in chosen)
        self.record |= {"planned": once * len(options.threads), "skipped": []}
        if options.compare_module:
            self.record["other_module"] = {
                "file": options.compare_module, "results": [], "skipped": [],
            }  # fmt: skip
        modules = 2 if options.compare_module else 1
        with contextlib.ExitStack() as stack:
            bars = Progress(*columns, console=console, transient=True)
            progress = stack.enter_context(bars)
            bar = progress.add_task("", total=len(chosen) * options.repeats * modules)

            def advance() -> None:
                progress.advance(bar)

            own = stack.enter_context(measuring(options, "", advance))
            other: Measured | None = None
            if options.compare_module:
                file = options.compare_module
                other = stack.enter_context(measuring(options, file, advance))
            for number, case in enumerate(chosen):
                progress.update(bar, description=label(case))
                if options.budget is not None and time.monotonic() - start > options.budget:
                    self._leave_out(case)
                else:
                    self._take(case, own(number, case))
                    if other is not None and not case.compiled:
                        self._take_other(case, other, number)
                self._keep()

    def failures(self) -> list[str]:
        """What has gone wrong, other than time or memory running out."""
        found = [entry["row"] for entry in self.record["skipped"] if entry["failed"]]
        for row in self.record["results"]:
            differ = [name for name, why in row["rivals_failed"].items() if why == DIFFERS]
            found += [f"{name} beside {title(row)}" for name in differ]
        return found

    def _take(self, case: Case, outcome: Outcome) -> None:
        for row in outcome.rows:
            self._rows[_key(case, row["threads"])] = row
        if not outcome.rows:
            self._skip(case, outcome.why, failed=outcome.failed)

    def _take_other(self, case: Case, measured: Measured, number: int) -> None:
        """The same row with the other module, where there is one to hold it against."""
        kept = self.record["other_module"]
        why = _NO_FIGURES
        if _key(case, self.options.threads[0]) in self._rows:
            outcome = measured(number, case)
            kept["results"] += outcome.rows
            why = outcome.why
        if why:
            kept["skipped"].append({"row": label(case), "why": why})

    def _leave_out(self, case: Case) -> None:
        if not case.compiled:
            self._skip(case, _NO_TIME, failed=False)
            return
        for threads in self.options.threads:  # its first row stands; only these rivals are missing
            if row := self._rows.get(_key(case, threads)):
                row["rivals_failed"] |= dict.fromkeys(case.compiled, _NO_TIME)

    def _skip(self, case: Case, why: str, *, failed: bool) -> None:
        self.record["skipped"].append({"row": label(case), "why": why, "failed": failed})

    def _keep(self) -> None:
        names = list(arguments.KERNELS)
        rows = sorted(
            self._rows.values(), key=lambda row: (names.index(row["kernel"]), row["numel"])
        )
        self.record |= {"results": rows, "goals": self.goals(rows, self.record["machine"])}
        self.save()


def _key(case: Case, threads: int) -> tuple[Any, ...]:
    return case.kernel, case.variant, case.dtype, case.numel, threads
