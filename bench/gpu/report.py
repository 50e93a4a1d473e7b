"""What `make gpu` found, as text: the kernels, the counters, the hooks, and the steps last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from counters import shown as counters_shown
from hook import shown as hooks_shown
from hook import where_it_waits
from plan import FILES
from steps import ROOT, Step

sys.path.insert(0, str(ROOT / "bench"))
from kernel_model import share_of_copy

Row = dict[str, Any]
NAME_WIDTH = 50


def report(steps: Sequence[Step], out: Path) -> str:
    """Markdown: what the files of the steps hold, then a table of the steps.

    A file that can't be read is named, and takes nothing else along.
    """
    parts: tuple[tuple[str, Callable[[Any], Iterator[str]]], ...] = (
        ("environment", _environment), ("rivals", _rivals), ("kernels", _kernels),
        ("counters", _counters), ("hook", _hooks),
    )  # fmt: skip
    lines: list[str] = []
    for step, shown in parts:
        file = out / FILES[step]
        if not file.exists():
            continue
        try:
            text = list(shown(json.loads(file.read_text())))
        except (ValueError, KeyError, TypeError) as error:
            text = [f"{file.name}: {type(error).__name__}: {error}"]
        lines += ["```", *text, "```", ""] if text else []
    return "\n".join([*lines, *_steps(steps)])


def _steps(steps: Sequence[Step]) -> Iterator[str]:
    yield "| step | verdict | seconds | expected | |"
    yield "|---|---|---|---|---|"
    for step in steps:
        verdict, note = step.verdict or "not yet", step.note.replace("|", "/")
        yield f"| {step.name} | {verdict} | {step.seconds:.0f} | {step.expected:.0f} | {note} |"


def _environment(found: Row) -> Iterator[str]:
    packages = {**found["packages"], "cuda": found.get("torch_cuda"), "nccl": found.get("nccl")}
    named = (f"{name} {version}" for name, version in packages.items() if version)
    yield f"{found.get('device', 'CPU')}, {found['cores']} cores, Python {found['python']}"
    yield ", ".join(named)
    yield f"nvidia-smi: {found['nvidia_smi']}"
    if "copy_gigabytes_per_second" in found:
        copy, read = (found[f"{name}_gigabytes_per_second"] for name in ("copy", "read"))
        yield f"copy {copy:.0f} GB/s, read {read:.0f} GB/s"


# --------------------------------------------------------------------------- kernels


def _kernels(record: Row) -> Iterator[str]:
    other = record.get("other_module", {}).get("compared", {})
    ratios = {entry["row"]: entry["speedup"] for entry in other.get("rows", [])}
    beside = f"{'old/new':>8}" if ratios else ""
    heads = f"{'dtype':<8} {'µs':>8} {'GB/s':>6} {'copy':>5} {'model':>6}{beside}"
    yield f"{'kernels alone':<{NAME_WIDTH}} {heads}"
    for row in record["results"]:
        name, share = _name(row)[:NAME_WIDTH], share_of_copy(row, record["machine"])
        model = f"{100 * share:.0f}%" if share is not None else "-"
        ratio = f"{ratios[title]:>8.2f}" if (title := _title(row)) in ratios else ""
        yield (
            f"{name:<{NAME_WIDTH}} {row['dtype']:<8} {1e6 * row['seconds']['median']:>8.1f} "
            f"{row['gigabytes_per_second']:>6.0f} {100 * row['of_copy']['median']:>4.0f}% "
            f"{model:>6}{ratio}"
        )
    yield from _end(record)


def _rivals(record: Row) -> Iterator[str]:
    heads = f"{'size':>5} {'µs':>8} {'called':>8}"
    yield f"{'kernels beside rivals, times as called':<{NAME_WIDTH}} {heads}"
    for row in record["results"]:
        taken = row.get("called", row)["seconds"]["median"]
        yield (
            f"{_name(row)[:NAME_WIDTH]:<{NAME_WIDTH}} {_size(row['numel']):>5} "
            f"{1e6 * row['seconds']['median']:>8.1f} {1e6 * taken:>8.1f}"
        )
        for name, rival in row["rivals"].items():
            yield f"  {name:<{NAME_WIDTH + 13}} {rival['seconds']['median'] / taken:>8.1f}x"
        for name, why in row["rivals_failed"].items():
            yield f"  {name}: {why}"
    yield from _end(record)


def _name(row: Row) -> str:
    return f"{row['kernel']} ({row['variant']})" if row["variant"] else str(row["kernel"])


def _title(row: Row) -> str:
    """As the benchmark calls a row."""
    threads = f", {row['threads']} thread(s)" if row["threads"] else ""
    return f"{_name(row)} {row['dtype']}, {_size(row['numel'])}{threads}"


def _end(record: Row) -> Iterator[str]:
    """Goals, and what was not measured."""
    goals, rows = record["goals"], record["results"]
    met = sum(goal["met"] == "yes" for goal in goals)
    yield f"{met} of {len(goals)} goals met; {len(rows)} of {record['planned']} rows measured"
    for entry in record["skipped"]:
        if entry["failed"]:
            yield f"FAILED: {entry['row']}: {entry['why']}"


def _size(numel: int) -> str:
    return f"{numel >> 20}Mi" if numel >= 1 << 20 else f"{numel >> 10}Ki"


# --------------------------------------------------------------------------- counters, hooks


def _counters(rows: Sequence[Row]) -> Iterator[str]:
    if any("seconds" in row for row in rows):
        yield from counters_shown(rows)


def _hooks(rows: list[Row]) -> Iterator[str]:
    yield from hooks_shown(rows)
    yield from where_it_waits(rows)
