"""The committed plots can be drawn again from the committed figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydist.bench import drawing

ROOT = Path(__file__).resolve().parents[2]
PLOTS = {
    "demo": ("examples/language_model/demo.py", "--output", "."),
    "convergence": ("examples/language_model/convergence.py", "--output", "."),
    "codecs": ("bench/codecs/compare.py", "--plot", "codecs.png"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_redraws(name: str, tmp_path: Path) -> None:
    script, *options = PLOTS[name]
    figures = str(ROOT / f"bench/results/{name}.json")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--redraw", figures, *options], cwd=tmp_path,
        capture_output=True, text=True, timeout=110, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (512, "512"), (65536, "64 Ki"), (1.5 * 2**20, "1.5 Mi"), (2**31, "2 Gi")],
)
def test_binary(number: float, text: str) -> None:
    assert drawing.binary(number) == text
