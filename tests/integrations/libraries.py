"""Runs a script of this folder with another library, where that is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REQUIRED = "PYDIST_INTEGRATIONS" in os.environ
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def needs(library: str) -> None:
    """Skips a test without a library; fails where all are asked for."""
    if importlib.util.find_spec(library) is None:
        assert not REQUIRED, f"{library} is not installed"
        pytest.skip(f"{library} is not installed: make integrations, make recipes")


def run(command: list[str], folder: Path, seconds: float = 280, **environment: str) -> str:
    """What a command prints that is run in a folder."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, text=True, capture_output=True, timeout=seconds, cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "FOUND": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def free_port() -> str:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def found(library: str, folder: Path, launcher: list[str] = TORCHRUN) -> list[dict[str, Any]]:
    """What the library's script says on both ranks."""
    needs(library)
    script = str(HERE / f"run_{library}.py")
    environment = {"FT_PORT": free_port(), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
    run([*launcher, script, str(folder)], folder, **environment)
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    print(library, said[0]["version"])
    return said
