"""Codecs compared: bits per parameter, error and speed, on real gradients and on normal numbers.

    python examples/language_model/gradients.py --output build/gradients.pt
    python bench/codecs/compare.py --json bench/results/codecs.json --plot docs/codecs.png

Errors are norms: of what was decoded less the gradient, over that of the gradient. Times are of one
thread on one tensor, with a copy of that tensor measured before each.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import rivals
import torch
from methods import CODECS, CodecMethod, Layers, Method, Slot
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pydist.bench import measure, timing
from pydist.bench.machine import machine
from pydist.kernels.environment import describe

WORKERS = 4  # of the normal input
NORMAL_SIDE = 1024  # a parameter of normal numbers is a square matrix
RIVAL_REPEATS = 5
Report = dict[str, Any]
Steps = Sequence[Sequence[Layers]]
"""Gradients of consecutive steps: of each worker a step, of each parameter a worker."""


class UsageError(ValueError):
    """What was asked for can't be measured here."""


# ---------------------------------------------------------------- input


def saved(path: Path) -> tuple[Tensor, list[torch.Size]]:
    """The file of `gradients.py`: float32 [runs, steps, workers, elements]; the parameters' shapes.

    Raises:
        UsageError: There is none.
    """
    if not path.is_file():
        make = "python examples/language_model/gradients.py --output"
        raise UsageError(f"--gradients: there is no file {path}; make it with: {make} {path}")
    found = torch.load(path, weights_only=True)
    return found["gradients"], [torch.Size(shape) for _, shape in found["parameters"]]


def layers_of(flat: Tensor, shapes: Sequence[torch.Size]) -> Layers:
    """A worker's gradient as its parameters'."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def normal() -> list[Steps]:
    """One step of workers that have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    side = NORMAL_SIDE
    return [[[[torch.randn(side, side, generator=generator)] for _ in range(WORKERS)]]]


# ---------------------------------------------------------------- errors


class Comparison:
    """Sums over tensors, in float64: how far is what was decoded from what was sent?"""

    def __init__(self) -> None:
        self.apart = self.truth = self.decoded = self.product = 0.0

    def add(self, decoded: Iterable[Tensor], truth: Iterable[Tensor]) -> None:
        """Takes tensors in."""
        for a, b in zip(decoded, truth, strict=True):
            x, y = a.double(), b.double()
            self.apart += float((x - y).square().sum())
            self.truth += float(y.square().sum())
            self.decoded += float(x.square().sum())
            self.product += float((x * y).sum())

    def cosine(self) -> float:
        """Of the angle between the two."""
        return self.product / math.sqrt(self.truth * self.decoded)

    def error(self, scaled: bool) -> float:
        """Relative error; at the best scale where the method has none."""
        if scaled:
            return math.sqrt(self.apart / self.truth)
        return math.sqrt(max(0.0, 1.0 - self.cosine() ** 2))


def exact_mean(workers: Sequence[Layers]) -> Layers:
    """In float64."""
    return [torch.stack(parts).double().mean(0) for parts in zip(*workers, strict=True)]


def compare(method: Method, runs: Sequence[Steps]) -> Report:
    """Bits and errors of the last step of each run; errors are root mean squares over the runs."""
    own, means, size, numel = [], [], 0, 0
    for steps in runs:
        *history, workers = steps
        one, mean = Comparison(), Comparison()
        for worker, layers in enumerate(workers):
            sent = method.send(layers, [step[worker] for step in history])
            one.add(sent.values, layers)
            size += sent.bytes
            numel += sum(x.numel() for x in layers)
        mean.add(method.mean(workers, history), exact_mean(workers))
        own.append(one)
        means.append(mean)
    return {
        "bits": 8 * size / numel,
        "error": _root_mean_square([one.error(method.scaled) for one in own]),
        "error_of_mean": _root_mean_square([mean.error(method.scaled) for mean in means]),
        "cosine": sum(one.cosine() for one in own) / len(own),
        "errors_of_runs": [one.error(method.scaled) for one in own],
        "errors_of_means_of_runs": [mean.error(method.scaled) for mean in means],
    }


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


# ---------------------------------------------------------------- times


class Clock:
    """Times methods on one tensor; as many copies of it take turns as keep it out of the caches.

    Args:
        x: The tensor, flat.
    """

    def __init__(self, x: Tensor) -> None:
        count = 1 + math.ceil(timing.cold_bytes("cpu") / x.nbytes)
        self._pairs = [(x.clone(), torch.zeros_like(x)) for _ in range(count)]
        self._bytes = x.nbytes
        self._clock = timing.CpuClock()
        self._copy = self._sample(lambda s: s.out.copy_(s.x), self._slots())

    def _slots(self) -> list[Slot]:
        return [Slot(x=x, out=out) for x, out in self._pairs]

    def _sample(self, run: Any, slots: Sequence[Slot]) -> timing.Sample:
        for slot in slots:  # so that every slot has its buffers before anything is timed
            run(slot)
        return self._clock.called(timing.Task(run, timing.Ring(slots), self._bytes))

    def times(self, method: Method, repeats: int) -> Report:
        """Seconds of encoding and decoding, GB/s of float32, shares of a copy's speed."""
        slots = self._slots()
        samples = {"copy": self._copy, "encode": self._sample(method.encode, slots)}
        samples["decode"] = self._sample(method.decode, slots)
        plan = {
            name: measure.Series(self._bytes, sample, repeats) for name, sample in samples.items()
        }
        for _ in range(repeats):
            for series in plan.values():
                series.samples.append(series.sample())
        found = {name: series.report() for name, series in plan.items()}
        copy = found.pop("copy")
        for report in found.values():
            report["of_copy"] = timing.ratio(report, copy)
        return found | {"copy": {key: copy[key] for key in ("seconds", "gigabytes_per_second")}}


# ---------------------------------------------------------------- the command


def measured(
    methods: Sequence[Method], inputs: dict[str, list[Steps]], clock: Clock | None, repeats: int
) -> list[Report]:
    """A row a method."""
    rows = []
    for method in track(methods, description="comparing", transient=True):
        own = isinstance(method, CodecMethod)
        row: Report = {"method": method.name, "family": method.family, "own": own}
        row["scaled"] = method.scaled
        row["inputs"] = {name: compare(method, runs) for name, runs in inputs.items()}
        if clock:
            row["times"] = clock.times(method, repeats if own else min(repeats, RIVAL_REPEATS))
        rows.append(row)
    return rows


def show(rows: Sequence[Report], missing: dict[str, str], console: Console) -> None:
    """Prints the table."""
    table = Table(
        caption="error: its norm over that of the gradient (*: at the best scale); of mean: of "
        "what all receive,\nencoded twice by pydist's codecs. GB/s: of float32 gradient; %: of "
        "the speed of a copy, measured before each sample"
    )
    heads = ("", "bits", "error, normal", "bits", "error, gradients", "cosine", "of mean")
    for head in (*heads, "encode GB/s", "%", "decode GB/s", "%"):
        table.add_column(head, justify="right" if head else "left", no_wrap=not head)
    for row in rows:
        star = "" if row["scaled"] else "*"
        cells = []
        for name in ("normal", "gradients"):
            if found := row["inputs"].get(name):
                cells += [f"{found['bits']:.3f}", f"{found['error']:.4g}{star}"]
            else:
                cells += ["", ""]
        if found := row["inputs"].get("gradients"):
            cells += [f"{found['cosine']:.4f}", f"{found['error_of_mean']:.4g}{star}"]
        for what in ("encode", "decode") if "times" in row else ():
            times = row["times"][what]
            cells.append(f"{times['gigabytes_per_second']:.2f}")
            cells.append(f"{100 * times['of_copy']['median']:.0f}")
        table.add_row(row["method"], *cells)
    console.print(table)
    for name, why in missing.items():
        console.print(f"[yellow]not measured: {name}: {why}")


def chosen(methods: Iterable[Method], only: Sequence[str] | None) -> list[Method]:
    """Those whose name contains one of the given texts."""
    return [m for m in methods if not only or any(text in m.name for text in only)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gradients", type=Path, default=Path("build/gradients.pt"), metavar="FILE",
        help="what examples/language_model/gradients.py wrote; default %(default)s")  # fmt: skip
    add("--numel", type=int, default=4 << 20, help="elements of the tensor that is timed")
    add("--repeats", type=int, default=20, help="samples of a time, 0 for none; rivals take 5")
    add("--only", nargs="+", metavar="TEXT", help="methods whose name contains one of these")
    add("--no-rivals", action="store_true", help="pydist's codecs alone")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add("--plot", type=Path, metavar="FILE", help="draw error against bits here")
    add("--redraw", type=Path, metavar="JSON", help="measure nothing: the figures of this file")
    options = parser.parse_args(arguments)
    if options.numel < 1 or options.repeats < 0:
        parser.error("--numel must be at least 1, --repeats at least 0")
    return options


def run(options: argparse.Namespace, command: str, console: Console) -> Report:
    """Measures, and prints the table.

    Raises:
        UsageError: Something asked for is not here.
    """
    gradients, shapes = saved(options.gradients)
    others, missing = ([], {}) if options.no_rivals else rivals.found()
    methods = chosen(chain(CODECS, others), options.only)
    if not methods:
        raise UsageError(f"--only: no method's name contains {' or '.join(options.only)}")
    torch.set_num_threads(1)
    names = ("runs", "steps", "workers", "elements")
    record: Report = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine() | {key: describe()[key] for key in ("version", "numpy", "isa")},
        "gradients": dict(zip(names, gradients.shape, strict=True)),
        "timed_elements": options.numel,
        "missing": missing,
    }
    inputs = {
        "normal": normal(),
        "gradients": [
            [[layers_of(worker, shapes) for worker in step] for step in steps]
            for steps in gradients
        ],
    }
    clock = None
    if options.repeats:
        flat = gradients.flatten()
        clock = Clock(flat.repeat(-(-options.numel // flat.numel()))[: options.numel])
    record["results"] = measured(methods, inputs, clock, options.repeats)
    show(record["results"], missing, console)
    return record


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status, 2 where something asked for is not here."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    command = shlex.join(["python", "bench/codecs/compare.py", *arguments])
    try:
        if options.redraw:
            record = json.loads(options.redraw.read_text())
        else:
            record = run(options, command, console)
    except UsageError as error:
        print(f"codecs.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        from plot import draw

        draw(record["results"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
