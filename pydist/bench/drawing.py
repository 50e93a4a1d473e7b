"""What all plots share: colours, size of text, ticks in plain numbers. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
)  # fmt: skip
"""Okabe and Ito's, which colour-blind people tell apart, without the yellow, and a grey."""

MARKERS = "os^DvPX*<>phd"
_DPI = 150  # of a file; 8 inches are then more than the 800 pixels of a page
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
}


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its panels, as ``pyplot.subplots`` returns them; of 8 by 4 inches, say."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(_STYLE)
    return pyplot.subplots(rows, columns, figsize=size, **options)


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; no two of the first hundred share both."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def legend_above(figure: Any, panel: Any, columns: int) -> None:
    """Names the series of a panel above all panels, where they hide nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9,
                  frameon=False)  # fmt: skip


def log_ticks(axis: Any, steps: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Ticks of a logarithmic axis as plain numbers: 0.5, 20, 1,000."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def percent_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis of shares: 0.1 %, 10 %."""
    axis.set_major_formatter(lambda x, _: f"{100 * x:,.6g} %")


def binary(x: float) -> str:
    """A number of bytes or elements in powers of 1,024: 64 Ki, 1.5 Mi."""
    power = min(int(math.log2(max(x, 1))) // 10, 3)
    return f"{x / 1024**power:.4g}{('', ' Ki', ' Mi', ' Gi')[power]}"


def binary_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at powers of two: 64 Ki, 1 Mi."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(base=2, numticks=6))
    axis.set_major_formatter(lambda x, _: binary(x))
    axis.set_minor_locator(ticker.NullLocator())


def save(figure: Any, path: str | Path) -> None:
    """Writes the figure; the suffix says which format."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
