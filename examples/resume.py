"""A checkpoint of everything that training needs to go on bit for bit: residuals, too.

    torchrun --standalone --nproc-per-node 2 examples/resume.py --steps 20
    torchrun --standalone --nproc-per-node 2 examples/resume.py --steps 40    # goes on at 20

Also with another number of ranks: what was not sent yet is shared out among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import pydist


def main() -> None:
    """Trains to a step, from the checkpoint that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("build/resume"))
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)))
    state = pydist.ddp.compress(ddp, pydist.Sign("l1"))  # one bit: error feedback is on
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)

    start, path = 0, options.folder
    model, moments = get_state_dict(ddp, optimizer)
    if (path / ".metadata").exists():
        ranks = pydist.ddp.saved_world_size(path)
        saved = {"model": model, "optimizer": moments, "pydist": state.sharded(ranks), "step": 0}
        dcp.load(saved, checkpoint_id=path)
        set_state_dict(ddp, optimizer, model_state_dict=model, optim_state_dict=moments)
        start = saved["step"]
    for step in range(start, options.steps):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x = torch.randn(32, 64, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), x.sum(1, keepdim=True).sin()).backward()
        optimizer.step()
    model, moments = get_state_dict(ddp, optimizer)
    saved = {"model": model, "optimizer": moments, "pydist": state.sharded(), "step": options.steps}
    dcp.save(saved, checkpoint_id=path)
    if dist.get_rank() == 0:
        norm = torch.cat([p.detach().flatten() for p in ddp.parameters()]).double().norm()
        print(f"steps {start} to {options.steps}: norm of the weights {norm.item():.15f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
