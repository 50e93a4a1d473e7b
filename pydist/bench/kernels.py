"""Every kernel against the memory of this machine, and against what people use today.

In each repeat a read (``torch.sum``), a copy (``copy_``), the kernel and its rivals run one after
the other, so that a slow spell of the machine hits all alike; the percentages are medians of each
repeat's own ratio. Bytes are the least that the kernel must move, memory is cold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from pydist import _C
from pydist.bench import goals, show
from pydist.bench import options as arguments
from pydist.bench.cases import BITS, Case, Maker
from pydist.bench.machine import machine
from pydist.bench.measure import Bench
from pydist.environment import describe

Report = dict[str, Any]
_NOT_RECORDED = ("run", "typed", "command", "benchmark", "json", "table", "plot")


class UsageError(ValueError):
    """What was asked for can't be measured here."""


def prepare(options: argparse.Namespace) -> None:
    """Checks the options against this machine, and fills in what was left out.

    Raises:
        UsageError: Something asked for is not here.
    """
    cuda = options.device == "cuda"
    sizes = options.sizes or [arguments.size(text) for text in arguments.SIZES[options.device]]
    options.sizes = sorted(set(sizes))
    if options.compile is None:
        options.compile = cuda
    threads = options.threads or ([1, 2] if options.clock == "wall" else [1])
    options.threads = [0] if cuda else list(dict.fromkeys(threads))
    if options.repeats < 1 or min(threads) < 1:
        raise UsageError("--repeats and --threads must be at least 1")
    if options.clock == "cpu" and options.threads != [1]:
        raise UsageError("--clock cpu counts one thread: add --threads 1, on the CPU")
    if cuda:
        _check_cuda()
    elif options.isa:
        try:
            _C.select_isa(options.isa)
        except ValueError as error:
            raise UsageError(f"--isa: {error}") from None
    if options.plot:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            raise UsageError("--plot needs matplotlib: pip install 'pydist[bench]'") from None
    if options.compare and not Path(options.compare).is_file():
        raise UsageError(f"--compare: there is no file {options.compare}")


def _check_cuda() -> None:
    if _C.CUDA_BUILD is None:
        raise UsageError("--device cuda: pydist was built without CUDA (see `pydist info`)")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device: torch finds none here")


def surroundings(options: argparse.Namespace) -> Report:
    """The machine and the versions that the figures depend on."""
    found = machine() | {
        key: value
        for key, value in describe().items()
        if key in ("version", "wire_version", "numpy", "isa", "supported_isas", "cuda_build")
    }
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "cuda_device": properties.name,
            "cuda_memory": properties.total_memory,
            "cuda_l2": properties.L2_cache_size,
            "torch_cuda": torch.version.cuda,
        }
    return found | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset")}


def cases(options: argparse.Namespace) -> Iterator[tuple[Case, int]]:
    """All cases asked for, and how many there are."""
    chosen = []
    for numel in reversed(options.sizes):  # the goals first, should there be a budget
        compiled = options.compile and numel == options.sizes[-1] and not options.no_rivals
        maker = Maker(numel, options.device, tuple(options.dtype), compiled)
        chosen += [case for case in maker.cases() if case.kernel in options.kernels]
    for case in chosen:
        if options.no_rivals:
            case.rivals.clear()
        yield case, len(chosen)


def measure(options: argparse.Namespace, console: Console, skipped: list[Report]) -> list[Report]:
    """Runs all cases asked for, with a progress bar; ``skipped`` takes those that did not fit."""
    start = time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    bench = Bench(options.device, options.repeats, options.threads, options.clock)
    rows: list[Report] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        for case, count in cases(options):
            dtype = "" if case.dtype == BITS else f" {case.dtype}"
            label = f"{case.kernel}{dtype} {arguments.shown(case.numel)}"
            progress.update(bar, description=label, total=count * options.repeats)
            if options.budget is not None and time.monotonic() - start > options.budget:
                skipped.append({"row": f"{case.name} {label}", "why": "no time left (--budget)"})
                continue
            try:
                rows += bench.run(case, lambda: progress.advance(bar))
            except torch.OutOfMemoryError as error:
                skipped.append({"row": f"{case.name} {label}", "why": str(error).split(". ")[0]})
            if options.device == "cuda":
                torch.cuda.empty_cache()
    names = list(arguments.KERNELS)
    return sorted(rows, key=lambda row: (names.index(row["kernel"]), row["numel"]))


def report(options: argparse.Namespace, record: Report, console: Console) -> None:
    """Prints the tables, and adds to the record what they hold."""
    rows, found = record["results"], record["machine"]
    where = found.get("cuda_device") or f"CPU, {found['isa']}"
    show.show_rows(rows, f"kernels on {where}, {options.clock} clock", options.device, console)
    record["memory_gigabytes_per_second"] = show.show_references(rows, console)
    for entry in record["skipped"]:
        console.print(f"[yellow]not measured: {entry['row']}: {entry['why']}")
    record["goals"] = show.show_goals(rows, options.device, console)
    if options.compare:
        old = json.loads(Path(options.compare).read_text())
        changed = show.compared(record, old)
        show.show_comparison(changed, options.compare, console)
        record["compared"] = {
            "with": options.compare,
            "rows": [{**entry, "row": goals.title(entry["row"])} for entry in changed],
        }


def write(options: argparse.Namespace, record: Report) -> None:
    """Writes the files that were asked for."""
    if options.json:
        _path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    if options.table:
        with _path(options.table).open("w") as file:
            report(options, record, Console(width=170, file=file, highlight=False, no_color=True))
    if options.plot:
        from pydist.bench.plot import draw

        found = record["machine"]
        draw(record["results"], found.get("cuda_device") or found["cpu"], _path(options.plot))


def _path(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(options: argparse.Namespace, command: str) -> int:
    """Measures, prints, writes.

    Args:
        options: Those of :func:`pydist.bench.options.add_arguments`.
        command: What was typed, for the record.

    Returns:
        The exit status: 2 where something asked for is not here.
    """
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    try:
        prepare(options)
        record: Report = {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": surroundings(options),
            "options": {k: v for k, v in vars(options).items() if k not in _NOT_RECORDED},
            "skipped": [],
        }
        record["results"] = measure(options, console, record["skipped"])
    except UsageError as error:
        print(f"pydist bench kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    record["machine"]["load_after"] = os.getloadavg()[0]
    report(options, record, console)
    write(options, record)
    return 0
