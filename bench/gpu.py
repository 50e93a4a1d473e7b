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
            self.note = self.judge(output)
        self.verdict = FAILED if self.note else OK
        if not self.note and lines:
            self.note = lines[-1].strip("= ")[:200]

    def typed(self) -> str:
        """The command without this machine's paths."""
        return shlex.join(["python3" if word == sys.executable else word for word in self.command])


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
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output
        raise


def environment(added: dict[str, str]) -> dict[str, str]:
    """That of this process, with the package of this source tree first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **added}


def has(module: str) -> bool:
    """Whether this Python can import it."""
    return importlib.util.find_spec(module) is not None


def no_device(output: str) -> str:
    """What `pydist info` lacks."""
    facts = json.loads(output[output.index("{") :])
    if facts["cuda_build"] is None:
        return "pydist was built without CUDA"
    return "" if facts["cuda_devices"] else "no CUDA device"


def nothing_ran(output: str) -> str:
    """Tests that were all skipped prove nothing."""
    return "" if " passed" in output.rstrip().splitlines()[-1] else "no test ran"


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
        quiet = ["--report-api-errors", "no"] if name == "memcheck" else []
        command = [
            tool or "", "--tool", name, *quiet, "--error-exitcode", str(SANITIZER_FAILED),
            *python, "bench/gpu_pass.py",
        ]  # fmt: skip
        why = "" if tool else "compute-sanitizer was not found"
        found.append(Step(name, command, 45.0, why, judge=no_errors))
    return [*found, benchmark(out)]


def no_errors(output: str) -> str:
    """The sanitizer's own summary must say that nothing was found."""
    if "all equal to the reference" not in output:
        return "the pass did not end"
    found = [line for line in output.splitlines() if "SUMMARY" in line]
    clean = found and all("SUMMARY: 0 " in line for line in found)
    return "" if clean else f"{found[-1] if found else 'no summary from the tool'}"


def benchmark(out: Path) -> Step:
    """The kernel benchmark; its time is set when its turn comes."""
    needs = [name for name in ("torch", "rich") if not has(name)]
    command = [
        sys.executable, "-m", "pydist", "bench", "kernels", "--device", "cuda",
        "--json", "kernels-cuda.json", "--table", "kernels-cuda.txt",
    ]  # fmt: skip
    if has("matplotlib"):
        command += ["--plot", "kernels-cuda.png"]
    else:
        print("matplotlib is not installed: the benchmark draws no plot")
    why = f"{', '.join(needs)} not installed" if needs else ""
    return Step("benchmark", command, TOTAL_SECONDS, why, judge=measured(out), folder=out)


def measured(out: Path) -> Callable[[str], str]:
    """Whether any row was written."""

    def judge(output: str) -> str:
        record = json.loads((out / "kernels-cuda.json").read_text())
        return "" if record["results"] else "nothing was measured"

    return judge


def goals_line(out: Path) -> str:
    """How many of the goals were met."""
    goals = json.loads((out / "kernels-cuda.json").read_text())["goals"]
    met = sum(goal["met"] == "yes" for goal in goals)
    return f"{met} of {len(goals)} goals met; those missed are marked in kernels-cuda.txt"


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
            step.command += ["--budget", f"{max(0.0, left - 45):.0f}"]
        step.run(log, max(1.0, left))
    measured_now = any(step.name == "benchmark" and step.verdict == OK for step in todo)
    text = summary(todo, goals_line(out) if measured_now else "")
    (out / "gpu.md").write_text(text + "\n")
    kept = ("name", "verdict", "seconds", "note")
    record = [{key: getattr(s, key) for key in kept} | {"command": s.typed()} for s in todo]
    (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{text}\n\nwritten to {out}: gpu.md, gpu.json, gpu.log", end="")
    print(", kernels-cuda.*" if measured_now else "")
    failed = [step.name for step in todo if step.verdict == FAILED]
    if failed:
        print(f"make gpu: FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
