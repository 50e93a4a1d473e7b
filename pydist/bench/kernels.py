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
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pydist import _C
from pydist.bench import options as arguments
from pydist.bench import show
from pydist.bench.machine import machine
from pydist.bench.rows import Goals, Rows, no_goals
from pydist.kernels.environment import describe

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
    options.kernels = [kernel for kernel in options.kernels if kernel not in options.without]
    if not options.kernels:
        raise UsageError("--without leaves no kernel")
    if options.compile is None:
        options.compile = cuda
    threads = options.threads or ([1, 2] if options.clock == "wall" else [1])
    if options.isolate is None:
        options.isolate = cuda
    options.isolate = options.isolate or bool(options.compare_module)
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
            raise UsageError("--plot needs matplotlib: pip install 'pydist-train[bench]'") from None
    for name in ("compare", "compare_module"):
        file = getattr(options, name)
        if file and not Path(file).is_file():
            raise UsageError(f"--{name.replace('_', '-')}: there is no file {file}")


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
            "cuda_multiprocessors": properties.multi_processor_count,
            "cuda_clock_hz": 1000 * getattr(properties, "clock_rate", 0),
            "torch_cuda": torch.version.cuda,
        }
    return found | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset")}


def report(options: argparse.Namespace, record: Report, console: Console) -> None:
    """Prints the tables, and adds to the record what they hold."""
    rows, found = record["results"], record["machine"]
    where = found.get("cuda_device") or f"CPU, {found['isa']}"
    show.show_rows(rows, f"kernels on {where}, {options.clock} clock", options.device, console)
    record["memory_gigabytes_per_second"] = show.show_references(rows, console)
    for entry in record["skipped"]:
        console.print(f"[yellow]not measured: {entry['row']}: {entry['why']}")
    show.show_goals(record["goals"], console)
    if options.compare:
        old = json.loads(Path(options.compare).read_text())
        record["compared"] = _compare(record, old, options.compare, console)
    if other := record.get("other_module"):
        old = {"results": other["results"], "options": record["options"]}
        other["compared"] = _compare(record, old, Path(other["file"]).name, console)
        for entry in other["skipped"]:
            console.print(f"[yellow]not measured with the other: {entry['row']}: {entry['why']}")
    planned, missing = record["planned"], record["planned"] - len(rows)
    console.print(f"{missing} of {planned} rows not measured" if missing else f"{planned} rows")


def _compare(record: Report, old: Report, name: str, console: Console) -> Report:
    """Prints how many times faster the rows are than those of ``old``, and returns it."""
    changed = show.compared(record, old)
    show.show_comparison(changed, name, console)
    rows = [{**entry, "row": show.title(entry["row"])} for entry in changed]
    return {"with": name, "rows": rows}


def save(options: argparse.Namespace, record: Report, indent: int | None = None) -> None:
    """Writes the figures; whoever reads them meanwhile, or ends this, finds a whole file.

    Args:
        options: Those of the command.
        record: What to write.
        indent: None is quick enough to do so after every row.
    """
    if options.json:
        path = _path(options.json)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(record, indent=indent) + "\n")
        part.replace(path)


def write(options: argparse.Namespace, record: Report) -> None:
    """Writes the files that were asked for."""
    save(options, record, indent=1)
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


def main(options: argparse.Namespace, command: str, goals: Goals = no_goals) -> int:
    """Measures, prints, writes.

    Args:
        options: Those of :func:`pydist.bench.options.add_arguments`.
        command: What was typed, for the record.
        goals: What the rows are held against; by default nothing.

    Returns:
        The exit status: 1 where a row failed or a rival answers otherwise than the kernel, 2 where
        something asked for is not here.
    """
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    try:
        prepare(options)
        record: Report = {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": surroundings(options),
            "options": {k: v for k, v in vars(options).items() if k not in _NOT_RECORDED},
        }
        rows = Rows(options, record, lambda: save(options, record), goals)
        rows.measure(console)
    except UsageError as error:
        print(f"pydist bench kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    record["machine"]["load_after"] = os.getloadavg()[0]
    report(options, record, console)
    write(options, record)
    if failed := rows.failures():
        more = f" and {len(failed) - 1} more" if failed[1:] else ""
        print(f"pydist bench kernels: failed: {failed[0]}{more}", file=sys.stderr)
    return 1 if failed else 0
