"""Trains the demo's model with every codec, several seeds each, beside AdamW on float32 gradients.

    python examples/language_model/convergence.py --output build/convergence

All methods see the same batches and have AdamW's learning rate, so what differs is how gradients
travel. Writes `convergence.json` after each seed, and takes up from there: runs that are in the
file are not made again. Then prints the table and draws `convergence.png`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo import run_workers
from methods import CODECS, METHODS, Settings
from rich.console import Console
from rich.table import Table

from pydist.bench import drawing

BASELINE = "adamw"
TRAINED = METHODS | CODECS
TITLES = {name: method.title for name, method in TRAINED.items()}
PAIRS = {"sgd-sign": "sgd-sign-plain", "sgd-topk": "sgd-topk-plain"}
"""What is drawn with and without error feedback."""

Runs = dict[str, list[dict[str, Any]]]


def by_method(report: dict[str, Any]) -> Runs:
    """The runs of each method, one a seed."""
    runs: Runs = {}
    for run in report["runs"]:
        runs.setdefault(run["method"], []).append(run)
    return runs


def losses(runs: list[dict[str, Any]]) -> list[float]:
    """Final validation losses, one a seed."""
    return [run["validation_loss"] for run in runs]


def print_table(report: dict[str, Any]) -> None:
    """Prints every method's loss beside the baseline's of the same seeds, and what it sends."""
    runs = by_method(report)
    base = {run["seed"]: run for run in runs[BASELINE]}
    table = Table(
        title=f"{report['workers']} workers, {runs[BASELINE][0]['parameters']:,} parameters, "
        f"{report['settings']['steps']} steps"
    )
    table.add_column("gradients as")
    for title in ("seeds", "validation loss", "lowest - highest", "against fp32", "bits"):
        table.add_column(title, justify="right")
    for name, mine in runs.items():
        mean = statistics.mean(losses(mine))
        same = statistics.mean(losses([base[run["seed"]] for run in mine]))
        table.add_row(
            TITLES[name],
            " ".join(str(run["seed"]) for run in mine),
            f"{mean:.4f}",
            f"{min(losses(mine)):.4f} - {max(losses(mine)):.4f}",
            f"{100 * (mean / same - 1):+.2f} %",
            f"{TRAINED[name].bits_a_gradient():.2f}",
        )
    Console(width=110).print(table, "bits: of a gradient, or momentum, on its way to its owner")


def curve(runs: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps and the mean loss over seeds at each."""
    points = [run["curve"][1:] for run in runs]
    steps = [point["step"] for point in points[0]]
    return steps, [
        statistics.mean(row[i]["validation_loss"] for row in points) for i in range(len(steps))
    ]


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws curves with and without error feedback, and every method's final loss."""
    runs = by_method(report)
    figure, (by_step, ends) = drawing.panels(
        2, 1, (8, 4 + 0.22 * len(runs)), height_ratios=(3, 0.5 + 0.22 * len(runs))
    )
    for name, style in ((BASELINE, "--"), ("sgd", "-")):
        if name in runs:
            by_step.plot(*curve(runs[name]), style, color="black", label=TITLES[name])
    for number, (name, plain) in enumerate(PAIRS.items()):
        for which, style in ((name, "-"), (plain, ":")):
            if which in runs:
                by_step.plot(*curve(runs[which]), style, color=drawing.COLOURS[number],
                             label=TITLES[which])  # fmt: skip
    by_step.set(xlabel="steps", ylabel="validation loss, nats per byte")
    drawing.legend_above(figure, by_step, 3)
    final_losses(ends, runs)
    drawing.save(figure, path)


def final_losses(panel: Any, runs: Runs) -> None:
    """Draws a row for each method: mean and range over seeds; bits stand beside the name."""
    kinds = list(dict.fromkeys(kind(name) for name in runs))
    names = sorted(
        runs, key=lambda name: (kinds.index(kind(name)), statistics.mean(losses(runs[name])))
    )
    for row, name in enumerate(names):
        values = losses(runs[name])
        colour = drawing.COLOURS[kinds.index(kind(name))]
        panel.plot([min(values), max(values)], [row, row], color=colour)
        panel.plot([statistics.mean(values)], [row], "o", color=colour)
    for edge in (row for row in range(1, len(names)) if kind(names[row]) != kind(names[row - 1])):
        panel.axhline(edge - 0.5, color="black", linewidth=0.6)
    base = statistics.mean(losses(runs[BASELINE]))
    panel.axvline(base, color="black", linewidth=1, linestyle="--")
    labels = [f"{TITLES[name]}   {round(TRAINED[name].bits_a_gradient(), 2):g}" for name in names]
    panel.set_yticks(range(len(names)), labels, fontsize=9)
    panel.set_title("gradients as, and bits per element", loc="left")
    panel.set(
        ylim=(len(names) - 0.5, -0.5),
        xlabel="final validation loss, nats per byte\n(dot: mean of the seeds; line: their range; "
        "dashed: AdamW, fp32)",
    )


def kind(name: str) -> str:
    """What a method is compared with: AdamW, SGD, or AdamW under FSDP2."""
    method = TRAINED[name]
    return "SGD" if method.sgd else "FSDP2" if method.sharded else "AdamW"


def main() -> int:
    """Runs what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [BASELINE, *CODECS]
    parser.add_argument("--workers", type=int, default=4, help="processes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--output", type=Path, default=Path("build/convergence"))
    parser.add_argument("--redraw", type=Path, help="trains nothing: runs of a convergence.json")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.steps < 12:
        parser.error("--workers must be at least 1 and --steps at least 12")

    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.redraw:
        report = json.loads(arguments.redraw.read_text())
        print_table(report)
        plot(report, arguments.output / "convergence.png")
        return 0
    path = arguments.output / "convergence.json"
    command = shlex.join(["python", "examples/language_model/convergence.py", *sys.argv[1:]])
    settings = Settings(steps=arguments.steps, warmup=max(1, arguments.steps // 50))
    report: dict[str, Any] = {
        "command": command, "workers": arguments.workers, "settings": asdict(settings),
        "seeds": arguments.seeds, "runs": [],
    }  # fmt: skip
    if path.exists():
        before = json.loads(path.read_text())
        for name in ("workers", "settings"):
            if before[name] != report[name]:
                parser.error(f"{path} has {name}={before[name]}, not {report[name]}: remove it")
        report["runs"] = before["runs"]
    done = {(run["method"], run["seed"]) for run in report["runs"]}
    for seed in arguments.seeds:
        missing = [name for name in arguments.methods if (name, seed) not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as directory:
            results = Path(directory) / "results.json"
            own = Settings(**asdict(settings) | {"seed": seed})
            if code := run_workers(arguments.workers, missing, own, results):
                return code
            report["runs"] += [
                {**run, "seed": seed} for run in json.loads(results.read_text())["runs"]
            ]
        path.write_text(json.dumps(report, indent=1))
    print_table(report)
    plot(report, arguments.output / "convergence.png")
    print(f"Wrote {path} and {arguments.output / 'convergence.png'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
