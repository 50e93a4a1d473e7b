"""Everything there is to know on a machine with a GPU, in minutes: what `make gpu` runs.

    python bench/gpu --out results                   # all of it, about five minutes
    python bench/gpu --out results --minutes 4       # environment, check, the kernels' figures
    python bench/gpu --device cpu                    # the same steps, small, where there is no GPU

Works offline with the Python that runs it; what is missing there is said, and left out. Every step
has its own time limit and runs even if one before it failed; after each, everything that was found
so far is written. Exits with 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from plan import Settings, expected_seconds, phases, remove_written
from report import report
from steps import FAILED, ROOT, Step, run_together


def settings_of(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """What was asked for, and the names of the steps that it is restricted to."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu", description="Check, measure, test and profile on a GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, help="default bench/results, with --device cpu build/gpu")
    add("--minutes", type=float, default=9.5, help="for everything; fewer than 5: the first part")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, all small")
    add("--compare-module", type=Path, metavar="FILE",
        help="another build of the compiled module, timed beside this one row by row")  # fmt: skip
    add("--only", nargs="+", metavar="STEP", help="names of steps to run")
    options = parser.parse_args(arguments)
    if options.compare_module and not options.compare_module.is_file():
        parser.error(f"--compare-module: there is no file {options.compare_module}")
    default = ROOT / ("bench/results" if options.device == "cuda" else "build/gpu")
    settings = Settings(
        out=(options.out or default).resolve(), device=options.device, minutes=options.minutes,
        compare_module=str(options.compare_module.resolve() if options.compare_module else ""),
    )  # fmt: skip
    names = {step.name for phase in phases(settings) for step in phase}
    if unknown := set(options.only or ()) - names:
        parser.error(f"--only: no step {', '.join(sorted(unknown))}; there are {sorted(names)}")
    return settings, options.only or sorted(names)


def write(steps: Sequence[Step], out: Path) -> str:
    """Writes what is known so far; returns the text."""
    text = report(steps, out)
    (out / "gpu.md").write_text(text + "\n")
    records = [step.record() for step in steps if step.verdict]
    (out / "gpu.json").write_text(json.dumps(records, indent=1) + "\n")
    return text


def main(arguments: Sequence[str]) -> int:
    """Runs all steps; returns the exit status."""
    settings, names = settings_of(arguments)
    out, end = settings.out, time.monotonic() + 60 * settings.minutes
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    remove_written(out)
    todo = [[step for step in phase if step.name in names] for phase in phases(settings)]
    todo = [phase for phase in todo if phase]
    every = [step for phase in todo for step in phase]
    expected, most = expected_seconds(todo), settings.minutes
    print(f"{len(every)} steps, about {expected:.0f} s on 16 cores, {most:g} minutes at most")
    text = write(every, out)
    for phase in todo:
        run_together(phase, log, end - time.monotonic())
        text = write(every, out)
    print(f"\n{text}\n\nwritten to {out}: gpu*")
    failed = [step.name for step in every if step.verdict == FAILED]
    if failed:
        print(f"make gpu: FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
