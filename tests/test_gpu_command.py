"""`make gpu`: every step runs, what failed is told, and nothing outlives its limit."""

from __future__ import annotations

import importlib.util
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
    for line in ("| breaks | FAILED | 0 | exit status 1: no such thing |",
                 "| absent | left out | 0 | there is no tool |",
                 "| doubted | FAILED | 0 | said 5",
                 "| works | ok | 0 | all / well |"):  # fmt: skip
        assert line in table
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


def test_what_is_no_success(gpu: Any) -> None:
    assert gpu.no_device('{"cuda_build": null}') == "pydist was built without CUDA"
    assert gpu.no_device('x\n{"cuda_build": "13", "cuda_devices": []}') == "no CUDA device"
    assert gpu.no_device('{"cuda_build": "13", "cuda_devices": ["H200"]}') == ""
    assert gpu.nothing_ran("44 skipped in 1.2s") == "no test ran"
    assert gpu.nothing_ran("1 passed, 44 skipped in 1.2s") == ""


def test_the_steps_of_this_machine(gpu: Any, tmp_path: Path) -> None:
    names = [step.name for step in gpu.steps(tmp_path)]
    assert names == ["build", "info", "check", "tests", *gpu.SANITIZERS, "benchmark"]
    tests = next(step for step in gpu.steps(tmp_path) if step.name == "tests")
    assert "tests/test_gpu_ranks.py" in tests.command
