"""Ray Train: the recipe of docs/integrations.md against plain DDP, and from its checkpoints."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
import torch
from common import Net, checksum, data
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_data_loader, prepare_model

import pydist


def train(config: dict[str, Any]) -> None:
    """Three epochs; every rank reports a file of its own, and goes on from one."""
    rank = ray.train.get_context().get_world_rank()
    model = prepare_model(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    codec = {"plain": None, "raw": pydist.Raw()}.get(config["how"], pydist.Sign("l1"))
    keeps: dict[str, Any] = {"model": model.module, "optimizer": optimizer}
    if codec is not None:
        keeps["pydist"] = pydist.ddp.compress(model, codec)
    first = 0
    if config["start"]:
        held = torch.load(f"{config['start']}/rank{rank:05d}.pt", weights_only=True)
        first = held.pop("epoch") + 1
        for name, kept in keeps.items():
            kept.load_state_dict(held[name])
    loader = prepare_data_loader(torch.utils.data.DataLoader(data(), batch_size=16))
    for epoch in range(first, 3):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saved = {"epoch": epoch, **{name: kept.state_dict() for name, kept in keeps.items()}}
            torch.save(saved, f"{folder}/rank{rank:05d}.pt")
            kept_here = Checkpoint.from_directory(folder)
            ray.train.report({"epoch": epoch}, checkpoint=kept_here)
    Path(config["said"], f"{config['name']}{rank}").write_text(checksum(model))


def fit(folder: str, name: str, how: str, start: str | None = None) -> Path:
    """Trains on two workers; where the checkpoints are."""
    result = TorchTrainer(
        train,
        train_loop_config={"how": how, "name": name, "start": start, "said": folder},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=f"{folder}/ray", name=name),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()
    assert result.checkpoint is not None
    return Path(result.checkpoint.path).parent


def main(folder: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for name in ("plain", "raw"):
        fit(folder, name, name)
    checkpoints = sorted(fit(folder, "through", "signs").glob("checkpoint_*"))
    files = sorted(path.name for path in checkpoints[1].glob("rank*"))
    fit(folder, "resumed", "signs", str(checkpoints[1]))
    ray.shutdown()
    for rank in range(2):
        names = ("plain", "raw", "through", "resumed")
        said: dict[str, Any] = {name: Path(folder, f"{name}{rank}").read_text() for name in names}
        said |= {"version": ray.__version__, "files": files}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
