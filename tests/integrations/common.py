"""A model, data and a checksum for the scripts that run other libraries on two ranks."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", 0))


class Net(nn.Module):
    """Two layers with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.b = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.norm(self.a(x))))
        return y


def data(n: int = 256) -> torch.utils.data.TensorDataset:
    """Something that can be learnt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 64, generator=generator)
    return torch.utils.data.TensorDataset(x, x @ torch.randn(64, 1, generator=generator))


def checksum(model: nn.Module) -> str:
    """Of all parameters' bits."""
    joined = torch.cat([p.detach().flatten().view(torch.uint8) for p in model.parameters()])
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:16]


def say(**found: Any) -> None:
    """This rank's results for the test."""
    Path(os.environ["FOUND"], f"rank{RANK}.json").write_text(json.dumps(found))
