"""The recipes of docs/integrations.md that need more to be installed. ``make recipes`` does."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from libraries import HERE, TORCHRUN, found, free_port, needs, run

import pydist

ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
EXAMPLE = str(ROOT / "examples" / "ddp_minimal.py")

pytestmark = [pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(900)]


def block(pattern: str) -> str:
    """The block of the page that holds a pattern."""
    blocks = re.findall(r"^```\w+[^\n]*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    [one] = [found for found in blocks if re.search(pattern, found)]
    return str(one)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_ray(tmp_path: Path) -> None:
    """Bits of plain DDP without loss; resuming from every rank's own file equals not stopping."""
    for said in found("ray", tmp_path, [sys.executable]):
        assert said["raw"] == said["plain"]
        assert said["resumed"] == said["through"] != said["plain"]
        assert said["files"] == ["rank00000.pt", "rank00001.pt"]


def test_deepspeed(tmp_path: Path) -> None:
    """Votes as without DeepSpeed, and after loading its checkpoint."""
    first, second = found("deepspeed", tmp_path, TORCHRUN)
    assert first["plain"] == first["through"] == first["resumed"]
    assert first["through"] == second["through"] and second["resumed"] == first["resumed"]
    assert first["ratio"] > 20


def test_mpirun(tmp_path: Path) -> None:
    """The page's wrapper gives torch its variables."""
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
    if mpirun is None:
        needs("mpirun")
    wrapper = executable(tmp_path / "ranks.sh", block("OMPI_COMM_WORLD_RANK"))
    command = [
        str(mpirun), "-np", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
        str(wrapper), sys.executable, EXAMPLE,
    ]  # fmt: skip
    said = run(command, tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert "fewer bytes" in said


def test_slurm(tmp_path: Path) -> None:
    """The page's batch script, with stand-ins for SLURM's two commands."""
    executable(tmp_path / "srun", '#!/bin/bash\nexec "$@"\n')
    executable(tmp_path / "scontrol", "#!/bin/bash\necho 127.0.0.1\necho elsewhere\n")
    executable(tmp_path / "torchrun", f'#!/bin/bash\nexec {" ".join(TORCHRUN[:3])} "$@"\n')
    shutil.copy(EXAMPLE, tmp_path / "train.py")
    script = executable(tmp_path / "job.sh", block("SLURM_JOB_NODELIST"))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    run(["bash", "-eu", str(script)], tmp_path, PATH=path, **job)


def test_notebook(tmp_path: Path) -> None:
    """Kernels, simulate and a hook without anything to do, in a notebook's kernel."""
    needs("nbclient")
    import nbclient
    import nbformat

    cells = [
        "import numpy as np, torch, pydist",
        "x = torch.randn(1000); pydist.ops.pack_signs(x).shape",
        "len(pydist.simulate.all_reduce([x, x + 1], pydist.QSGD(bits=4)))",
        "model = torch.nn.Linear(64, 64); state = pydist.ddp.compress(model, pydist.QSGD(bits=4))",
        "model(torch.ones(1, 64)).sum().backward(); sorted(state.scalars())[0]",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=120).execute()
    said = [cell.outputs[0].data["text/plain"] for cell in book.cells if cell.outputs]
    assert said == ["torch.Size([128])", "1000", "'buckets'"]


def state_of_one() -> pydist.ddp.CompressionState:
    return pydist.ddp.compress(torch.nn.Linear(64, 64), pydist.QSGD(bits=4))


def test_tensorboard(tmp_path: Path) -> None:
    """Every number of the state is a curve."""
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    state = state_of_one()
    with SummaryWriter(str(tmp_path)) as writer:
        state.log(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {f"pydist/{name}" for name in state.scalars()} == set(events.Tags()["scalars"])


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's line, offline."""
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    state = state_of_one()
    with wandb.init(dir=tmp_path, project="pydist") as run_:
        wandb.log({f"pydist/{k}": v for k, v in state.scalars().items()})
        assert {f"pydist/{name}" for name in state.scalars()} <= set(run_.summary.keys())
    assert any(tmp_path.rglob("run-*.wandb"))
