"""The kernels' machine code: equal to the reference, what `make sass` says where it got worse."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import machine_code
import numpy as np
import pytest
from machine_code import model
from sass import __main__ as command
from sass import cases, counts, table
from sass.host import Executor, base_name

from pydist import selfcheck

EVERY = 97  # cases of the self-check of which one runs here; `soak` runs all


@pytest.fixture(scope="module")
def executor() -> Any:
    return Executor(machine_code.FOLDER, counts.registers(machine_code.FOLDER))


def checked(executor: Any, kernel: str, every: int) -> int:
    """Runs cases of the self-check, which compare with the reference; how many."""
    memory = machine_code.Memory(executor)
    run = selfcheck.KernelRunner(memory)
    done = 0
    for i, case in enumerate(selfcheck.KERNELS[kernel](run, np.random.default_rng(7))):
        if i % every == every // 2 or (i == 0 and every > 1):
            with executor.raising():
                case()
            done += 1
        memory.forget()
    return done


@machine_code.BUILT
@pytest.mark.parametrize("kernel", selfcheck.KERNELS)
def test_machine_code_equals_the_reference(executor: Any, kernel: str) -> None:
    assert checked(executor, kernel, EVERY)


@machine_code.BUILT
@pytest.mark.soak
@pytest.mark.parametrize("kernel", selfcheck.KERNELS)
def test_all_inputs_of_the_self_check(executor: Any, kernel: str) -> None:
    assert checked(executor, kernel, 1)


@machine_code.BUILT
def test_bytes_that_differ_are_found(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction of other semantics, as a wrong compiler would have chosen it."""
    case = next(cases.all_cases(4096, ["pack_signs"]))
    cases.run(executor, case)
    symbol = executor.done[-1].kernel
    wrong = [
        dataclasses.replace(one, modifiers=("LT", "AND")) if one.name == "FSETP" else one
        for one in executor.code(executor.cubins[symbol])
    ]
    monkeypatch.setitem(executor._code, symbol, wrong)
    with pytest.raises(
        cases.DifferentBytes, match=r"pack_signs, float32, 4096 elements: out: byte \d+ is"
    ):
        cases.run(executor, case)


# --------------------------------------------------------------------------- the table


@pytest.fixture
def rows() -> Iterator[list[dict[str, Any]]]:
    yield copy.deepcopy(table.read(model.TABLE))


def test_the_table_is_whole(rows: list[dict[str, Any]]) -> None:
    names = {(case.kernel, case.variant, case.dtype) for case in cases.all_cases(1 << 16)}
    assert names == set(model.table())
    for row in rows:
        assert table.shares(row) == {card: row[card] for card in model.COPIES if card in row}
        assert row["moved"] >= 0.99 * row["least"], "a kernel cannot move less than the least"


def planted(rows: list[dict[str, Any]], kernel: str, change: Any) -> list[str]:
    now = copy.deepcopy(rows)
    change(next(row for row in now if row["kernel"] == kernel))
    return table.worse(rows, now)


def test_what_got_worse_is_named(rows: list[dict[str, Any]]) -> None:
    def slower(row: dict[str, Any]) -> None:
        row["instructions"] *= 3  # so many that they, and not bytes, decide
        for launch in row["launches"]:
            launch["pipes"] = {name: 3 * n for name, n in launch["pipes"].items()}

    first, *others = planted(rows, "quantize", slower)
    assert first.startswith("quantize (BlockInt(4), blocks of 512), float32: instructions ")
    assert first.endswith(" now") and " before, " in first
    assert [line.split(": ")[1].split(" on ")[0] for line in others] == ["share of copy"] * 2
    for key in ("registers", "moved"):
        (line,) = planted(
            rows, "sum_values", lambda row, key=key: row.update({key: 1.3 * row[key]})
        )
        assert f": {key} " in line
    assert (
        planted(rows, "lion_pack_", lambda row: row.update(instructions=1.05 * row["instructions"]))
        == []
    )
    assert (
        planted(rows, "lion_pack_", lambda row: row.update(instructions=0.5 * row["instructions"]))
        == []
    )


def test_rows_that_come_and_go(rows: list[dict[str, Any]]) -> None:
    assert table.worse(rows[1:], rows) == [f"{table.title(rows[0])}: not in the committed table"]
    assert "gone" in table.worse(rows, rows[1:])[0]


def test_the_check_fails(rows: list[dict[str, Any]], capsys: Any) -> None:
    assert command.verdict(rows, None) == 0
    rows[0]["registers"] += 40
    assert command.verdict(rows, None) == 1
    assert f"FAILED {table.title(rows[0])}: registers" in capsys.readouterr().out


def test_the_file_reads_as_it_was_written(rows: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "compiler", lambda: "release 13.0, V13.0.88")
    written = json.loads(table.as_json(rows))
    assert written["results"] == rows and written["command"] == table.COMMAND


def test_names_of_instances() -> None:
    hashed = "_ZN6pydist4cuda46_GLOBAL__N__1471e2d0_13_signs_pack_cu_d3742a9e17"
    assert base_name(f"{hashed}pack_signs_kernelIfLb1EEEvv") == "pack_signs"
    plain = "_ZN6pydist4cuda12_GLOBAL__N_120ternary_scale_kernelENS0_4RowsE"
    assert base_name(plain) == "ternary_scale"
