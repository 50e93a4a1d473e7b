"""Tables of the kernel benchmark, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pydist.bench.options import shown
from pydist.bench.timing import spread

Report = dict[str, Any]


def _name(row: Report) -> str:
    return f"{row['kernel']} ({row['variant']})" if row["variant"] else row["kernel"]


def title(row: Report) -> str:
    """What a row measured, in words."""
    threads = f", {row['threads']} thread(s)" if row["threads"] else ""
    return f"{_name(row)} {row['dtype']}, {shown(row['numel'])}{threads}"


def _paired(ratio: dict[str, float]) -> str:
    """A percentage: the median of the repeats' ratios, and the ratio of the medians."""
    return f"{100 * ratio['median']:.0f} ({100 * ratio['of_medians']:.0f})"


def _times(seconds: dict[str, float]) -> tuple[str, str]:
    low, high = 1e6 * seconds["lower_quartile"], 1e6 * seconds["upper_quartile"]
    digits = 0 if low >= 1000 else 1 if low >= 100 else 2
    return (
        f"{1e6 * seconds['median']:,.{digits}f}",
        f"{low:,.{digits}f} - {high:,.{digits}f}",
    )


def show_rows(rows: Sequence[Report], title: str, device: str, console: Console) -> None:
    """Prints the figures; a rival's last column says how many times slower it is."""
    cuda = device == "cuda"
    caption = "percent: median of each repeat's ratio (ratio of medians); bytes: the least possible"
    if cuda:
        caption += (
            "\nµs, GB/s and %: the device alone, from a replayed graph; rivals and 'called': as a "
            "program calls them; 'host': until a call returns"
        )
    table = Table(title=title, caption=caption)
    heads = ["", "dtype", "size", "µs", "quartiles", "GB/s", "% read", "% copy"]
    heads += ["hot µs", "called µs", "host µs"] if cuda else ["threads"]
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for row in rows:
        last = [str(row["threads"])]
        if cuda:
            last = [_times(row[key]["seconds"])[0] for key in ("hot", "called")]
            last.append(f"{1e6 * row['host_seconds']:.1f}")
        table.add_row(
            f"[bold]{_name(row)}", row["dtype"], shown(row["numel"]), *_times(row["seconds"]),
            f"{row['gigabytes_per_second']:.2f}", _paired(row["of_read"]),
            _paired(row["of_copy"]), *last,
        )  # fmt: skip
        mine = (row["called"] if cuda else row)["seconds"]["median"]
        for name, rival in row["rivals"].items():
            table.add_row(
                f"  [dim]{name}", "", "", *_times(rival["seconds"]),
                f"{rival['gigabytes_per_second']:.2f}", "",
                f"{rival['seconds']['median'] / mine:.1f}x time",
            )  # fmt: skip
        if not row.get("captured", True):
            table.add_row("  [dim]waits for the device: timed as called, not from a graph")
        if row.get("late"):
            table.add_row(
                f"  [dim]{row['late']} samples of it were late: they hold time of the host"
            )
        for name, why in row["rivals_failed"].items():
            table.add_row(f"  [dim]{name}: {why}")
    console.print(table)


def show_references(rows: Sequence[Report], console: Console) -> dict[str, Report]:
    """Prints what memory gave during the run; returns it by number of threads and size."""
    found: dict[str, Report] = {}
    keys = sorted({(row["threads"], row["copy"]["bytes"]) for row in rows})
    for threads, size in keys:
        here = [row for row in rows if (row["threads"], row["copy"]["bytes"]) == (threads, size)]
        entry: Report = {}
        for name in ("read", "copy"):
            speeds = [row[name]["bytes"] / s / 1e9 for row in here for s in row[name]["samples"]]
            entry[name] = spread(speeds)
        elements = shown(round(size / 8))
        found[f"{threads} threads, {elements}" if threads else elements] = entry
        where = f"{threads} thread(s), " if threads else ""
        console.print(
            f"{where}{elements} float32: read {entry['read']['median']:.2f} GB/s, "
            f"copy {entry['copy']['median']:.2f} GB/s (medians over the whole run)"
        )
    return found


def show_goals(found: Sequence[Report], console: Console) -> None:
    """Prints each goal with what was measured."""
    if found:
        console.print("\n[bold]Goals")
    colours = {"yes": "green", "no": "red"}
    for goal in found:
        met, model = goal["met"], ""
        if "model" in goal:
            model = f"model {goal['model']:.2f}"
        console.print(
            f"  {goal['goal']:<78} {goal['measured']:<24} {model:<12} "
            f"[{colours.get(met, 'yellow')}]{met}"
        )


# ---------------------------------------------------------------- an earlier run


def _key(row: Report, record: Report) -> tuple[Any, ...]:
    numel = row["numel"] if "numel" in row else record["options"]["numel"]
    return row["kernel"], row["variant"], row["dtype"], numel, row["threads"]


def compared(record: Report, old: Report) -> list[Report]:
    """Rows that both runs have: how many times faster the new one is, and beyond the spread?

    Args:
        record: This run, as ``--json`` writes it.
        old: An earlier one.
    """
    before = {_key(row, old): row for row in old["results"]}
    found = []
    for row in record["results"]:
        was = before.get(_key(row, record))
        if was is None:
            continue
        new_s, old_s = row["seconds"], was["seconds"]
        apart = (
            new_s["upper_quartile"] < old_s["lower_quartile"]
            or new_s["lower_quartile"] > old_s["upper_quartile"]
        )
        found.append(
            {
                "row": row,
                "speedup": old_s["median"] / new_s["median"],
                "of_copy": row["of_copy"]["median"] / was["of_copy"]["median"],
                "beyond_spread": apart,
            }
        )
    return found


def show_comparison(found: Sequence[Report], name: str, console: Console) -> None:
    """Prints what changed since an earlier run."""
    table = Table(
        title=f"against {name}",
        caption="above 1: faster now; *: beyond the quartiles of both runs. On a shared machine "
        "trust the ratio of the shares of a copy",
    )
    for head in ("", "dtype", "size", "threads", "time then / now", "share of copy now / then"):
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for entry in found:
        row, mark = entry["row"], "*" if entry["beyond_spread"] else " "
        slower = entry["beyond_spread"] and entry["speedup"] < 1
        colour = "[red]" if slower else "[green]" if entry["beyond_spread"] else ""
        table.add_row(
            _name(row), row["dtype"], shown(row["numel"]), str(row["threads"] or ""),
            f"{colour}{entry['speedup']:.3f}{mark}", f"{entry['of_copy']:.3f}",
        )  # fmt: skip
    console.print(table)
