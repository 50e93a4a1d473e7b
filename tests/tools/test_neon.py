"""The CPU kernels for AArch64, NEON and scalar, cross-compiled and run under qemu-user.

pydist's own tests run once more, with :mod:`aarch64.remote` in the place of the compiled module. On
a machine that can't have the tools, ``PYDIST_NEON=0`` skips these tests.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from aarch64 import remote

from pydist import selfcheck

pytestmark = pytest.mark.soak

TESTS = remote.ROOT / "tests"
ISAS = ["scalar", "neon"]
CHECK = """
from aarch64 import remote
remote.install()
import sys
from pydist import cli
sys.exit(cli.main(["check"]))
"""


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The kernels, built from the sources as they are now."""
    if os.environ.get("PYDIST_NEON") == "0":
        pytest.skip("PYDIST_NEON=0")
    missing = remote.missing_tools()
    if missing:
        pytest.fail(
            f"NEON is not tested: no {' and no '.join(missing)} on PATH. On Debian and Ubuntu "
            f"`make neon-tools` installs {remote.PACKAGES}; PYDIST_NEON=0 leaves these tests out."
        )
    remote.build()


def run(*arguments: str, **environment: str) -> str:
    """Output of this Python, which may import from tests; fails where it fails."""
    path = os.pathsep.join([str(TESTS), str(remote.ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=remote.ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("isa", ["", *ISAS])
def test_an_instruction_set_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYDIST_ISA", isa)
    with contextlib.closing(remote.Guest()) as guest:
        assert guest.isas == ISAS
        assert guest.isa == (isa or "neon")


def test_instruction_sets_of_other_processors_are_refused() -> None:
    done = subprocess.run(
        [remote.EMULATOR, remote.SERVER], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "PYDIST_ISA": "avx2"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "'avx2' is not an instruction set of this build and processor" in done.stderr
    assert "have scalar, neon" in done.stderr


def test_the_self_check_on_aarch64() -> None:
    report = run("-c", CHECK)
    print(f"\n{report}", end="")
    for isa in ISAS:
        for kernel in selfcheck.KERNELS:
            lines = [line for line in report.splitlines() if line.startswith(f"cpu {isa} ")]
            assert any(kernel in line and line.endswith("ok") for line in lines), (isa, kernel)


@pytest.mark.parametrize(
    "name",
    [
        "kernels/test_kernels.py",
        "kernels/test_values.py",
        "kernels/test_block_kernels.py",
        "kernels/test_elias.py",
        "kernels/test_ternary.py",
        "kernels/test_topk_kernels.py",
        "transport/test_message.py",
    ],
)
def test_the_kernels_tests_on_aarch64(name: str) -> None:
    report = run(
        "-m", "pytest", "-p", "aarch64.plugin", "--hypothesis-profile=soak", "-v",
        "-m", "not gpu and not soak", "-k", "not emulated", "--timeout", "1800", str(TESTS / name),
    )  # fmt: skip
    print(f"\n{name} on aarch64: {report.splitlines()[-1].strip(' =')}")
    assert all(isa in report for isa in ISAS)
