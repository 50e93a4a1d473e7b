"""The table of `make sass`: on the screen, in bench/results/sass.json, and what got worse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kernel_model as model

from sass.counts import in_flight

Row = dict[str, Any]

WORSE = 1.1  # a number may grow, or a share shrink, by so much before it counts as worse
COMMAND = "make sass ARGS=--update"


def shares(row: Row) -> dict[str, float]:
    """What the model gives a row, by card; nothing where bytes don't bound the kernel."""
    if row["kernel"] in model.NO_SHARE:
        return {}
    return {card: round(model.share(row, copy), 3) for card, copy in model.COPIES.items()}


def title(row: Row) -> str:
    """Kernel, variant, dtype."""
    variant = f" ({row['variant']})" if row["variant"] else ""
    return f"{row['kernel']}{variant}, {row['dtype']}"


# --------------------------------------------------------------------------- screen


def print_table(rows: Sequence[Row]) -> None:
    """A line a row; of several launches the first decides about loads, registers and warps."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption())
    table.add_column("kernel")
    heads = ("loads", "in flight\nB/thread", "instr/\nelement", "busiest\npipe", "its limit\nTB/s",
             "regs", "warps\n/SM", "moved/\nleast", "H100\n% copy", "H200\n% copy")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        if last and row["kernel"] != last:
            table.add_section()
        last = row["kernel"]
        table.add_row(title(row), *_cells(row))
    Console(width=max(Console().width, 150)).print(table)


def _caption() -> str:
    return "for an element of 64 Mi; a warp's instruction counts 32 times; shares are a model's"


def _cells(row: Row) -> Iterator[str]:
    launch = row["launches"][0]
    yield _loads(launch)
    yield f"{in_flight(launch):.0f}"
    yield f"{row['instructions']:.1f}"
    pipe, clocks = model.busiest(launch["pipes"])
    yield pipe
    yield f"{row['least'] * model.SMS * model.HERTZ / clocks / 1e12:.2f}"
    yield str(row["registers"])
    yield str(launch["warps"])
    yield f"{row['moved'] / row['least']:.2f}"
    found = shares(row)
    for card in model.COPIES:
        yield f"{100 * found[card]:.0f}" if found else "-"


def _loads(launch: Row) -> str:
    """The widest of the usual loads, and how many of it the bytes in flight are."""
    if not launch["loads"]:
        return "-"
    width = max(int(width) for width in launch["loads"])
    return f"LDG.{width} x{8 * in_flight(launch) / width:.1f}"


# --------------------------------------------------------------------------- file


def compiler() -> str:
    """The last line but one of what nvcc says of itself."""
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-2].removeprefix("Cuda compilation tools, ")


def as_json(rows: Sequence[Row]) -> str:
    """The rows with their shares, and where they come from; a launch a line."""
    head = {"command": COMMAND, "compiler": compiler(), "architecture": "sm_90"}
    lines = ["{"]
    lines += [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append(' "results": [')
    for i, row in enumerate(rows):
        plain = {key: value for key, value in row.items() if key != "launches"} | shares(row)
        launches = ",\n   ".join(json.dumps(launch) for launch in row["launches"])
        comma = "," if i + 1 < len(rows) else ""
        lines.append(f'  {json.dumps(plain)[:-1]}, "launches": [\n   {launches}]}}{comma}')
    return "\n".join([*lines, " ]", "}"]) + "\n"


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    rows: list[Row] = json.loads(path.read_text())["results"]
    return rows


# --------------------------------------------------------------------------- check


def worse(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """What got worse by more than 10 %, row by row: the number, before and now."""
    known = {title(row): row for row in before}
    found = [f"{title(row)}: not in the committed table" for row in now if title(row) not in known]
    here = {title(row) for row in now}
    found += [f"{name}: gone from the benchmark's cases" for name in known if name not in here]
    for row in now:
        old = known.get(title(row))
        if old is not None:
            found += [f"{title(row)}: {text}" for text in _worse(old, row)]
    return found


def _worse(old: Row, row: Row) -> Iterator[str]:
    for key in ("instructions", "registers", "moved"):
        if row[key] > WORSE * old[key]:
            yield f"{key} {old[key]:g} before, {row[key]:g} now"
    now = shares(row)
    for card, share in now.items():
        if share * WORSE < old[card]:
            yield f"share of copy on {card.upper()} {old[card]:g} before, {share:g} now"
