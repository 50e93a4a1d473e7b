"""DDP with gradients of 4 bits per element: plain PyTorch and one line.

    torchrun --standalone --nproc-per-node 4 examples/ddp_minimal.py

On several machines, one of these lines on each (docs/start.md says what the options mean):

    torchrun --nnodes 4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        --rdzv-id job1 examples/ddp_minimal.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pydist


def main() -> None:
    """Trains a small network on data that it can learn."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    data = TensorDataset(x, (x @ torch.randn(64, 8)).argmax(1))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    model = nn.Sequential(nn.Linear(64, 512), nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, 8))
    ddp = DistributedDataParallel(model.to(device))
    state = pydist.ddp.compress(ddp, pydist.QSGD(bits=4), exclude=["*.bias"])  # the one line
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)

    for epoch in range(3):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(inputs.to(device)), labels.to(device))
            loss.backward()  # gradients travel compressed while this runs
            optimizer.step()
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch}: loss {loss.item():.3f}, {state.stats()['ratio']:.1f}x fewer bytes"
            )
    pydist.check_replicas(ddp)  # all ranks hold the same bits
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
