"""Which rows are measured, and in which order; what fails costs no row but its own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from pydist.bench import goals
from pydist.bench import options as arguments
from pydist.bench.cases import BITS, COMPILED, Case, Maker
from pydist.bench.measure import DIFFERS, Bench, brief

Report = dict[str, Any]
_NO_TIME = "no time left (--budget)"


def plan(options: argparse.Namespace) -> list[Case]:
    """All cases asked for: sizes with goals first; last, once more, those that are compiled.

    Compiling takes seconds a case, which would otherwise be missing for rows with a goal. A case
    that comes again takes the place of its first row, so that all in a row stays side by side.
    """
    device, chosen = options.device, []

    def add(numel: int, compiled: bool) -> list[Case]:
        maker = Maker(numel, device, tuple(options.dtype), compiled)
        return [case for case in maker.cases() if case.kernel in options.kernels]

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


@dataclass
class Rows:
    """What was asked for, and what has been measured of it.

    Attributes:
        options: Those of the command.
        record: Takes ``planned`` (how many rows there should be), ``results``, ``skipped`` and
            ``goals``, which are up to date after every row.
        save: Called after every row.
    """

    options: argparse.Namespace
    record: Report
    save: Callable[[], None]
    _rows: dict[tuple[Any, ...], Report] = field(default_factory=dict, init=False)

    def measure(self, console: Console) -> None:
        """Runs all cases, with a progress bar."""
        options, start = self.options, time.monotonic()
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        bench = Bench(options.device, options.repeats, options.threads, options.clock)
        chosen = plan(options)
        once = sum(not case.compiled for case in chosen)
        self.record |= {"planned": once * len(options.threads), "skipped": []}
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(chosen) * options.repeats)
            for case in chosen:
                progress.update(bar, description=label(case))
                if options.budget is not None and time.monotonic() - start > options.budget:
                    self._leave_out(case)
                else:
                    self._run(bench, case, lambda: progress.advance(bar))
                self._keep()

    def failures(self) -> list[str]:
        """What has gone wrong, other than time or memory running out."""
        found = [entry["row"] for entry in self.record["skipped"] if entry["failed"]]
        for row in self.record["results"]:
            differ = [name for name, why in row["rivals_failed"].items() if why == DIFFERS]
            found += [f"{name} beside {goals.title(row)}" for name in differ]
        return found

    def _run(self, bench: Bench, case: Case, advance: Callable[[], object]) -> None:
        try:
            for row in bench.run(case, advance):
                self._rows[_key(case, row["threads"])] = row
            if self.options.device == "cuda":
                torch.cuda.empty_cache()
        except torch.OutOfMemoryError as error:
            self._skip(case, str(error).split(". ")[0], failed=False)
        except Exception as error:  # a kernel, a capture, a clock: the other rows are still wanted
            self._skip(case, brief(error), failed=True)

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
        self.record |= {"results": rows, "goals": goals.verdicts(rows, self.options.device)}
        self.save()


def _key(case: Case, threads: int) -> tuple[Any, ...]:
    return case.kernel, case.variant, case.dtype, case.numel, threads
