"""Rows in processes of their own: a fault ends its own group, by name, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pydist import _C, cli
from pydist.bench import options, rows, workers

TESTS = Path(__file__).parents[1]
SMALL = ["bench", "kernels", "--sizes", "64", "--repeats", "1", "--threads", "1", "--isolate",
         "--dtype", "float32", "--no-rivals"]  # fmt: skip


def before_serving(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What workers do before they plan."""
    serve = "from pydist.bench.worker import serve"
    assert serve in workers.START
    monkeypatch.setattr(workers, "START", workers.START.replace(serve, f"{code}\n{serve}"))


def test_a_fault_ends_its_group_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that reads back in a capture, a crash, an abort, a hang."""
    before_serving(
        monkeypatch, f"sys.path.insert(0, {str(TESTS / 'support')!r})\nimport planted_rows"
    )
    saved: list[int] = []
    keep = rows.Rows._keep

    def counting(self: Any) -> None:
        keep(self)
        saved.append(len(json.loads(file.read_text())["results"]))

    monkeypatch.setattr(rows.Rows, "_keep", counting)
    file = tmp_path / "out.json"
    command = [*SMALL, "--row-seconds", "10", "--json", str(file)]
    families = ("signs", "ternary", "topk", "raw")
    kernels = [kernel for family in families for kernel in options.FAMILIES[family]]
    assert cli.main([*command, "--kernels", *kernels]) == 1
    record = json.loads(file.read_text())
    measured = Counter(row["kernel"] for row in record["results"])
    why = {entry["row"]: (entry["why"], entry["failed"]) for entry in record["skipped"]}
    # The capture's fault costs one row: the group goes on in a new process.
    assert why.pop("unpack_signs float32 64")[0].startswith("RuntimeError: CUDA error: operation")
    assert measured["pack_signs"] == 1 and measured["count_votes"] == 1
    assert measured["majority_vote"] == 3
    # So does a crash's; a second fault, or a hang, ends the group.
    assert why.pop("ternary_scale float32 64") == ("its process ended with SIGSEGV", True)
    assert why.pop("ternary_pack float32 64") == ("its process ended with SIGABRT", True)
    [hung] = [row for row, told in why.items() if told[1]]
    assert hung.startswith("topk_scatter") and why.pop(hung)[0] == "it hangs: no answer in 10 s"
    given_up = {row.split()[0]: told for row, told in why.items()}
    assert set(given_up) >= {"ternary_unpack", "ternary_sum", "topk_feedback_"}
    assert measured["topk_select"] == 1
    for told in given_up.values():
        assert told[0].endswith("was given up after what failed in it") and not told[1]
    assert measured["sum_values"] == 1, "the last group is whole"
    assert len(record["results"]) + len(record["skipped"]) == record["planned"] == len(saved)
    assert saved == sorted(saved) and saved[0] == 1, "rows are written as they come"
    assert "failed: unpack_signs float32 64 and 3 more" in capsys.readouterr().err


def test_a_worker_that_cannot_start_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "START", "import sys; sys.exit(7)")
    assert cli.main([*SMALL, "--kernels", "sum_values"]) == 1
    assert "its process ended with status 7" in capsys.readouterr().out


def alive(process: int) -> bool:
    """Whether it runs; one that nobody has asked for its status yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


HANGING = """
import argparse, time
from pydist.bench import workers
before, _ = workers.START.split("from pydist.bench")
workers.START = before + "import time; time.sleep(60)"
worker = workers.Worker(argparse.Namespace(), "")
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_with_the_command() -> None:
    """Even one that hangs, where the command is killed."""
    command = [sys.executable, "-c", HANGING]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(1.0)  # until it has asked to be ended
    assert alive(worker)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


SLOWER = """
from importlib import util
import time
spec = util.spec_from_file_location("pydist._C", {file!r})
real = util.module_from_spec(spec)
spec.loader.exec_module(real)
globals().update({{name: getattr(real, name) for name in dir(real) if name[:2] != "__"}})
class cpu:
    def __getattr__(self, name):
        def slow(*args):
            time.sleep(0.02)
            return getattr(real.cpu, name)(*args)
        return slow
cpu = cpu()
"""


QUICK = "from pydist.bench import measure\nmeasure.cold_bytes = lambda device: 1 << 20"


def test_two_builds_of_the_module_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before_serving(monkeypatch, QUICK)
    other, file = tmp_path / "old.py", tmp_path / "out.json"
    other.write_text(SLOWER.format(file=_C.__file__))
    command = [*SMALL, "--sizes", "64Ki", "--kernels", "pack_signs", "count_votes"]
    command.remove("--isolate")  # which another module implies
    assert cli.main([*command, "--compare-module", str(other), "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    compared = record["other_module"]["compared"]["rows"]
    assert [row["row"] for row in compared] == [
        "pack_signs float32, 64Ki, 1 thread(s)", "count_votes (8 payloads) bits, 64Ki, 1 thread(s)",
    ]  # fmt: skip
    assert all(row["speedup"] > 2 for row in compared), compared
    assert "against old.py" in capsys.readouterr().out


def test_a_module_that_does_not_load_costs_the_ratio_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, file = tmp_path / "old.so", tmp_path / "out.json"
    other.write_bytes(b"no module")
    command = [*SMALL, "--kernels", "sum_values", "--json", str(file)]
    assert cli.main([*command, "--sizes", "64Ki", "--compare-module", str(other)]) == 0
    record = json.loads(file.read_text())
    assert len(record["results"]) == 1 and not record["skipped"]
    assert "not measured with the other: sum_values" in capsys.readouterr().out
