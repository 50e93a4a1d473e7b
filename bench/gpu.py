"""Everything there is to know on a machine with a GPU: build, tests, sanitizer, benchmark.

    python bench/gpu.py --out results      # what `make gpu OUT=results` runs

Works offline with the Python that runs it: torch with CUDA, pybind11, cmake, ninja, nvcc and pytest
must be there; what else is missing is said, and left out. Every step has its own time limit and
runs even if one before it failed. Exits 1 where one did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 570.0
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FAILED = 97
PASS_ENDED = "all equal to the reference"
MEASURED = "kernels-cuda"  # .json, .txt and .png
BUDGET_MARGIN = 45.0  # of the benchmark's time: for the last row, the tables and the plot
REPEATS = 10
END_SECONDS = 5.0  # for the output of what was ended by force
TAIL_LINES = 30
OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"


@dataclass
class Step:
    """One command.

    Attributes:
        name: For the summary.
        command: What to run; empty where it is left out.
        limit: Seconds it may take.
        why: Why it is left out.
        env: Added to the environment.
        folder: Where to run it.
        judge: Says what is wrong with the output of a command that ended with 0; empty if nothing.
        cannot: Says from the output of one that failed why it can't work here, so that it counts
            as left out; empty if it failed.
        verdict: ``ok``, ``FAILED`` or ``left out``.
        seconds: It took.
        note: What the summary says of it.
    """

    name: str
    command: list[str]
    limit: float
    why: str = ""
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    judge: Callable[[str], str] = lambda output: ""
    cannot: Callable[[str], str] = lambda output: ""
    verdict: str = ""
    seconds: float = 0.0
    note: str = ""

    def run(self, log: Path, left: float) -> None:
        """Runs it, and keeps its output in ``log``."""
        print(f"\n== {self.name}", flush=True)
        if self.why:
            self.verdict, self.note = LEFT_OUT, self.why
            print(f"left out: {self.why}", flush=True)
            return
        limit = min(self.limit, left)
        print(f"$ {self.typed()}   (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        code, output = run_limited(self.command, environment(self.env), limit, self.folder)
        self.seconds = time.monotonic() - start
        with log.open("a") as file:
            file.write(f"\n== {self.name}\n$ {self.typed()}\n{output}\n")
        lines = output.rstrip().splitlines()
        print("\n".join(lines[-TAIL_LINES:]), flush=True)
        if code is None:
            self.note = f"took longer than {limit:.0f} s"
        elif code:
            self.note = f"exit status {code}: {lines[-1] if lines else 'no output'}"[:200]
        else:
            self.note = self.judged(output)
        self.verdict = FAILED if self.note else OK
        if self.note and (why := self.cannot(output)):
            self.verdict, self.note = LEFT_OUT, why[:200]
        if not self.note and lines:
            self.note = lines[-1].strip("= ")[:200]

    def judged(self, output: str) -> str:
        """What the judge says; one that trips over the output must not take the rest along."""
        try:
            return self.judge(output)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]

    def typed(self) -> str:
        """The command without this machine's paths."""
        words = ["python3" if word == sys.executable else word for word in self.command]
        return shlex.join([Path(word).name for word in words[:1]] + words[1:])


def run_limited(
    command: Sequence[str], env: dict[str, str], limit: float, folder: Path
) -> tuple[int | None, str]:
    """Exit status (None: ended by force, with all that it started) and output of a command."""
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output = rest_of(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output
        raise


def rest_of(process: subprocess.Popen[str]) -> str:
    """Output of what was ended; not all of it where a child in a session of its own holds on."""
    try:
        return process.communicate(timeout=END_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        so_far = error.output or ""  # bytes, even of a process that is read as text
        return so_far.decode(errors="replace") if isinstance(so_far, bytes) else so_far


def environment(added: dict[str, str]) -> dict[str, str]:
    """That of this process, with the package of this source tree first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **added}


def has(module: str) -> bool:
    """Whether this Python can import it."""
    return importlib.util.find_spec(module) is not None


def no_device(output: str) -> str:
    """What `pydist info` lacks."""
    found = re.search(r"^\{", output, re.MULTILINE)
    if not found:
        return "it printed no JSON"
    facts, _ = json.JSONDecoder().raw_decode(output, found.start())  # a warning may follow
    if facts["cuda_build"] is None:
        return "pydist was built without CUDA"
    return "" if facts["cuda_devices"] else "no CUDA device"


def nothing_ran(output: str) -> str:
    """Tests that were all skipped prove nothing."""
    return "" if re.search(r"\b[1-9]\d* passed\b", output) else "no test ran"


def steps(out: Path) -> list[Step]:
    """All steps, in order."""
    python = [sys.executable]
    build_lacks = [name for name in ("setuptools", "pybind11") if not has(name)]
    build_lacks += [name for name in ("cmake", "ninja") if not has(name) and not shutil.which(name)]
    lacks = f"{', '.join(build_lacks)} missing in {sys.executable}" if build_lacks else ""
    tests = ["tests/test_gpu.py", "tests/test_gpu_ranks.py"]
    found = [
        Step("build", [*python, "setup.py", "--quiet", "build_ext", "--inplace"], 180.0, lacks,
             {"PYDIST_CUDA": "1"}),
        Step("info", [*python, "-m", "pydist", "info", "--json"], 60.0, judge=no_device),
        Step("check", [*python, "-m", "pydist", "check"], 60.0,
             judge=lambda output: "cuda was not checked" if "not checked" in output else ""),
        Step("tests", [*python, "-m", "pytest", "-m", "gpu", "-q", "--durations=5", *tests], 200.0,
             "" if has("pytest") else "pytest is not installed", judge=nothing_ran),
    ]  # fmt: skip
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    for name in SANITIZERS:
        # A library that asks whether the driver has a function gets an error, which is none here.
        command = [
            tool or "compute-sanitizer", "--tool", name, "--report-api-errors", "no",
            "--error-exitcode", str(SANITIZER_FAILED), *python, "bench/gpu_pass.py",
        ]  # fmt: skip
        why = "" if tool else "compute-sanitizer was not found"
        found.append(Step(name, command, 45.0, why, judge=no_errors, cannot=tool_cannot))
    return [*found, benchmark(out)]


def no_errors(output: str) -> str:
    """The sanitizer's own summary must say that nothing was found."""
    if PASS_ENDED not in output:
        return "the pass did not end"
    found = [line for line in output.splitlines() if "SUMMARY" in line]
    clean = found and all("SUMMARY: 0 " in line for line in found)
    return "" if clean else f"{found[-1] if found else 'no summary from the tool'}"


def tool_cannot(output: str) -> str:
    """The line in which the sanitizer says that it can't work on this machine."""
    if PASS_ENDED in output:
        return ""
    signs = ["Device not supported"]
    if not re.search(r"SUMMARY: [1-9]", output):  # it found something: so it worked
        signs.append("error 999")  # what cuInit answers where the tool may not attach
    lines = output.splitlines()
    return next((s.strip("= ") for s in lines if any(sign in s for sign in signs)), "")


def benchmark(out: Path) -> Step:
    """The kernel benchmark; its time is set when its turn comes."""
    needs = [name for name in ("torch", "rich") if not has(name)]
    command = [
        sys.executable, "-m", "pydist", "bench", "kernels", "--device", "cuda",
        "--repeats", str(REPEATS), "--json", f"{MEASURED}.json", "--table", f"{MEASURED}.txt",
    ]  # fmt: skip
    if has("matplotlib"):
        command += ["--plot", f"{MEASURED}.png"]
    else:
        print("matplotlib is not installed: the benchmark draws no plot")
    why = f"{', '.join(needs)} not installed" if needs else ""
    return Step("benchmark", command, TOTAL_SECONDS, why, judge=measured(out), folder=out)


def measured(out: Path) -> Callable[[str], str]:
    """Whether any row was written."""

    def judge(output: str) -> str:
        record = json.loads((out / f"{MEASURED}.json").read_text())
        return "" if record["results"] else "nothing was measured"

    return judge


def remove_measured(out: Path) -> None:
    """Figures of an earlier run must not lie beside a summary that does not speak of them."""
    for suffix in ("json", "txt", "png"):
        (out / f"{MEASURED}.{suffix}").unlink(missing_ok=True)


def goals_line(out: Path) -> str:
    """How many of the goals were met, and how many rows are missing; empty without figures."""
    file = out / f"{MEASURED}.json"
    if not file.exists():
        return ""
    record = json.loads(file.read_text())
    met = sum(goal["met"] == "yes" for goal in record["goals"])
    planned, missing = record["planned"], record["planned"] - len(record["results"])
    if missing:  # "all met" would be wrong: some of these may have a goal
        return (
            f"{met} goals met and {len(record['goals']) - met} missed so far: {missing} of "
            f"{planned} rows not measured; see {MEASURED}.txt"
        )
    return f"{met} of {len(record['goals'])} goals met; those missed are marked in {MEASURED}.txt"


def summary(done: Sequence[Step], goals: str) -> str:
    """A table in Markdown."""
    lines = ["| step | verdict | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {s.name} | {s.verdict} | {s.seconds:.0f} | {s.note.replace('|', '/')} |" for s in done
    ]
    return "\n".join([*lines, *(["", goals] if goals else [])])


def main(arguments: Sequence[str]) -> int:
    """Runs all steps; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build, test, sanitize and measure on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps to run")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    end = time.monotonic() + options.seconds
    every = steps(out)
    unknown = set(options.only or ()) - {step.name for step in every}
    if unknown:
        parser.error(f"--only: no step {', '.join(sorted(unknown))}")
    todo = [step for step in every if not options.only or step.name in options.only]
    for step in todo:
        left = end - time.monotonic()
        if step.name == "benchmark":  # what is left; the rows it has no time for are named
            step.command += ["--budget", f"{max(0.0, left - BUDGET_MARGIN):.0f}"]
            remove_measured(out)
        step.run(log, max(1.0, left))
    # A benchmark that failed may have measured most rows: its file is written after each.
    goals = goals_line(out) if any(step.name == "benchmark" for step in todo) else ""
    text = summary(todo, goals)
    (out / "gpu.md").write_text(text + "\n")
    kept = ("name", "verdict", "seconds", "note")
    record = [{key: getattr(s, key) for key in kept} | {"command": s.typed()} for s in todo]
    (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{text}\n\nwritten to {out}: gpu.md, gpu.json, gpu.log", end="")
    print(f", {MEASURED}.*" if goals else "")
    failed = [step.name for step in todo if step.verdict == FAILED]
    if failed:
        print(f"make gpu: FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
