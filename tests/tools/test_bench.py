"""The kernel benchmark runs and says what it found; how fast that was is no test's business."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_layers import run_python

from pydist import cli
from pydist.bench import bitsandbytes, machine, measure, options, rivals, rows, show, timing
from pydist.bench.case import Case, Maker
from pydist.bench.cases import cases

SMALL = ["bench", "kernels", "--sizes", "64", "1Ki", "--repeats", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_kernel_is_timed_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    files = {name: str(tmp_path / "new" / f"out.{name}") for name in ("json", "txt", "png")}
    out = ["--json", files["json"], "--table", files["txt"], "--plot", files["png"]]
    assert cli.main([*SMALL, *out]) == 0
    record = json.loads(Path(files["json"]).read_text())
    assert record["command"].startswith("pydist bench kernels --sizes 64")
    rows = record["results"]
    assert {row["kernel"] for row in rows} == set(options.KERNELS)
    assert {row["numel"] for row in rows} == {64, 1024}
    assert {row["dtype"] for row in rows} == {*options.DTYPES, "bits"}
    for row in rows:
        assert row["gigabytes_per_second"] > 0 and row["of_copy"]["median"] > 0
        assert len(row["samples"]) == 2 and not row["rivals_failed"], row["rivals_failed"]
    hot = {row["kernel"]: row["hot"] for row in rows if "hot" in row and row["numel"] == 64}
    assert hot["pack_signs"]["of_read"]["median"] > 0 and hot["pack_signs"]["of_copy"]["median"] > 0
    table = Path(files["txt"]).read_text()
    assert "pack_signs" in table and "hot % copy" in table
    assert Path(files["png"]).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    few = [*SMALL, "--kernels", "pack_signs", "--dtype", "float32", "--no-rivals"]
    assert cli.main([*few, "--compare", files["json"]]) == 0
    assert "time then / now" in capsys.readouterr().out
    with Console(width=80, record=True, file=io.StringIO()) as console:
        show.show_comparison(show.compared(record, record), "an earlier run", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


WRONG = {
    "sizes": (["--sizes", "33"], "multiple of 32, got 33"),
    "unit": (["--sizes", "1Xi"], "must be like 64Ki.*1Xi"),
    "repeats": (["--repeats", "0"], "--repeats.*at least 1"),
    "clock": (["--clock", "cpu", "--threads", "2"], "--threads 1"),
    "isa": (["--isa", "mmx"], "mmx"),
    "compare": (["--compare", "/nowhere/old.json"], "/nowhere/old.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_usage(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[what]
    try:
        status = cli.main(["bench", "kernels", *arguments])
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_budget_leaves_rows_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plot = ["--plot", "nowhere/out.png"]
    assert cli.main([*SMALL, "--budget", "0", "--no-rivals", *plot]) == 0
    said = capsys.readouterr().out
    assert "not measured: pack_signs float32 64: no time left" in said
    rows_left_out = said.count("not measured: ")
    assert rows_left_out > 100
    assert f"{rows_left_out} of {rows_left_out} rows not measured" in said
    assert "nowhere/out.png was not drawn" in said


FEW = [*SMALL, "--sizes", "64", "--kernels", "pack_signs", "--repeats", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1 << 10)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)


@pytest.mark.usefixtures("quick")
def test_what_fails_costs_its_own_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(s: Any) -> None:
        raise RuntimeError("an illegal memory\naccess")

    calls = iter(range(100))

    def fails_later(s: Any) -> None:
        if next(calls) > 4:  # the comparison, the warm-up, one to know how long it takes
            fails(s)

    def planned(chosen: argparse.Namespace, plan: Any = rows.plan) -> Any:
        first, second, third = plan(chosen)
        rival = first.rivals[0].__class__
        first.rivals.append(rival("zeros", lambda s: torch.zeros(8, dtype=torch.uint8)))
        object.__setattr__(second, "run", fails)
        third.rivals.extend([rival("at once", fails), rival("later", fails_later)])
        return [first, second, third]

    monkeypatch.setattr(rows, "plan", planned)
    file = tmp_path / "out.json"
    assert cli.main([*FEW, "--json", str(file)]) == 1
    said = capsys.readouterr()
    error = "RuntimeError: an illegal memory access"
    assert "failed: pack_signs bfloat16 64 and 1 more" in said.err
    assert "1 of 3 rows not measured" in said.out
    record = json.loads(file.read_text())
    assert record["skipped"] == [{"row": "pack_signs bfloat16 64", "why": error, "failed": True}]
    first, third = record["results"]
    assert first["rivals_failed"] == {"zeros": measure.DIFFERS} and "zeros" not in first["rivals"]
    assert third["rivals_failed"] == {"at once": error, "later": error}
    assert "torch expression" in third["rivals"]


@pytest.mark.usefixtures("quick")
def test_figures_are_written_after_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = tmp_path / "out.json", measure.Bench.run

    def interrupted(self: Any, case: Any, advance: Any) -> Any:
        if case.dtype == "float16":
            raise KeyboardInterrupt
        return run(self, case, advance)

    monkeypatch.setattr(measure.Bench, "run", interrupted)
    assert cli.main([*FEW, "--json", str(file)]) == 130
    record = json.loads(file.read_text())
    assert [row["dtype"] for row in record["results"]] == ["float32", "bfloat16"]
    assert record["planned"] == 3
    assert list(tmp_path.iterdir()) == [file]


def test_sizes_that_decide_come_first_and_what_is_compiled_last() -> None:
    asked = argparse.Namespace(
        sizes=[options.size(text) for text in options.SIZES["cuda"]], device="cuda",
        dtype=options.DTYPES, kernels=options.KERNELS, no_rivals=False, compile=True,
    )  # fmt: skip
    chosen = rows.plan(asked)
    order = list(dict.fromkeys(options.shown(case.numel) for case in chosen))
    assert order == ["64Mi", "64Ki", "256Mi", "256Ki", "1Mi", "4Mi", "16Mi"]
    plain = len([case for case in chosen if not case.compiled])
    of_a_size = [case for case in chosen if case.numel == 2**26 and not case.compiled]
    assert len(of_a_size) > 90 and plain == 7 * len(of_a_size)
    assert not any(case.compiled for case in chosen[:plain])
    assert {options.shown(case.numel) for case in chosen[plain:]} == {"64Mi"}
    assert len(chosen[plain:]) == 16
    assert options.compiled_size([64, 128], "cuda") == 128


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("enough", [True, False])
def test_a_compiled_rival_stands_in_the_row_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    monkeypatch.setattr(rivals, "compiled", lambda function: function)
    ticks = iter(range(100))
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    file = str(tmp_path / "out.json")
    budget = ["--budget", "50" if enough else "3"]  # a tick a row
    assert cli.main([*FEW, "--compile", "--json", file, *budget]) == 0
    record = json.loads(Path(file).read_text())
    assert len(record["results"]) == record["planned"] == 3 and not record["skipped"]
    for row in record["results"]:
        assert "torch expression" in row["rivals"]
        assert ("torch.compile" in row["rivals"]) is enough
        failed = {} if enough else {"torch.compile": "no time left (--budget)"}
        assert row["rivals_failed"] == failed


def test_a_kernel_is_recorded_by_its_number() -> None:
    for release in ("6.1.0-13-amd64", "6.1.0", "6.1.0.local"):
        assert machine.numeric(release) == "6.1.0"


def test_a_machine_without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["torch", "rich"])
def test_what_is_not_installed_is_named(missing: str) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from pydist.cli import main
sys.exit(main(["bench", "kernels"]))
"""
    done = run_python(code)
    assert done.returncode == 2, done.stderr
    assert f"{missing} is not installed: pip install 'pydist-train[torch,bench]'" in done.stderr


def test_the_script_is_the_same_command() -> None:
    script = Path(__file__).parents[2] / "bench" / "kernels.py"
    if not script.exists():
        pytest.skip("not a source tree")
    path = str(script.parent.parent)
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": path},
    )  # fmt: skip
    assert "--sizes" in done.stdout, done.stderr


# --------------------------------------------------------------------------- cases and rivals


def test_what_reads_back_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph can't capture a call that waits for the device, and a rival must not wait either."""
    waits: list[str] = []

    def spied(name: str, usual: Any) -> Any:
        return lambda *args: waits.append(name) or usual(*args)  # type: ignore[func-returns-value]

    for name in ("item", "__float__", "__int__", "__bool__", "__index__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, spied(name, getattr(torch.Tensor, name)))
    for case in cases(Maker(4096, "cpu", ("float32", "bfloat16")), options.KERNELS):
        buffers = case.make()
        waits.clear()
        case.run(buffers)
        assert bool(waits) is case.reads_back, case.name
        for rival in case.rivals:
            waits.clear()
            rival.run(timing.copy_of(buffers))
            assert not waits, f"{case.name}: {rival.name} waits"


class Library:
    """bitsandbytes' library, which notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        assert re.fullmatch(r"c(de)?quantize_blockwise_(fp32|fp16|bf16)(_nf4)?", name), name

        def function(*args: Any) -> None:
            assert len(args) == len(function.argtypes)  # type: ignore[attr-defined]
            self.calls.append((name, *args))

        return function


def test_bitsandbytes_stands_beside_equal_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Library()
    monkeypatch.setenv(bitsandbytes.VARIABLE, str(tmp_path / "libbitsandbytes_cuda130.so"))
    monkeypatch.setattr(bitsandbytes, "_load", lambda path: loaded)
    monkeypatch.setattr(bitsandbytes, "_stream", lambda x: 5)
    made = bitsandbytes._buffers
    monkeypatch.setattr(bitsandbytes, "_buffers", lambda *args: made(*args[:-1], "cpu"))
    beside: dict[str, list[str]] = {}
    for case in cases(Maker(4096, "cuda", ("float32", "float16")), ("quantize", "dequantize")):
        for rival in case.rivals:
            if rival.make is not None:
                beside.setdefault(case.name, []).append(rival.name)
                buffers = rival.make()
                assert rival.run(buffers) is None
                name, table, *_, block, n = [x for x in loaded.calls[-1] if x != 5]
                assert n == 4096 and f"blocks of {block}" in case.variant
                bits = 4 if "nf4" in name else 8
                assert f"({bits})" in case.variant and (table is None) is (bits == 4)
                assert buffers.codes.numel() == 4096 * bits // 8
    for kernel in ("quantize", "dequantize"):
        for bits, block in ((4, 512), (8, 512), (4, 128), (8, 128)):
            name = f"{kernel} (BlockInt({bits}), blocks of {block})"
            assert beside.pop(name) == [f"bitsandbytes, {bits} bits, blocks of {block}"] * 2
    assert not beside, "3 bits and levels have no equal there"


def test_the_library_of_an_installed_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(bitsandbytes.VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert bitsandbytes.library() is None
    for name in ("cuda129", "cuda130", "cuda132", "cpu", "rocm70"):
        (tmp_path / "bitsandbytes" / f"libbitsandbytes_{name}.so").touch()
    found = bitsandbytes.library()
    assert found is not None and found.name == "libbitsandbytes_cuda130.so"


def test_the_kernel_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import torch
from pydist import ops
from pydist.bench.triton_pack import pack
for n in (8, 4096, 4104, 10_000):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(n).to(dtype)
        x[::7] = 0.0
        x[3] = float("nan")
        assert torch.equal(pack(x), ops.pack_signs(x)[: n // 8]), (n, dtype)
print("equal")
"""
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr


# --------------------------------------------------------------------------- sizes, rings, ratios


def test_sizes() -> None:
    for text, elements in (("64Ki", 2**16), ("32Mi", 2**25), ("1Gi", 2**30), ("96", 96)):
        assert options.size(text) == elements and options.shown(elements) == text
    assert options.size("1048576") == 2**20


def test_buffers_are_cold_when_their_turn_comes() -> None:
    ring = timing.Ring.filled(timing.Buffers(x=torch.zeros(256)), 4096)
    assert len(ring.sets) == 4
    turns = [ring.next() for _ in range(8)]
    assert len({id(s.x) for s in turns[:4]}) == 4 and turns[:4] == turns[4:]


def first_case(numel: int) -> Case:
    return next(cases(Maker(numel, "cpu", ("float32",)), options.KERNELS))


def test_rivals_with_another_answer_are_found() -> None:
    case = first_case(64)
    assert measure.failing_rivals(case) == {}
    wrong = case.rivals[0].__class__("wrong", lambda s: torch.zeros(8, dtype=torch.uint8))
    case.rivals.append(wrong)
    assert measure.failing_rivals(case) == {"wrong": measure.DIFFERS}


def test_changes_beyond_the_spread_are_marked() -> None:
    def record(*samples: float) -> dict[str, Any]:
        entry = {
            "kernel": "pack_signs", "variant": "", "dtype": "float32", "numel": 64, "threads": 0,
            "samples": list(samples), "seconds": timing.spread(samples),
            "of_copy": {"median": 1.0},
        }  # fmt: skip
        return {"results": [entry], "options": {}}

    [same] = show.compared(record(1.0, 1.1, 1.2), record(1.05, 1.15, 1.25))
    assert not same["beyond_spread"]
    [faster] = show.compared(record(1.0, 1.1, 1.2), record(2.0, 2.2, 2.4))
    assert faster["beyond_spread"] and faster["speedup"] == pytest.approx(2.0)


# --------------------------------------------------------------------------- the way of CUDA


class StandIn:
    """torch.cuda's events and graphs on the CPU: a replay calls again what was captured."""

    captured: list[Callable[[], object]] | None = None

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return False

        def elapsed_time(self, end: StandIn.Event) -> float:
            return 1e3 * (end.at - self.at)

    class CUDAGraph:
        def replay(self) -> None:
            for call in self.calls:
                call()

    class graph:  # noqa: N801
        def __init__(self, graph: StandIn.CUDAGraph) -> None:
            graph.calls = StandIn.captured = []  # type: ignore[attr-defined]

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            StandIn.captured = None


def test_the_way_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events, graphs and buffers; on a device the figures mean something."""
    for name in ("Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(StandIn, name))
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 20))
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1 << 15)
    on_cpu = measure.references
    monkeypatch.setattr(measure, "references", lambda n, device, cold: on_cpu(n, "cpu", cold))
    case = first_case(1024)

    def fails(s: Any) -> None:
        raise RuntimeError("not here")

    case.rivals.append(case.rivals[0].__class__("broken", fails))
    used: list[int] = []

    def counted(s: Any, run: Any = case.run) -> Any:
        call = lambda: used.append(id(s)) or run(s)  # noqa: E731
        if StandIn.captured is not None:
            return StandIn.captured.append(call)
        return call()

    object.__setattr__(case, "run", counted)
    bench = measure.Bench("cuda", 3, [0], "wall")
    [found] = bench.run(case, lambda: None)
    sets = -(-(1 << 15) // (4096 + 128))
    assert len(set(used)) >= sets, "memory is not cold"
    assert len(found["samples"]) == 3 and len(found["called"]["samples"]) == 3
    assert found["hot"]["seconds"]["median"] > 0 and found["host_seconds"] > 0
    assert found["copy"]["bytes"] == (1 << 17) * 2, "an eighth of the free memory"
    assert found["rivals_failed"] == {"broken": "RuntimeError: not here"}
    for width in (80, 130):
        with Console(width=width, record=True, file=io.StringIO()) as console:
            show.show_rows([found], "", "cuda", console)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width and "…" not in "".join(lines)
        assert ("host µs" in lines[1] + lines[2]) == (width == 130)


@pytest.mark.parametrize(("too_short", "late"), [(0, 0), (2, 0), (9, 1)])
def test_the_host_gets_the_head_start_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, too_short: int, late: int
) -> None:
    begun = iter([True] * too_short + [False])
    spins: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", StandIn.Event)
    monkeypatch.setattr(StandIn.Event, "query", lambda event: next(begun))
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    clock, graph = timing.CudaClock(), StandIn.CUDAGraph()
    graph.calls = []  # type: ignore[attr-defined]
    assert clock._replayed(graph, 1000) >= 0  # type: ignore[arg-type]
    assert clock.late == late
    assert [spin / spins[0] for spin in spins] == [1, 2, 4, 8][: too_short + 1]
    assert spins[0] > 1000 * 2_000, "a microsecond a call at 2 GHz"
