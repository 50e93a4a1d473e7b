"""FSDP2 with compressed gradients (4 bits per element) and weights (8 bits).

torchrun --standalone --nproc-per-node 4 examples/fsdp2_minimal.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import pydist


def main() -> None:
    """Trains a small transformer on sequences that repeat."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = "cuda" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    embedding, head = nn.Embedding(64, 128), nn.Linear(128, 64)
    blocks = [
        nn.TransformerEncoderLayer(128, 4, 256, dropout=0, batch_first=True) for _ in range(2)
    ]
    model = nn.Sequential(embedding, *blocks, head).to(device)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    state = pydist.fsdp.compress(
        model, gradients=pydist.QSGD(bits=4), parameters=pydist.BlockInt(bits=8)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(60):
        half = torch.randint(0, 64, (16, 8), generator=generator)
        tokens = torch.cat([half, half], 1).to(device)
        optimizer.zero_grad()
        scores = model(tokens)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        if step % 20 == 19 and dist.get_rank() == 0:
            stats = state.stats()
            saved = ", ".join(
                f"{what} {stats[what]['ratio']:.1f}x" for what in ("gradients", "parameters")
            )
            print(f"step {step + 1}: loss {loss.item():.3f}; fewer bytes: {saved}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
