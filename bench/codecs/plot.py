"""Relative error against bits per parameter, with the least error that a Gaussian source allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]

TITLES = {"normal": "independent normal numbers", "gradients": "gradients of the demo's model"}
_BITS = (0.0, 17.0)
_ERRORS = (1e-5, 10.0)
_APART = 0.05  # bits between two points of a curve
_MARKERS = "os^vDPX*<>phd"
_BOUND = {
    "normal": "2^−bits: least possible (Gaussian source)",
    "gradients": "2^−bits: no bound for gradients",
}


def bound(bits: float) -> float:
    """Least relative error of any code at so many bits per element of a Gaussian source.

    Its rate-distortion function, for independent numbers of known variance: the mean squared error
    is at least variance * 2^(-2 bits). At the same variance every other source allows less, so
    for gradients, whose size differs from place to place, this is no bound.
    """
    return float(2.0**-bits)


def draw(rows: Sequence[Report], path: Path) -> None:
    """Draws a panel an input into a file.

    Args:
        rows: Those of one run of `codecs.py`.
        path: Its suffix says which format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inputs = [name for name in TITLES if any(name in row["inputs"] for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(inputs), figsize=(7 * len(inputs), 6.4), sharey=True, squeeze=False
    )
    families = list(dict.fromkeys(row["family"] for row in rows))
    for panel, name in zip(panels[0], inputs, strict=True):
        for i, family in enumerate(families):
            _points(panel, [row for row in rows if row["family"] == family], name, i)
        panel.plot(_BITS, [bound(b) for b in _BITS], "k--", linewidth=1, label=_BOUND[name])
        panel.set(
            yscale="log", xlim=_BITS, ylim=_ERRORS, title=TITLES[name],
            xlabel="bits per parameter",
        )  # fmt: skip
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower left")
    panels[0][0].set_ylabel("relative error")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(panel: Any, rows: Sequence[Report], name: str, i: int) -> None:
    found = [row["inputs"][name] for row in rows if name in row["inputs"]]
    points = sorted((x["bits"], x["error"]) for x in found if x["error"] > 0)
    steps = [b - a for (a, _), (b, _) in zip(points, points[1:], strict=False)]
    curve = len(points) > 2 and min(steps) > _APART  # else only different methods of one family
    panel.plot(
        [bits for bits, _ in points], [error for _, error in points],
        linestyle="-" if curve else "none", marker=_MARKERS[i % len(_MARKERS)], markersize=6,
        linewidth=1, color=f"C{i % 10}", label=rows[0]["family"],
        markerfacecolor=None if rows[0].get("own", True) else "none",
    )  # fmt: skip
