"""Which steps `make gpu` runs, in which order, and how long each may take."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from facts import find_tool
from steps import ROOT, Step, environment

sys.path.insert(0, str(ROOT / "tools"))
from build_module import Python, is_current

FILES = {
    "environment": "gpu-environment.json",
    "kernels": "gpu-kernels.json",
    "counters": "gpu-counters.json",
    "hook": "gpu-hook.json",
    "rivals": "gpu-rivals.json",
}
"""What steps write, by step; beside gpu.md, gpu.json and gpu.log."""

FIRST_PART = 4  # steps that --minutes 4 runs
SHORT_MINUTES = 5.0  # with fewer there is no second part
SANITIZER_FAILED = 97
PASS_ENDED = "all equal to the reference"
SHARED_MEMORY = (
    "topk",
    "elias",
)  # the families whose kernels use it: what two of the tools look at
SANITIZERS: dict[str, tuple[str, ...]] = {
    "memcheck": (), "initcheck": (), "racecheck": SHARED_MEMORY, "synccheck": SHARED_MEMORY,
}  # fmt: skip
RANK_TESTS = (
    "tests/cuda/test_gpu_ranks.py",
    "tests/cuda/test_gpu_collectives.py",
    "tests/cuda/test_gpu_hooks.py",
)
SLOW_KERNELS = ("elias_encode", "elias_decode")  # not in the first part
LAST_ROW = 20.0  # seconds of the benchmark's limit for its last row and its tables


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        out: Where files go.
        device: ``"cuda"``; with ``"cpu"`` the same steps run small, to show that they do.
        minutes: For everything.
        compare_module: Another build of the module, to time beside this one.
    """

    out: Path
    device: str = "cuda"
    minutes: float = 9.5
    compare_module: str = ""

    @property
    def cuda(self) -> bool:
        """Whether it is the real thing."""
        return self.device == "cuda"

    def file(self, step: str) -> str:
        """Where a step writes."""
        return str(self.out / FILES[step])


def phases(settings: Settings) -> list[list[Step]]:
    """All steps, in order; those of an inner list run at once."""
    alone = [module(settings), facts(settings), check(settings), kernels(settings)]
    assert len(alone) == FIRST_PART
    first = [[step] for step in alone]
    if settings.minutes < SHORT_MINUTES:
        return first
    together = [*tests(settings), *sanitizers(settings)]
    last = [counters(settings), hook(settings), rivals(settings)]
    return [*first, together, *([step] for step in last)]


def expected_seconds(steps: list[list[Step]]) -> float:
    """How long all of it should take, with 16 cores."""
    return sum(max(step.expected for step in phase) for phase in steps)


def has(*modules: str) -> str:
    """What this Python can't import, in words; empty if nothing."""
    lacks = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacks)} not installed" if lacks else ""


# --------------------------------------------------------------------------- the first part


def module(settings: Settings) -> Step:
    """The compiled module: built, unless one is there that is current and has what it takes."""
    command = [sys.executable, "tools/build_module.py"]
    env = {"PYDIST_CUDA": "1"} if settings.cuda else {}
    there, lacks = usable_module(settings.cuda), has("pybind11")
    if not shutil.which("cmake") and has("cmake"):
        lacks = lacks or "cmake was not found"
    return Step("module", command, 200.0, 0.0 if there else 40.0, there or lacks, env)


def usable_module(cuda: bool) -> str:
    """What to say of the module that is there; empty where one must be built."""
    python = Python.at(sys.executable)
    assert python is not None
    file = ROOT / "pydist" / f"_C{python.suffix}"
    if not file.exists() or not is_current(file):
        return ""
    code = "import pydist._C; print(pydist._C.CUDA_BUILD)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=environment({}),
    )  # fmt: skip
    said = done.stdout.strip()
    if done.returncode or (cuda and not said.startswith("CUDA")):
        return ""
    return f"{file.name} is there, of these sources: {said}"


def facts(settings: Settings) -> Step:
    """The card, the versions, the speed of a copy."""
    command = [sys.executable, "bench/gpu/facts.py", "--device", settings.device]
    command += ["--json", settings.file("environment")]
    return Step("environment", command, 40.0, 10.0)


def check(settings: Settings) -> Step:
    """Every kernel against the reference, bit by bit."""
    command = [sys.executable, "-m", "pydist", "check", "--device", settings.device]
    return Step("check", command, 60.0, 15.0)


def kernels(settings: Settings) -> Step:
    """The kernels alone: the figures that decide, without rivals."""
    other = ["--compare-module", settings.compare_module] if settings.compare_module else []
    size, repeats = ("64Mi", "5") if settings.cuda else ("64Ki", "1")
    command = [
        *_bench(settings, "kernels", size, repeats=repeats), "--no-rivals",
        "--dtype", "float32", "bfloat16", "--without", *SLOW_KERNELS, *other,
    ]  # fmt: skip
    limit, expected = (110.0, 55.0) if not other else (200.0, 100.0)
    return Step("kernels", command, limit, expected, has("torch", "rich"),
                judge=lambda output: nothing_measured(settings, "kernels"),
                budgeted=LAST_ROW)  # fmt: skip


def _bench(settings: Settings, step: str, *sizes: str, repeats: str) -> list[str]:
    small = [] if settings.cuda else ["--threads", "1"]
    return [
        sys.executable, "bench/kernels.py", "--device", settings.device, *small, "--isolate",
        "--row-seconds", "20", "--repeats", repeats, "--sizes", *sizes, "--no-compile",
        "--json", settings.file(step),
    ]  # fmt: skip


def nothing_measured(settings: Settings, step: str) -> str:
    """Whether a benchmark's file holds no row."""
    record = json.loads(Path(settings.file(step)).read_text())
    return "" if record["results"] else "nothing was measured"


# --------------------------------------------------------------------------- the second part


def tests(settings: Settings) -> list[Step]:
    """The tests of kernels, and those of ranks, on the card; else their twins on the CPU."""
    lacks = has("pytest", "torch")
    cores = len(os.sched_getaffinity(0))
    workers = min(4, cores // 4)
    spread = ["-n", str(workers)] if workers > 1 and not has("xdist") else []
    marked = "gpu" if settings.cuda else "not gpu"
    pytest = [sys.executable, "-m", "pytest", "-m", f"{marked} and not soak", "-q",
              "--durations=3", "-p", "no:cacheprovider"]  # fmt: skip
    by_file = ["--dist", "loadfile"] if spread else []
    return [
        Step("kernel tests", [*pytest, *spread, "tests/cuda/test_gpu.py"], 150.0, 75.0, lacks,
             judge=nothing_ran),
        Step("rank tests", [*pytest, *spread, *by_file, *RANK_TESTS], 150.0, 100.0, lacks,
             judge=nothing_ran),
    ]  # fmt: skip


def nothing_ran(output: str) -> str:
    """Tests that were all skipped prove nothing."""
    return "" if re.search(r"\b[1-9]\d* passed\b", output) else "no test ran"


def sanitizers(settings: Settings) -> list[Step]:
    """Every kernel at odd lengths, under each tool that has something to look at."""
    tool = find_tool("compute-sanitizer")
    found = []
    for name, families in SANITIZERS.items():
        only = ["--only", *families] if families else []
        command = [sys.executable, "bench/gpu/kernel_pass.py", "--device", settings.device, *only]
        if not settings.cuda:
            judge = lambda output: "" if PASS_ENDED in output else "the pass did not end"  # noqa: E731
            found.append(Step(name, command, 150.0, 60.0, judge=judge))
            continue
        # A library that asks whether the driver has a function gets an error, which is none here.
        command = [
            tool or "compute-sanitizer", "--tool", name, "--report-api-errors", "no",
            "--error-exitcode", str(SANITIZER_FAILED), *command,
        ]  # fmt: skip
        why = "" if tool else "compute-sanitizer was not found"
        found.append(Step(name, command, 150.0, 60.0, why, judge=no_errors, cannot=tool_cannot))
    return found


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
    return _line_with(output, *signs)


def profiler_cannot(output: str) -> str:
    """The line in which ncu says that this user may not read counters."""
    return _line_with(output, "ERR_NVGPUCTRPERM", "does not have permission")


def _line_with(output: str, *signs: str) -> str:
    lines = output.splitlines()
    return next((line.strip("= ") for line in lines if any(sign in line for sign in signs)), "")


def counters(settings: Settings) -> Step:
    """Hardware counters of ten kernels."""
    command = [sys.executable, "bench/gpu/counters.py", "--device", settings.device]
    command += ["--json", settings.file("counters")]
    why = "" if not settings.cuda or find_tool("ncu") else "ncu was not found"
    return Step("counters", command, 60.0, 25.0, why or has("torch"), cannot=profiler_cannot)


def hook(settings: Settings) -> Step:
    """The DDP hooks on the card: times, waits, a profile."""
    command = [sys.executable, "bench/gpu/hook.py", "--device", settings.device]
    command += ["--json", settings.file("hook")]
    return Step("hook", command, 90.0, 30.0, has("torch"), budgeted=35.0)


def rivals(settings: Settings) -> Step:
    """The kernels beside what people use today, and launches; with the time that is left."""
    sizes = ("64Mi", "64Ki") if settings.cuda else ("64Ki",)
    command = [*_bench(settings, "rivals", *sizes, repeats="5" if settings.cuda else "1"),
               "--dtype", "float32"]  # fmt: skip
    return Step("rivals", command, 150.0, 60.0, has("torch", "rich"),
                judge=lambda output: nothing_measured(settings, "rivals"),
                budgeted=LAST_ROW + 10.0)  # fmt: skip


def remove_written(out: Path) -> None:
    """Figures of an earlier run must not lie beside a summary that does not speak of them."""
    for name in FILES.values():
        (out / name).unlink(missing_ok=True)
