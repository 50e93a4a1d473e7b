"""Every kernel against the memory of this machine, and against what people use today.

    python bench/kernels.py
    python bench/kernels.py --kernels pack_signs lion_pack_ --dtype float32 --json out.json

In each repeat a read (``torch.sum``), a copy (``copy_``), the kernel and its rivals run one after
the other, so that a slow spell of the machine hits all alike; the percentages are medians of each
repeat's own ratio. Bytes are the least that the kernel must move, memory is cold.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# An idle OpenMP thread of torch spins for milliseconds on the core that pydist's thread wants.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from cluster import machine
from kernel_cases import BITS, Case, Maker
from kernel_goals import verdicts
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from timing import Buffers, Clock, Ring, Task, cold_bytes, compare, spread

from pydist import _C
from pydist.environment import describe

KERNELS = (
    "pack_signs",
    "unpack_signs",
    "count_votes",
    "majority_vote",
    "lion_pack_",
    "lion_apply_",
)
DTYPES = ("float32", "bfloat16", "float16")
RIVAL_REPEATS = 5  # rivals are up to a hundred times slower; their place is known soon enough

Report = dict[str, Any]


class UsageError(ValueError):
    """What was asked for can't be measured here."""


# ---------------------------------------------------------------- measuring


def references(numel: int, device: str, cold: int) -> dict[str, Task]:
    """The bandwidths that kernels are held to: a read and a copy of ``numel`` float32."""
    source, target = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    reads = Ring.filled(Buffers(source=source), cold)
    copies = Ring.filled(Buffers(source=source.clone(), target=target), cold)
    return {
        "read": Task(lambda s: s.source.sum(), reads, 4 * numel),
        "copy": Task(lambda s: s.target.copy_(s.source), copies, 8 * numel),
    }


def tasks_of(case: Case, cold: int) -> tuple[Task, dict[str, Task]]:
    """The case's kernel and its rivals, on one ring of buffers."""
    ring = Ring.filled(case.make(), cold)
    kernel = Task(case.run, ring, case.bytes)
    return kernel, {rival.name: Task(rival.run, ring, case.bytes) for rival in case.rivals}


def check_rivals(case: Case) -> None:
    """Raises AssertionError where a rival answers something else than the kernel."""
    buffers = case.make()
    answer = case.run(buffers)
    for rival in case.rivals:
        other = rival.run(buffers)
        if other is not None and answer is not None and not torch.equal(other, answer):
            raise AssertionError(f"{rival.name} and {case.name} ({case.dtype}) differ")


class Bench:
    """Times cases in turn with the two references.

    Attributes:
        options: The command line.
        clock: Of the device.
        cold: Bytes that make a ring of buffers cold.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = Clock(options.device, options.clock)
        self.cold = cold_bytes(options.device)
        self.references = references(options.numel, options.device, self.cold)
        self.reference_calls: dict[tuple[int, str], int] = {}

    def run(self, case: Case, progress: Progress, bar: Any) -> list[Report]:
        """One row for each number of threads."""
        check_rivals(case)
        kernel, rivals = tasks_of(case, self.cold)
        tasks = {**self.references, "kernel": kernel, **rivals}
        threaded = {rival.name: rival.threaded for rival in case.rivals}
        plan = []
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            for name, task in tasks.items():
                if threaded.get(name, True) or threads == self.options.threads[0]:
                    plan.append((threads, name, task, self._calls(threads, name, task)))
        samples: dict[tuple[int, str], list[float]] = {(t, name): [] for t, name, _, _ in plan}
        for repeat in range(self.options.repeats):
            for threads, name, task, calls in plan:
                if name in rivals and repeat >= RIVAL_REPEATS:
                    continue
                torch.set_num_threads(threads)
                samples[threads, name].append(self.clock.seconds(task, calls))
            progress.advance(bar)
        return [self._row(case, threads, tasks, samples) for threads in self.options.threads]

    def _calls(self, threads: int, name: str, task: Task) -> int:
        if name not in self.references:
            return self.clock.calls_for(task)
        if (threads, name) not in self.reference_calls:
            self.reference_calls[threads, name] = self.clock.calls_for(task)
        return self.reference_calls[threads, name]

    def _row(
        self,
        case: Case,
        threads: int,
        tasks: dict[str, Task],
        samples: dict[tuple[int, str], list[float]],
    ) -> Report:
        found = {
            name: {"bytes": task.bytes, "samples": samples[threads, name]}
            for name, task in tasks.items()
            if (threads, name) in samples
        }
        for entry in found.values():
            entry["seconds"] = spread(entry["samples"])
            entry["gigabytes_per_second"] = entry["bytes"] / entry["seconds"]["median"] / 1e9
        kernel, read, copy = (found.pop(name) for name in ("kernel", "read", "copy"))
        return {
            "kernel": case.kernel,
            "variant": case.variant,
            "dtype": case.dtype,
            "threads": threads,
            **kernel,
            "of_read": compare(kernel, read),
            "of_copy": compare(kernel, copy),
            "read": read,
            "copy": copy,
            "rivals": found,
        }


# ---------------------------------------------------------------- showing


def paired(ratio: dict[str, float]) -> str:
    """A percentage: the median of the repeats' ratios, and the ratio of the medians."""
    return f"{100 * ratio['median']:.0f} ({100 * ratio['of_medians']:.0f})"


def title_of(row: Report) -> str:
    """Kernel and variant."""
    return f"{row['kernel']} ({row['variant']})" if row["variant"] else row["kernel"]


def show(rows: Sequence[Report], title: str, console: Console) -> None:
    """Prints the figures; a rival's last column says how many times slower it is."""
    caption = "percent: median of each repeat's ratio (ratio of medians); bytes: the least possible"
    table = Table(title=title, caption=caption)
    for head in ("", "dtype", "thr", "ms", "quartiles", "GB/s", "% read", "% copy"):
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            f"[bold]{title_of(row)}", row["dtype"], str(row["threads"]), *_times(seconds),
            f"{row['gigabytes_per_second']:.2f}", paired(row["of_read"]), paired(row["of_copy"]),
        )  # fmt: skip
        for name, rival in row["rivals"].items():
            slower = rival["seconds"]["median"] / seconds["median"]
            table.add_row(
                f"  [dim]{name}", "", "", *_times(rival["seconds"]),
                f"{rival['gigabytes_per_second']:.2f}", "", f"{slower:.1f}x time",
            )  # fmt: skip
    console.print(table)


def _times(seconds: dict[str, float]) -> tuple[str, str]:
    low, high = 1e3 * seconds["lower_quartile"], 1e3 * seconds["upper_quartile"]
    digits = 2 if low >= 1 else 4
    return f"{1e3 * seconds['median']:.{digits}f}", f"{low:.{digits}f} - {high:.{digits}f}"


def show_references(rows: Sequence[Report], console: Console) -> dict[str, Report]:
    """Prints what memory gave during the run; returns it by number of threads."""
    found: dict[str, Report] = {}
    for threads in sorted({row["threads"] for row in rows}):
        entry = {}
        for name in ("read", "copy"):
            here = [row[name] for row in rows if row["threads"] == threads]
            seconds = [s for series in here for s in series["samples"]]
            entry[name] = {k: here[0]["bytes"] / s / 1e9 for k, s in spread(seconds).items()}
        found[str(threads)] = entry
        console.print(
            f"{threads} thread(s): read {entry['read']['median']:.2f} GB/s, "
            f"copy {entry['copy']['median']:.2f} GB/s (medians over the whole run)"
        )
    return found


def show_goals(rows: Sequence[Report], device: str, console: Console) -> list[Report]:
    """Prints each goal with what was measured."""
    found = verdicts(rows, device)
    if found:
        console.print("\n[bold]Goals")
    colours = {"yes": "green", "no": "red"}
    for goal in found:
        met = goal["met"]
        console.print(
            f"  {goal['goal']:<66} {goal['measured']:<24} [{colours.get(met, 'yellow')}]{met}"
        )
    return found


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Kernels against memory bandwidth and against what people use today."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, default=32 << 20, help="elements, a multiple of 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--isa", help="instruction set of the CPU kernels; default the best")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time that the thread had a core, where others use the machine; --threads 1 only",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> None:
    """Checks the options against this machine.

    Raises:
        UsageError: Something asked for is not here.
    """
    if options.numel <= 0 or options.numel % 32:
        raise UsageError(f"--numel must be a positive multiple of 32, got {options.numel}")
    if options.repeats < 1 or min(options.threads) < 1:
        raise UsageError("--repeats and --threads must be at least 1")
    options.threads = list(dict.fromkeys(options.threads))
    if options.clock == "cpu" and (options.threads != [1] or options.device != "cpu"):
        raise UsageError("--clock cpu counts one thread: add --threads 1, on the CPU")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no CUDA device here")
        if _C.CUDA_BUILD is None:
            raise UsageError("--device cuda: pydist was built without CUDA (see `pydist info`)")
        options.threads = [1]
    elif options.isa:
        try:
            _C.select_isa(options.isa)
        except ValueError as error:
            raise UsageError(f"--isa: {error}") from None
    torch.set_num_threads(options.threads[0])


def surroundings(options: argparse.Namespace) -> Report:
    """The machine and the versions that the figures depend on."""
    found = machine() | {
        key: value
        for key, value in describe().items()
        if key in ("version", "wire_version", "numpy", "isa", "supported_isas", "cuda_build")
    }
    if options.device == "cuda":
        found["cuda_device"] = torch.cuda.get_device_name()
    return found | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]}


def measure(options: argparse.Namespace, console: Console) -> list[Report]:
    """Runs all cases asked for, with a progress bar."""
    maker = Maker(options.numel, options.device, tuple(options.dtype))
    cases = [case for case in maker.cases() if case.kernel in options.kernels]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Report] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(cases) * options.repeats)
        bench = Bench(options)
        for case in cases:
            dtype = "" if case.dtype == BITS else f" {case.dtype}"
            progress.update(bar, description=f"{case.kernel}{dtype}")
            rows += bench.run(case, progress, bar)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, writes; returns the exit status."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    try:
        prepare(options)
        record: Report = {
            "command": shlex.join(["python", "bench/kernels.py", *arguments]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": surroundings(options),
            "options": vars(options),
        }
        rows = measure(options, console)
    except UsageError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    record["machine"]["load_after"] = os.getloadavg()[0]
    where = record["machine"].get("cuda_device") or f"CPU, {record['machine']['isa']}"
    show(rows, f"{options.numel:,} elements on {where}, {options.clock} clock", console)
    record["memory_gigabytes_per_second"] = show_references(rows, console)
    record["goals"] = show_goals(rows, options.device, console)
    if options.json:
        record["results"] = rows
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
