"""Every Python block of the documentation runs, and every example does what it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import Worlds

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    "ddp_minimal": (4, "fewer bytes"),
    "fsdp2_minimal": (2, "parameters 3"),
    "low_communication": (2, "round 14"),
    "kernels": (1, "signs: 1,252 bytes"),
    "simulate": (1, "QSGD(bits=4"),
}


def test_python_of_the_pages_runs(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/tools/run_docs.py"), *map(str, PAGES)], cwd=tmp_path,
        capture_output=True, text=True, timeout=110,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "api.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_has_a_language(page: Path) -> None:
    """Indented code has no language: it is neither coloured nor run."""
    inside = hidden = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        hidden = line.startswith("<!-- run") or (hidden and line != "-->")
        if re.match(r" *```", line):
            assert inside or len(line.strip()) > 3, f"{page.name}:{number}: a fence, no language"
            inside = not inside
        assert inside or hidden or not re.match(r"    \S", line), f"{page.name}:{number}: indented"


# --------------------------------------------------------------------------- examples


def example(rank: int, ranks: int, name: str, *arguments: str) -> str:
    """Runs an example on ranks that are there, in the place of torchrun's; says what it prints."""
    output = io.StringIO()
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.redirect_stdout(output),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    return output.getvalue()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(worlds: Worlds, name: str) -> None:
    ranks, said = EXAMPLES[name]
    assert said in worlds(ranks).run(example, name)[0]


@pytest.mark.multiprocess
def test_resumed_training_has_the_same_bits(worlds: Worlds, tmp_path: Path) -> None:
    said = []
    for steps, folder in ((8, "a"), (16, "a"), (16, "b")):
        options = f"--steps={steps}", f"--folder={tmp_path / folder}"
        said.append(worlds(2).run(example, "resume", *options)[0].rsplit(" ", 1)[1])
    assert said[1] == said[2] != said[0]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
