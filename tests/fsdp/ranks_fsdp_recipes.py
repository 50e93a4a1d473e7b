"""What ranks do in test_fsdp.py: sharded training as torchtitan writes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ranks_codecs import first_difference
from ranks_fsdp import SMALL, Net, local, sharded
from ranks_fsdp_state import train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from pydist import QSGD, fsdp

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Model(Stateful):
    """As torchtitan's ModelWrapper."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.net)

    def load_state_dict(self, held: dict[str, Any]) -> None:
        set_model_state_dict(self.net, held, options=StateDictOptions(strict=False))


class Optimizers(Stateful):
    """As torchtitan's OptimizersContainer: flat names, and groups that say fused and foreach."""

    def __init__(self, net: Net, kind: Any, **options: Any) -> None:
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.net = net
        self.inner = kind([{"params": [*named.values()], "param_names": [*named], **options}])

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.net, self.inner, options=FLAT)

    def load_state_dict(self, held: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.net, self.inner, optim_state_dict=held, options=FLAT)


class Steps(Stateful):
    """As torchtitan's TrainState."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, held: dict[str, Any]) -> None:
        self.step = int(held["step"])


def _made() -> tuple[Net, dict[str, Any]]:
    """A model and what its checkpoints hold."""
    net = Net()
    # torch itself wants the state of every parameter that is trained, used or not.
    for p in (net.never, *net.side.parameters()):
        p.requires_grad_(False)
    state = fsdp.compress(sharded(net), QSGD(3, block=32), error_feedback=True, min_numel=SMALL)
    optimizers = Optimizers(net, torch.optim.AdamW, lr=1e-2, fused=False, foreach=True)
    held = {"model": Model(net), "optimizer": optimizers, "train_state": Steps()}
    return net, {**held, "pydist": state.sharded()}


def as_torchtitan(rank: int, ranks: int, folder: str) -> None:
    """Saved, loaded into what has not trained yet, and trained on: bit for bit."""
    net, states = _made()
    train(net, states["optimizer"].inner, rank, range(3))
    states["train_state"].step = 3
    dcp.save(states, checkpoint_id=folder)
    train(net, states["optimizer"].inner, rank, range(3, 5))
    fresh, again = _made()
    dcp.load(again, checkpoint_id=folder)
    start = again["train_state"].step
    train(fresh, again["optimizer"].inner, rank, range(start, 5))
    for (name, p), q in zip(fresh.named_parameters(), net.parameters(), strict=True):
        first_difference(local(p), local(q), name)
