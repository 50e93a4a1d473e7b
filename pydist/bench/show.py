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


def _paired(ratio: dict[str, float], *, wide: bool) -> str:
    """A percentage: the median of the repeats' ratios, and the ratio of the medians."""
    rest = f" ({100 * ratio['of_medians']:.0f})" if wide else ""
    return f"{100 * ratio['median']:.0f}{rest}"


def _times(seconds: dict[str, float]) -> tuple[str, str]:
    low, high = 1e6 * seconds["lower_quartile"], 1e6 * seconds["upper_quartile"]
    digits = 0 if low >= 1000 else 1 if low >= 100 else 2
    return (
        f"{1e6 * seconds['median']:,.{digits}f}",
        f"{low:,.{digits}f} - {high:,.{digits}f}",
    )


def _table(heads: Sequence[str], title: str, caption: str) -> Table:
    """A table whose first column holds names, which are folded and never cut."""
    table = Table(title=title, caption=caption)
    table.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    return table


WIDE = 118
"""Columns of a terminal that has room for all that was measured."""


_HOT_SHARES = ("hot % read", "hot % copy")


def _heads(cuda: bool, wide: bool) -> list[str]:
    heads = ["", "dtype", "size", "µs", "quartiles", "GB/s", "% read", "% copy"]
    heads += ["hot µs", "called µs", "host µs"] if cuda else ["hot µs", *_HOT_SHARES, "threads"]
    left_out = () if wide else ("quartiles", "threads", "hot µs", *_HOT_SHARES, "host µs")
    if cuda and not wide:
        left_out = (*left_out, "% read")
    return [head for head in heads if head not in left_out]


def _caption(cuda: bool, wide: bool) -> str:
    percent = "each repeat's ratio (ratio of medians)" if wide else "the repeats' ratios"
    lines = [
        f"percent: median of {percent}; bytes: the least possible; of a rival: its time / ours"
    ]
    if cuda:
        lines.append(
            "µs, GB/s and %: the device alone, from a replayed graph; rivals and 'called': as a "
            "program calls them" + ("; 'host': until a call returns" if wide else "")
        )
    if not wide:
        lines.append(f"more columns: in a terminal of {WIDE} columns, and with --json")
    return "\n".join(lines)


def _cells(row: Report, *, cuda: bool, wide: bool) -> dict[str, str]:
    """What a row says, by the head of its column."""
    median, quartiles = _times(row["seconds"])
    cells = {
        "": f"[bold]{_name(row)}", "dtype": row["dtype"], "size": shown(row["numel"]),
        "µs": median, "quartiles": quartiles, "GB/s": f"{row['gigabytes_per_second']:.2f}",
        "% read": _paired(row["of_read"], wide=wide),
        "% copy": _paired(row["of_copy"], wide=wide), "threads": str(row["threads"]),
    }  # fmt: skip
    if hot := row.get("hot"):
        cells["hot µs"] = _times(hot["seconds"])[0]
        if not cuda:
            shares = (hot["of_read"], hot["of_copy"])
            cells |= {k: _paired(v, wide=False) for k, v in zip(_HOT_SHARES, shares, strict=True)}
    if cuda:
        cells["called µs"] = _times(row["called"]["seconds"])[0]
        cells["host µs"] = f"{1e6 * row['host_seconds']:.1f}"
    return cells


def _rival_cells(name: str, rival: Report, mine: float) -> dict[str, str]:
    median, quartiles = _times(rival["seconds"])
    return {
        "": f"  [dim]{name}", "µs": median, "quartiles": quartiles,
        "GB/s": f"{rival['gigabytes_per_second']:.2f}",
        "% copy": f"{rival['seconds']['median'] / mine:.1f}x",
    }  # fmt: skip


def _notes(row: Report) -> list[str]:
    notes = [f"{name}: {why}" for name, why in row["rivals_failed"].items()]
    if row.get("late"):
        notes.insert(0, f"{row['late']} samples of it were late: they hold time of the host")
    if not row.get("captured", True):
        notes.insert(0, "waits for the device: timed as called, not from a graph")
    return notes


def show_rows(rows: Sequence[Report], title: str, device: str, console: Console) -> None:
    """Prints the figures; a rival's last column says how many times our time it takes."""
    cuda, wide = device == "cuda", console.width >= WIDE
    heads = _heads(cuda, wide)
    table = _table(heads, title, _caption(cuda, wide))
    for row in rows:
        mine = (row["called"] if cuda else row)["seconds"]["median"]
        lines = [_cells(row, cuda=cuda, wide=wide)]
        lines += [_rival_cells(name, rival, mine) for name, rival in row["rivals"].items()]
        lines += [{"": f"  [dim]{note}"} for note in _notes(row)]
        for cells in lines:
            table.add_row(*(cells.get(head, "") for head in heads))
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
        met = goal["met"]
        model = f" (model {goal['model']:.2f})" if "model" in goal else ""
        colour = colours.get(met, "yellow")
        console.print(f"  {goal['goal']}: {goal['measured']}{model} [{colour}]{met}")


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
    heads = ("", "dtype", "size", "threads", "time then / now", "of copy")
    table = _table(
        heads, f"against {name}",
        "of copy: share of a copy, now / then. Above 1: faster now; *: "
        "beyond the quartiles of both runs. On a shared machine trust the shares of a copy",
    )  # fmt: skip
    for entry in found:
        row, mark = entry["row"], "*" if entry["beyond_spread"] else " "
        slower = entry["beyond_spread"] and entry["speedup"] < 1
        colour = "[red]" if slower else "[green]" if entry["beyond_spread"] else ""
        table.add_row(
            _name(row), row["dtype"], shown(row["numel"]), str(row["threads"] or ""),
            f"{colour}{entry['speedup']:.3f}{mark}", f"{entry['of_copy']:.3f}",
        )  # fmt: skip
    console.print(table)
