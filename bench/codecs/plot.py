"""Relative error against bits per parameter, with the least error that a Gaussian source allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydist.bench import drawing

Report = dict[str, Any]

TITLES = {"normal": "independent normal numbers", "gradients": "gradients of the demo's model"}
_BITS = (0.0, 17.0)
_ERRORS = (1e-4, 10.0)
_APART = 0.05  # bits between two points of a curve
_BOUND = {
    "normal": "the least possible, $2^{-bits}$",
    "gradients": "$2^{-bits}$, no bound here",
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
    inputs = [name for name in TITLES if any(name in row["inputs"] for row in rows)]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure, panels = drawing.panels(
        1, len(inputs), (1 + 4 * len(inputs), 5.4), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], inputs, strict=True):
        for i, family in enumerate(families):
            _points(panel, [row for row in rows if row["family"] == family], name, i)
        panel.plot(_BITS, [bound(b) for b in _BITS], "k--", linewidth=1)
        panel.annotate(_BOUND[name], (11, bound(11)), (-12, 0), ha="right", va="top",
                       textcoords="offset points", fontsize=9)  # fmt: skip
        panel.set(
            yscale="log", xlim=_BITS, ylim=_ERRORS, title=TITLES[name],
            xlabel="bits per parameter", xticks=range(0, 17, 2),
        )  # fmt: skip
    panels[0][0].set_ylabel("relative error")
    drawing.percent_ticks(panels[0][0].yaxis)
    drawing.legend_above(figure, panels[0][0], 4)
    drawing.save(figure, path)


def _points(panel: Any, rows: Sequence[Report], name: str, i: int) -> None:
    found = [row["inputs"][name] for row in rows if name in row["inputs"]]
    points = sorted((x["bits"], x["error"]) for x in found if x["error"] > 0)
    steps = [b - a for (a, _), (b, _) in zip(points, points[1:], strict=False)]
    curve = len(points) > 2 and min(steps) > _APART  # else only different methods of one family
    own = rows[0].get("own", True)
    panel.plot(
        [bits for bits, _ in points], [error for _, error in points],
        linestyle="-" if curve else "none", linewidth=1, label=rows[0]["family"],
        markerfacecolor=None if own else "none", **drawing.look(i),
    )  # fmt: skip
