"""The roofline: GB/s against bytes, and the line that a copy draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]

_COLUMNS = 3


def draw(rows: Sequence[Report], title: str, path: str | Path) -> None:
    """Draws one panel a kernel into a file.

    Args:
        rows: Those of one run.
        title: What stands above.
        path: Its suffix says which format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["kernel"] for row in rows))
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.6 * lines + 0.6), squeeze=False, sharey=True
    )
    for panel, name in zip(panels.flat, names, strict=False):
        _panel(panel, name, [row for row in rows if row["kernel"] == name])
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for line in panels:
        line[0].set_ylabel("GB/s")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, name: str, rows: Sequence[Report]) -> None:
    series: dict[tuple[Any, ...], list[Report]] = {}
    for row in rows:
        series.setdefault((row["variant"], row["dtype"], row["threads"]), []).append(row)
    for (variant, dtype, threads), points in series.items():
        points.sort(key=lambda row: row["bytes"])
        label = ", ".join(
            part for part in (dtype, variant, f"{threads} thr" if threads else "") if part
        )
        panel.plot(
            [row["bytes"] for row in points],
            [row["gigabytes_per_second"] for row in points],
            marker="o", markersize=3, linewidth=1, label=label,
        )  # fmt: skip
    for threads in sorted({row["threads"] for row in rows}):
        largest = max(row["bytes"] for row in rows)
        speeds = [
            row["copy"]["gigabytes_per_second"]
            for row in rows
            if row["threads"] == threads and row["bytes"] == largest
        ]
        label = f"copy, {threads} thr" if threads else "copy"
        panel.axhline(
            statistics.median(speeds), color="black", linewidth=0.8, linestyle="--", label=label
        )
    panel.set(xscale="log", yscale="log", title=name, xlabel="bytes, the least possible")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=6)
