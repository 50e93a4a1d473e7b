"""`pydist info` and `pydist check`: what they print, and when they fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydist
from pydist import _C, cli, selfcheck
from pydist.kernels import environment
from pydist.reference import blocks as reference_blocks
from pydist.reference import elias as reference_elias
from pydist.reference import raw as reference_raw
from pydist.reference import signs as reference
from pydist.reference import ternary as reference_ternary
from pydist.reference import topk as reference_topk
from pydist.selfcheck import cases


def run_cli(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(pydist.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pydist", *args], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environ},
    )  # fmt: skip


# --------------------------------------------------------------------------- info


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["pydist"] == pydist.__version__
    assert printed["supported"] == ", ".join(_C.supported_isas())
    assert printed["devices"].startswith("cpu")


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["wire_version"] == pydist.WIRE_VERSION
    assert facts["isa"] == _C.current_isa()
    assert facts["isa_error"] is None


def test_info_without_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "package_version", lambda name: None)
    assert cli.main(["info"]) == 0
    assert "torch            not installed" in capsys.readouterr().out


def test_info_is_honest_about_cuda_without_a_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "CUDA_BUILD", "CUDA 13.0 for sm_90")
    monkeypatch.setattr(environment, "cuda_devices", list)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "CUDA 13.0 for sm_90; built, but this machine shows no device" in out
    monkeypatch.setattr(environment, "cuda_devices", lambda: ["A card"])
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "no device" not in out
    assert "cpu, A card" in out


@pytest.mark.parametrize("command", ["info", "check"])
def test_an_unknown_instruction_set_is_an_error(command: str) -> None:
    done = run_cli(command, PYDIST_ISA="sse9")
    assert done.returncode == 1
    for part in ("PYDIST_ISA", "'sse9'", "scalar"):
        assert part in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_forced_instruction_set_is_used() -> None:
    for isa in _C.supported_isas():
        assert json.loads(run_cli("info", "--json", PYDIST_ISA=isa).stdout)["isa"] == isa


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nonsense"])
    assert stopped.value.code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["bench"]])
def test_without_a_command_it_prints_help(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("usage: pydist")


HELP = (["--help"], ["info", "--help"], ["check", "--help"], ["bench", "kernels", "--help"])


@pytest.mark.parametrize("command", [*HELP, ["info"]], ids=" ".join)
def test_lines_fit_80_columns(command: list[str]) -> None:
    done = run_cli(*command, COLUMNS="80")
    assert done.returncode == 0 and done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80, done.stdout


# --------------------------------------------------------------------------- check


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LENGTHS", (0, 33))
    monkeypatch.setattr(cases, "RANKS", (1, 4))


def test_check(few_cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = _C.current_isa()
    assert cli.main(["check"]) == 0
    assert _C.current_isa() == before
    lines = capsys.readouterr().out.splitlines()
    for isa in _C.supported_isas():
        checked = [line.split() for line in lines if line.startswith(f"cpu {isa} ")]
        assert [words[2] for words in checked] == list(selfcheck.KERNELS)
        assert all(int(words[3]) > 0 and words[-1] == "ok" for words in checked)
    assert re.fullmatch(r"\d+ kernels on \d+ backends, [\d,]+ cases: all bit-identical", lines[-1])
    assert max(map(len, lines)) <= 80


def test_check_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = selfcheck.KernelRunner(selfcheck.HostMemory("scalar"))
    one = (run, "pack_signs", *cases.check_kernel(run, "pack_signs"))
    other = (run, "sum_values", 1, selfcheck.DifferenceError("element 3"))
    for found, status in (([one], 0), ([one, other], 1)):
        monkeypatch.setattr(selfcheck, "check_all", lambda device, found=found: found)
        assert cli.main(["check", "--json", "--device", "cpu"]) == status
        said = json.loads(capsys.readouterr().out)["checked"]
        assert said[0]["kernel"] == "pack_signs" and said[0]["cases"] > 0
        assert [entry["difference"] for entry in said] == [None, "element 3"][: len(found)]


def test_check_finds_a_planted_difference(
    few_cases: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.count_votes

    def wrong(payloads: reference.U8, n: int | None = None) -> reference.U8:
        planes = right(payloads, n)
        if planes.shape[1] > 6:
            planes[0, 6] ^= 0b1000
        return planes

    monkeypatch.setattr(reference, "count_votes", wrong)
    assert cli.main(["check"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("DIFFERS") >= len(_C.supported_isas())
    assert "count_votes on cpu scalar" in printed.err
    assert "element 51, byte 6 of row 0: 0x" in printed.err
    assert "instead of 0x" in printed.err


# Where a kernel's reference is not called as the kernel is.
REFERENCES = {"ternary_sum": "sum_payloads"}


@pytest.mark.parametrize("kernel", list(selfcheck.KERNELS))
def test_check_compares_every_kernel(
    kernel: str, few_cases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that is wrong in one bit of one element is noticed, whichever kernel it is."""
    families = {"ternary_": reference_ternary, "topk_": reference_topk}
    prefix = next((prefix for prefix in families if kernel.startswith(prefix)), "")
    name = REFERENCES.get(kernel, kernel.removeprefix(prefix))
    modules = (reference, reference_blocks, reference_elias, reference_raw)
    module = next(m for m in (families.get(prefix), *modules) if hasattr(m, name))
    right = getattr(module, name)

    def wrong(*args: object, **kwargs: object) -> object:
        result = right(*args, **kwargs)
        bits = result[0] if isinstance(result, tuple) else result
        bits.ravel().view(np.uint8)[-1:] ^= 1
        return result

    monkeypatch.setattr(module, name, wrong)
    run = selfcheck.KernelRunner(selfcheck.HostMemory("scalar"))
    _, difference = cases.check_kernel(run, kernel)
    assert difference is not None
    assert kernel in str(difference)


# --------------------------------------------------------------------------- the message


def test_a_difference_names_element_byte_and_both_values() -> None:
    expected = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    actual = expected.copy()
    actual.view(np.uint8)[6] = 0x40
    message = "here: element 1, byte 6: 3.0 (bytes 00004040) instead of 2.0 (bytes 00000040)"
    with pytest.raises(selfcheck.DifferenceError, match=re.escape(message)):
        selfcheck.assert_same_bits(actual, expected, "here")


def test_equal_values_with_other_bits_differ() -> None:
    with pytest.raises(
        selfcheck.DifferenceError, match=r"element 0, byte 3: -0\.0 .* instead of 0"
    ):
        selfcheck.assert_same_bits(np.array([-0.0], "f4"), np.array([0.0], "f4"), "zeros")
    with pytest.raises(selfcheck.DifferenceError, match=r"float32 \[2\] instead of float32 \[1\]"):
        selfcheck.assert_same_bits(np.zeros(2, "f4"), np.zeros(1, "f4"), "shapes")
