"""The roofline: GB/s against bytes, and the line that a copy draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydist.bench import drawing

Report = dict[str, Any]

_COLUMNS = 2


def draw(rows: Sequence[Report], title: str, path: str | Path) -> None:
    """Draws one panel a kernel into a file; without rows only says that there are none.

    Args:
        rows: Those of one run.
        title: What stands above.
        path: Its suffix says which format.
    """
    if not rows:
        print(f"{path} was not drawn: no row was measured")
        return
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    series = max(len(_series(rows, name)) for name in names)
    height = 3.2 + 0.2 * series
    figure, all_panels = drawing.panels(
        lines, columns, (5 * columns, height * lines), squeeze=False, sharey=True
    )
    for panel, name in zip(all_panels.flat, names, strict=False):
        _panel(panel, name, rows)
    for panel in all_panels.flat[len(names) :]:
        panel.set_visible(False)
    for line in all_panels:
        line[0].set_ylabel("GB/s")
    figure.suptitle(title)
    drawing.save(figure, path)


def _series(rows: Sequence[Report], name: str) -> dict[tuple[Any, ...], list[Report]]:
    """A kernel's rows from small to large, by variant, dtype and threads."""
    found: dict[tuple[Any, ...], list[Report]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if row["kernel"] == name:
            found.setdefault((row["variant"], row["dtype"], row["threads"]), []).append(row)
    return found


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}" if number else ""


def _panel(panel: Any, name: str, rows: Sequence[Report]) -> None:
    series = _series(rows, name)
    for i, ((variant, dtype, threads), points) in enumerate(series.items()):
        panel.plot(
            [row["bytes"] for row in points],
            [row["gigabytes_per_second"] for row in points],
            label=", ".join(filter(None, (dtype, variant, _threads(threads)))),
            **drawing.look(i),
        )
    largest = max(points[-1]["bytes"] for points in series.values())
    for i, threads in enumerate(sorted({threads for _, _, threads in series})):
        speeds = [
            row["copy"]["gigabytes_per_second"]
            for points in series.values()
            for row in points
            if row["threads"] == threads and row["bytes"] == largest
        ]
        label = ", ".join(filter(None, ("copy", _threads(threads))))
        speed = statistics.median(speeds)
        panel.axhline(speed, color="black", linewidth=1, linestyle=("--", ":")[i % 2], label=label)
    panel.set(xscale="log", yscale="log", title=name, xlabel="bytes that it must move, at least")
    drawing.binary_ticks(panel.xaxis)
    drawing.log_ticks(panel.yaxis)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
