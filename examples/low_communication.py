"""Local steps: every worker trains alone, and the workers meet every 20 steps (DiLoCo).

    torchrun --standalone --nproc-per-node 4 examples/low_communication.py

What they send then is how far each has come, in 4 bits per parameter: 0.2 bits per parameter and
step. An outer optimizer with momentum applies the mean (arXiv 2311.08105, algorithm 1).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import pydist

LOCAL_STEPS, ROUNDS = 20, 15


def main() -> None:
    """Trains a small network; prints the loss after each round."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    teacher = torch.randn(64, 8)
    shared = [p.detach().clone().requires_grad_() for p in model.parameters()]  # equal on all ranks
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    flat = torch.empty(sum(p.numel() for p in shared))  # one message for all parameters
    parts = flat.split([p.numel() for p in shared])
    generator = torch.Generator().manual_seed(dist.get_rank())

    for turn in range(ROUNDS):
        for _ in range(LOCAL_STEPS):  # nothing is sent
            x = torch.randn(32, 64, generator=generator)
            inner.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
            loss.backward()
            inner.step()
        for part, start, p in zip(parts, shared, model.parameters(), strict=True):
            torch.sub(start.detach().flatten(), p.detach().flatten(), out=part)
        pydist.all_reduce(flat, pydist.QSGD(bits=4), op="mean")
        for part, start in zip(parts, shared, strict=True):
            start.grad = part.view_as(start)
        outer.step()
        with torch.no_grad():
            for start, p in zip(shared, model.parameters(), strict=True):
                p.copy_(start)
        if dist.get_rank() == 0:
            print(f"round {turn}: loss {loss.item():.3f}")
    pydist.check_replicas(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
