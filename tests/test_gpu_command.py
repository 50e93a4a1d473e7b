"""`make gpu`: every step runs, what failed is told, and nothing outlives its limit."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent.parent / "bench" / "gpu.py"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="not a source tree")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_command", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_command", module)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_step_runs_and_failures_are_told(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(out: Path) -> list[Any]:
        return [
            gpu.Step("breaks", python("import sys; sys.exit('no such thing')"), 60),
            gpu.Step("absent", [], 60, why="there is no tool"),
            gpu.Step("doubted", python("print(5)"), 60, judge=lambda output: f"said {output}"),
            gpu.Step("nowhere", ["/no/such/program"], 60),
            gpu.Step("works", python("print('all | well')"), 60),
        ]

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "FAILED: breaks, doubted, nowhere\n" in capsys.readouterr().err
    table = (tmp_path / "gpu.md").read_text()
    for line in (r"\| breaks \| FAILED \| \d+ \| exit status 1: no such thing \|",
                 r"\| absent \| left out \| 0 \| there is no tool \|",
                 r"\| doubted \| FAILED \| \d+ \| said 5",
                 r"\| works \| ok \| \d+ \| all / well \|"):  # fmt: skip
        assert re.search(line, table), table
    assert "no such thing" in (tmp_path / "gpu.log").read_text()
    assert gpu.main(["--out", str(tmp_path), "--only", "works"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--only", "typo"])


def test_a_step_that_takes_too_long_ends_with_its_children(gpu: Any, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(file)!r}).touch(); time.sleep(.05)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.Step("hangs", python(parent), 60)
    step.run(tmp_path / "log", left=5.0)
    assert step.verdict == gpu.FAILED and "longer than 5 s" in step.note
    assert file.exists(), "the child never ran"
    file.unlink()
    time.sleep(0.5)
    assert not file.exists(), "the child lives on"


def test_a_child_that_left_the_session_is_not_waited_for(gpu: Any, tmp_path: Path) -> None:
    end, waited = tmp_path / "end", tmp_path / "waited"
    child = (
        "import pathlib, sys, time\nfor _ in range(400):\n"
        f"    if pathlib.Path({str(end)!r}).exists(): sys.exit()\n    time.sleep(.1)\n"
        f"pathlib.Path({str(waited)!r}).touch()"
    )
    parent = (
        "import subprocess, sys, time; print('so far', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "time.sleep(60)"
    )
    gpu.END_SECONDS = 0.5
    try:
        code, output = gpu.run_limited(python(parent), dict(os.environ), 3.0, tmp_path)
        assert not waited.exists(), "it was waited for to the end"
    finally:
        end.touch()
    assert code is None and "so far" in output


def test_a_judge_that_trips_is_a_failure_of_its_step(gpu: Any, tmp_path: Path) -> None:
    step = gpu.Step("told", python("print('{ no JSON')"), 60, judge=gpu.no_device)
    step.run(tmp_path / "log", left=60.0)
    assert step.verdict == gpu.FAILED and step.note.startswith("JSONDecodeError: ")


JUDGED = {
    "memcheck": ("all equal to the reference\n========= ERROR SUMMARY: 0 errors", True),
    "race": ("all equal to the reference\n=== RACECHECK SUMMARY: 0 hazards displayed (0 err", True),
    "errors": ("all equal to the reference\n========= ERROR SUMMARY: 3 errors", False),
    "warnings": (
        "all equal to the reference\n== RACECHECK SUMMARY: 1 hazard (0 err, 1 w",
        False,
    ),
    "ten": ("all equal to the reference\n========= ERROR SUMMARY: 10 errors", False),
    "silent": ("all equal to the reference", False),
    "cut off": ("========= ERROR SUMMARY: 0 errors", False),
}


@pytest.mark.parametrize("what", JUDGED)
def test_what_the_sanitizer_says(gpu: Any, what: str) -> None:
    output, clean = JUDGED[what]
    assert (gpu.no_errors(output) == "") is clean


CANNOT = {
    "device": ("========= Error: Device not supported. Please refer to", "Error: Device not supp"),
    "driver": ("gpu_pass: no CUDA device (cuInit: error 999)", "gpu_pass: no CUDA device (cuI"),
    "found": ("gpu_pass: died (error 999)\n========= ERROR SUMMARY: 2 errors", ""),
    "ended": ("error 999\nall equal to the reference\n", ""),
    "other": ("Segmentation fault", ""),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_sanitizer_that_cannot_work_is_left_out(gpu: Any, what: str, tmp_path: Path) -> None:
    output, line = CANNOT[what]
    code = f"import sys; print({output!r}); sys.exit(1)"
    step = gpu.Step("memcheck", python(code), 60, judge=gpu.no_errors, cannot=gpu.tool_cannot)
    step.run(tmp_path / "log", left=60.0)
    if line:
        assert step.verdict == gpu.LEFT_OUT and step.note.startswith(line)
    else:
        assert step.verdict == gpu.FAILED


def test_what_is_no_success(gpu: Any) -> None:
    assert gpu.no_device('{"cuda_build": null}') == "pydist was built without CUDA"
    assert gpu.no_device('x\n{"cuda_build": "13", "cuda_devices": []}') == "no CUDA device"
    assert gpu.no_device('{"cuda_build": "13", "cuda_devices": ["H200"]}') == ""
    assert gpu.no_device('{"cuda_build": "13", "cuda_devices": ["H200"]}\nSomeWarning') == ""
    assert gpu.no_device("nothing") == "it printed no JSON"
    assert gpu.nothing_ran("44 skipped in 1.2s") == "no test ran"
    assert gpu.nothing_ran("0 passed, 44 skipped in 1.2s") == "no test ran"
    assert gpu.nothing_ran("1 passed in 1.2s\nsome library says good-bye") == ""
    assert gpu.nothing_ran("1 passed, 44 skipped in 1.2s") == ""


def test_the_steps_of_this_machine(gpu: Any, tmp_path: Path) -> None:
    names = [step.name for step in gpu.steps(tmp_path)]
    assert names == ["build", "info", "check", "tests", *gpu.SANITIZERS, "benchmark"]
    tests = next(step for step in gpu.steps(tmp_path) if step.name == "tests")
    assert "tests/test_gpu_ranks.py" in tests.command
    assert all(
        "--report-api-errors no" in step.typed() and step.typed().startswith("compute-sanitizer ")
        for step in gpu.steps(tmp_path)
        if step.name in gpu.SANITIZERS
    )


def test_a_command_is_written_down_without_paths_of_this_machine(gpu: Any) -> None:
    step = gpu.Step("memcheck", ["/opt/cuda/bin/compute-sanitizer", sys.executable, "x.py"], 60)
    assert step.typed() == "compute-sanitizer python3 x.py"


# --------------------------------------------------------------------------- figures


def figures(measured: int, planned: int, met: int, missed: int) -> dict[str, Any]:
    goals = [{"met": "yes"}] * met + [{"met": "no"}] * missed
    return {"results": [{}] * measured, "planned": planned, "goals": goals, "skipped": []}


def test_goals_are_not_all_met_while_rows_are_missing(gpu: Any, tmp_path: Path) -> None:
    file = tmp_path / "kernels-cuda.json"
    assert gpu.goals_line(tmp_path) == ""
    file.write_text(json.dumps(figures(10, 10, 4, 1)))
    assert gpu.goals_line(tmp_path).startswith("4 of 5 goals met; ")
    file.write_text(json.dumps(figures(8, 10, 4, 0)))
    line = gpu.goals_line(tmp_path)
    assert "4 goals met" in line and "2 of 10 rows not measured" in line
    assert "4 of 4" not in line


@pytest.mark.parametrize("writes", [True, False])
def test_figures_are_those_of_this_run(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    """Even a benchmark that failed has measured something; one that wrote nothing leaves none."""
    new = json.dumps(figures(1, 2, 1, 0))
    code = f"open('kernels-cuda.json', 'w').write({new!r}); " if writes else ""
    code += "import sys; sys.exit('failed')"
    step = gpu.Step("benchmark", python(code), 60, folder=tmp_path)
    monkeypatch.setattr(gpu, "steps", lambda out: [step])
    for suffix in ("json", "txt", "png"):
        (tmp_path / f"kernels-cuda.{suffix}").write_text("stale")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    left = sorted(path.name for path in tmp_path.glob("kernels-cuda.*"))
    assert left == (["kernels-cuda.json"] if writes else [])
    assert ("1 of 2 rows not measured" in (tmp_path / "gpu.md").read_text()) is writes


def test_the_benchmark_takes_few_samples(gpu: Any, tmp_path: Path) -> None:
    assert "--repeats 10" in gpu.benchmark(tmp_path).typed()


# --------------------------------------------------------------------------- the sanitizers' pass


@pytest.fixture
def gpu_pass(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_pass", SOURCE.with_name("gpu_pass.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # the module sets it for good
    spec.loader.exec_module(module)
    return module


def test_a_cupy_that_cannot_be_imported_leaves_torch(
    gpu_pass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so.12 is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(gpu_pass.environment, "cuda_devices", lambda: ["a card"])
    monkeypatch.setattr(gpu_pass.environment, "torch_sees_cuda", lambda: True)
    monkeypatch.setattr(gpu_pass.backends, "TorchMemory", lambda index: "torch")
    monkeypatch.setattr(gpu_pass, "KernelRunner", lambda memory: memory)
    assert gpu_pass.runner() == "torch"
