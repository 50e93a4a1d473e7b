"""`make gpu`: every step runs, what failed is told, and nothing outlives its limit."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pydist import _C
from pydist.kernels.launch import launch

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("steps", "facts", "plan", "counters", "hook", "report", "kernel_pass", "kernel_model",
           "build_module")  # fmt: skip
OF_THE_HOST = {"crc32c", "first_damaged", "seal_messages"}  # there are none on a device
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="not a source tree")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/gpu/__main__.py, and the modules beside it."""
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_main", BENCH / "gpu" / "__main__.py")
    assert spec and spec.loader
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    yield SimpleNamespace(
        main=main.main, command=main, **{name: sys.modules.get(name) for name in MODULES}
    )
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(gpu: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *phases: Any) -> int:
    """The command with these steps in place of its own."""
    monkeypatch.setattr(gpu.command, "phases", lambda settings: [list(phase) for phase in phases])
    return gpu.main(["--out", str(out)])


def test_every_step_runs_and_failures_are_told(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = gpu.steps.Step
    looks = f"print(open({str(tmp_path / 'gpu.json')!r}).read().count('verdict'))"
    phases = [
        [step("breaks", python("import sys; sys.exit('no such thing')"), 60)],
        [step("absent", [], 60, why="there is no tool")],
        [step("doubted", python("print(5)"), 60, judge=lambda output: f"said {output}")],
        [
            step("nowhere", ["/no/such/program"], 60),
            step("works", python("print('all | well')"), 60),
        ],
        [step("looks", python(looks), 60)],
    ]
    assert run(gpu, monkeypatch, tmp_path, *phases) == 1
    assert "FAILED: breaks, doubted, nowhere\n" in capsys.readouterr().err
    table = (tmp_path / "gpu.md").read_text()
    for line in (r"\| breaks \| FAILED \| \d+ \| 0 \| exit status 1: no such thing \|",
                 r"\| absent \| left out \| 0 \| 0 \| there is no tool \|",
                 r"\| doubted \| FAILED \| \d+ \| 0 \| said 5",
                 r"\| works \| ok \| \d+ \| 0 \| all / well \|",
                 r"\| looks \| ok \| \d+ \| 0 \| 5 \|"):  # fmt: skip
        assert re.search(line, table), table
    assert "no such thing" in (tmp_path / "gpu.log").read_text()
    with pytest.raises(SystemExit):
        gpu.main(["--only", "typo"])


def test_steps_of_a_phase_run_at_once(gpu: Any, tmp_path: Path) -> None:
    """Each waits for what the other writes."""

    def waits(mine: str, other: str) -> list[str]:
        mine, other = str(tmp_path / mine), str(tmp_path / other)
        code = f"import pathlib, time; pathlib.Path({mine!r}).touch()\n"
        return python(f"{code}while not pathlib.Path({other!r}).exists(): time.sleep(.01)")

    steps = [gpu.steps.Step(a, waits(a, b), 60) for a, b in (("one", "two"), ("two", "one"))]
    gpu.steps.run_together(steps, tmp_path / "log", 60.0)
    assert [step.verdict for step in steps] == ["ok", "ok"]


def test_nothing_begins_without_time(gpu: Any, tmp_path: Path) -> None:
    step = gpu.steps.Step("late", python("print('ran')"), 60)
    gpu.steps.run_together([step], tmp_path / "log", 1.0)
    assert (step.verdict, step.note) == (gpu.steps.LEFT_OUT, "no time left")


def test_a_step_that_takes_too_long_ends_with_its_children(gpu: Any, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(file)!r}).touch(); time.sleep(.05)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.steps.Step("hangs", python(parent), 60)
    step.run(tmp_path / "log", left=5.0)
    assert step.verdict == gpu.steps.FAILED and "longer than 5 s" in step.note
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
    gpu.steps.END_SECONDS = 0.5
    try:
        code, output = gpu.steps.run_limited(python(parent), dict(os.environ), 3.0, tmp_path)
        assert not waited.exists(), "it was waited for to the end"
    finally:
        end.touch()
    assert code is None and "so far" in output


def test_a_judge_that_trips_is_a_failure_of_its_step(gpu: Any, tmp_path: Path) -> None:
    settings = gpu.plan.Settings(tmp_path)
    judge = lambda output: gpu.plan.nothing_measured(settings, "kernels")  # noqa: E731
    step = gpu.steps.Step("told", python("print('wrote nothing')"), 60, judge=judge)
    step.run(tmp_path / "log", left=60.0)
    assert step.verdict == gpu.steps.FAILED and step.note.startswith("FileNotFoundError: ")


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
    assert (gpu.plan.no_errors(output) == "") is clean


CANNOT = {
    "device": ("========= Error: Device not supported. Please refer to", "Error: Device not supp"),
    "driver": ("kernel_pass: no CUDA device (cuInit: error 999)", "kernel_pass: no CUDA device ("),
    "found": ("kernel_pass: died (error 999)\n========= ERROR SUMMARY: 2 errors", ""),
    "ended": ("error 999\nall equal to the reference\n", ""),
    "other": ("Segmentation fault", ""),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_sanitizer_that_cannot_work_is_left_out(gpu: Any, what: str, tmp_path: Path) -> None:
    output, line = CANNOT[what]
    code = f"import sys; print({output!r}); sys.exit(1)"
    step = gpu.steps.Step(
        "memcheck", python(code), 60, judge=gpu.plan.no_errors, cannot=gpu.plan.tool_cannot
    )
    step.run(tmp_path / "log", left=60.0)
    if line:
        assert step.verdict == gpu.steps.LEFT_OUT and step.note.startswith(line)
    else:
        assert step.verdict == gpu.steps.FAILED


def test_what_is_no_success(gpu: Any, tmp_path: Path) -> None:
    nothing_ran = gpu.plan.nothing_ran
    assert nothing_ran("44 skipped in 1.2s") == "no test ran"
    assert nothing_ran("0 passed, 44 skipped in 1.2s") == "no test ran"
    assert nothing_ran("1 passed in 1.2s\nsome library says good-bye") == ""
    assert nothing_ran("1 passed, 44 skipped in 1.2s") == ""
    settings = gpu.plan.Settings(tmp_path)
    Path(settings.file("kernels")).write_text('{"results": []}')
    assert gpu.plan.nothing_measured(settings, "kernels") == "nothing was measured"
    denied = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access"
    assert gpu.plan.profiler_cannot(f"x\n{denied}\n").startswith("ERROR== ERR_NVGPUCTRPERM")
    assert gpu.plan.profiler_cannot("Segmentation fault") == ""


# --------------------------------------------------------------------------- the plan


def plan_of(gpu: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    monkeypatch.setattr(gpu.plan, "usable_module", lambda cuda: "it is there")
    return gpu.plan.phases(gpu.plan.Settings(*args, **options))


def test_the_steps_of_this_machine(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ["module", "environment", "check", "kernels"]
    every = plan_of(gpu, monkeypatch, tmp_path)
    assert [[step.name for step in phase] for phase in every] == [
        *([name] for name in first), ["kernel tests", "rank tests", *gpu.plan.SANITIZERS],
        ["counters"], ["hook"], ["rivals"],
    ]  # fmt: skip
    short = plan_of(gpu, monkeypatch, tmp_path, minutes=4)
    assert [step.name for phase in short for step in phase] == first
    flat = [step for phase in every for step in phase]
    assert gpu.plan.expected_seconds(every) < 300 and gpu.plan.expected_seconds(short) < 120
    assert all(0 < step.limit <= 200 and step.expected <= step.limit for step in flat)
    typed = {step.name: gpu.steps.typed(step.command) for step in flat}
    assert "--report-api-errors no" in typed["racecheck"] and "topk elias" in typed["racecheck"]
    assert typed["memcheck"].startswith("compute-sanitizer ") and "topk" not in typed["memcheck"]
    for name in (
        "tests/cuda/test_gpu_ranks.py",
        "tests/cuda/test_gpu_collectives.py",
        "-m 'gpu and not soak'",
    ):
        assert name in typed["rank tests"]
    # Figures come first, without what waits for the device; rivals last.
    assert "--no-rivals --dtype float32 bfloat16 --without elias_encode" in typed["kernels"]
    assert "--compare-module" not in typed["kernels"] and "--sizes 64Mi" in typed["kernels"]
    other = plan_of(gpu, monkeypatch, tmp_path, compare_module="/else/old.so")
    assert gpu.steps.typed(other[3][0].command).endswith("--compare-module old.so")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_files_of_the_steps(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Eight at most: those of the steps, which an earlier run may have left, and the command's."""
    written = {
        Path(step.command[step.command.index("--json") + 1]).name
        for phase in plan_of(gpu, monkeypatch, tmp_path, device=device)
        for step in phase
        if "--json" in step.command
    }
    assert written == set(gpu.plan.FILES.values()) and len(written) + 3 <= 8
    for name in written:
        (tmp_path / name).write_text("stale")
    run(gpu, monkeypatch, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"gpu.md", "gpu.json", "gpu.log"}


def test_a_module_that_is_there_is_used(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is of these sources and has CUDA where that is asked for."""
    plan = gpu.plan
    monkeypatch.setattr(plan, "is_current", lambda file: True)
    there = plan.usable_module(False)
    assert there.startswith("_C.") and "is there" in there
    cuda = plan.usable_module(True)
    assert cuda == (there if _C.CUDA_BUILD else "")
    monkeypatch.setattr(plan, "is_current", lambda file: False)
    assert plan.usable_module(False) == ""
    step = plan.module(plan.Settings(tmp_path))
    assert step.env == {"PYDIST_CUDA": "1"} and step.command[1] == "tools/build_module.py"


def test_a_command_is_written_down_without_paths_of_this_machine(gpu: Any) -> None:
    command = [
        "/opt/cuda/bin/compute-sanitizer",
        sys.executable,
        "x.py",
        "--json",
        "/home/me/a.json",
    ]
    assert gpu.steps.typed(command) == "compute-sanitizer python3 x.py --json a.json"


def test_a_real_step(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole dry run takes minutes: see bench/README.md."""
    command = ["--device", "cpu", "--out", str(tmp_path), "--only", "environment"]
    assert gpu.main(command) == 0
    facts = json.loads((tmp_path / "gpu-environment.json").read_text())
    assert facts["copy_gigabytes_per_second"] > 0 and facts["packages"]["torch"]
    printed = capsys.readouterr().out
    assert f"torch {facts['packages']['torch']}" in printed
    last = printed.rstrip().splitlines()
    assert last[-3].startswith("| environment | ok |"), "the table comes last"


# --------------------------------------------------------------------------- figures


def row(**other: Any) -> dict[str, Any]:
    seconds = {"median": 1e-4, "lower_quartile": 1e-4, "upper_quartile": 1e-4}
    return {
        "kernel": "pack_signs", "variant": "", "dtype": "float32", "numel": 64 << 20, "threads": 0,
        "bytes": 2.7e8, "seconds": seconds, "gigabytes_per_second": 2700.0,
        "of_copy": {"median": 0.9}, "copy": {"bytes": 3e9, "seconds": {"median": 1e-3}},
        "rivals": {}, "rivals_failed": {}, **other,
    }  # fmt: skip


def figures(rows: list[Any], planned: int, **other: Any) -> str:
    goals = [{"met": "yes"}, {"met": "no"}]
    skipped = [{"row": "lion_pack_ 64Mi", "why": "it hangs", "failed": True}]
    record = {
        "results": rows,
        "planned": planned,
        "goals": goals,
        "skipped": skipped,
        "machine": {},
    }
    return json.dumps(record | other)


def test_figures_stand_beside_the_model(gpu: Any, tmp_path: Path) -> None:
    compared = {"compared": {"rows": [{"row": "pack_signs float32, 64Mi", "speedup": 1.25}]}}
    record = figures([row(), row(kernel="elias_encode")], 3, other_module=compared)
    (tmp_path / "gpu-kernels.json").write_text(record)
    lines = gpu.report.report([], tmp_path).splitlines()
    assert re.fullmatch(r"pack_signs +float32 +100\.0 +2700 +90% +97% +1\.25", lines[2]), lines[2]
    assert re.fullmatch(r"elias_encode +float32 +100\.0 +2700 +90% +-", lines[3].rstrip())
    assert lines[4] == "1 of 2 goals met; 2 of 3 rows measured"
    assert lines[5] == "FAILED: lion_pack_ 64Mi: it hangs"


def test_rivals_and_files_that_cannot_be_read(gpu: Any, tmp_path: Path) -> None:
    rivals = {"Triton": {"seconds": {"median": 3e-4}}}
    called = {"seconds": {"median": 1.5e-4}}
    beside = row(rivals=rivals, rivals_failed={"bitsandbytes": "no library"}, called=called)
    (tmp_path / "gpu-rivals.json").write_text(figures([beside], 1))
    (tmp_path / "gpu-kernels.json").write_text("{ cut off")
    (tmp_path / "gpu-hook.json").write_text('[{"name": "pydist Sign", "left_out": "no time left"}]')
    text = gpu.report.report([], tmp_path)
    assert re.search(r"  Triton +2\.0x\n  bitsandbytes: no library", text), text
    assert "gpu-kernels.json: JSONDecodeError" in text
    assert re.search(r"pydist Sign +no time left", text)
    assert text.endswith("|---|---|---|---|---|")


NCU = """==PROF== Connected to process 5
==PROF== Profiling "spin_kernel" - 0: 0%....100% - 3 passes
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","5","spin_kernel(long)","gpu__time_duration.sum","ns","1"
"1","5","void pydist::pack<float>","gpu__time_duration.sum","ns","100,000"
"1","5","void pydist::pack<float>","dram__bytes.sum","byte","553,648,128"
"1","5","void pydist::pack<float>","smsp__inst_executed.sum","inst","16777216"
"2","5","spin_kernel(long)","gpu__time_duration.sum","ns","1"
"3","5","first","gpu__time_duration.sum","ns","1000"
"3","5","first","lts__t_sector_hit_rate.pct","%","10"
"4","5","second","gpu__time_duration.sum","ns","3000"
"4","5","second","lts__t_sector_hit_rate.pct","%","50"
"4","5","second","dram__bytes.sum","byte","n/a"
==PROF== Disconnected from process 5
"""


def test_counters_find_their_kernels(gpu: Any) -> None:
    """Launches behind a mark are one call; what is not counted is left out."""
    rows = gpu.counters.report(NCU, "cuda")
    assert len(rows) == len(gpu.counters.CHOSEN) == 10
    assert rows[0]["kernel"] == "pack_signs" and rows[0]["seconds"] == pytest.approx(1e-4)
    assert rows[0]["moved"] == pytest.approx(2.0) and rows[0]["launches"] == 1
    assert rows[0]["instructions_per_element"] == pytest.approx(8.0)
    assert rows[1]["seconds"] == pytest.approx(4e-6) and rows[1]["launches"] == 2
    assert rows[1]["l2_hit_percent"] == pytest.approx(40.0) and "moved" not in rows[1]
    assert "seconds" not in rows[2]
    shown = gpu.counters.shown(rows)
    assert re.search(r"pack_signs \(\) float32 +100\.0 +2\.00x +8\.0", shown[1])


def test_a_method_that_hangs_costs_itself(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hook, begun, saved = gpu.hook, [], []
    names = [method.name for method in hook.methods()]

    def ranks_from(first: int, device: str, seconds: float) -> Iterator[Any]:
        begun.append(first)
        if first == 0:
            yield {"name": names[0], "seconds": 1.0}
            yield None  # it hangs
        elif first == 2:
            yield {"name": names[2], "error": "RuntimeError: no"}

    monkeypatch.setattr(hook, "ranks_from", ranks_from)
    found = hook.measure_all("cpu", 60.0, lambda rows: saved.append(len(rows)))
    assert begun == [0, 2, 3] and saved == [1, 2, 3, len(names)]
    assert found[1] == {"name": names[1], "error": "no answer"}
    assert [row.get("left_out") for row in found[3:]] == ["no time left"] * (len(names) - 3)
    assert [row["name"] for row in found] == names


def test_waits_are_counted_by_line_and_thread(gpu: Any) -> None:
    waits = gpu.hook.Waits()
    told = "called a synchronizing CUDA operation"
    waits._note(told, UserWarning, "/here/pydist/transport/exchange.py", 7)
    thread = threading.Thread(
        target=waits._note, args=(told, UserWarning, "/here/pydist/transport/exchange.py", 7),
        name="pydist-back",
    )  # fmt: skip
    thread.start()
    thread.join()
    waits._note("something else", UserWarning, "/here/pydist/transport/exchange.py", 7)
    assert waits.found == {
        "pydist/transport/exchange.py:7, calling thread": 1,
        "pydist/transport/exchange.py:7, pydist-back": 1,
    }


# --------------------------------------------------------------------------- the sanitizers' pass


@pytest.fixture
def kernel_pass(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # the module sets it for good
    return importlib.import_module("kernel_pass")


def test_every_kernel_is_in_the_pass(
    kernel_pass: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: set[str] = set()

    def noted(target: Any, kernel: str, *args: Any, **options: Any) -> None:
        called.add(kernel)
        launch(target, kernel, *args, **options)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("pydist.") and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", noted)
    assert kernel_pass.main(["--device", "cpu"]) == 0
    assert "all equal to the reference" in capsys.readouterr().out
    missing = {name for name in dir(_C.cpu) if not name.startswith("_")} - called - OF_THE_HOST
    assert not missing


def test_a_cupy_that_cannot_be_imported_leaves_torch(
    kernel_pass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so.12 is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(kernel_pass.environment, "cuda_devices", lambda: ["a card"])
    monkeypatch.setattr(kernel_pass.environment, "torch_sees_cuda", lambda: True)
    monkeypatch.setattr(kernel_pass.backends, "TorchMemory", lambda index: "torch")
    monkeypatch.setattr(kernel_pass, "KernelRunner", lambda memory: memory)
    assert kernel_pass.runner() == "torch"
