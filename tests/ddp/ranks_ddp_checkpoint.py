"""What ranks do in test_ddp_checkpoint.py: the DDP hook's state saved and loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_ddp_state import everything, setup, steps_of
from ranks_faults import raised_by

import pydist
from pydist.ddp import CompressionState


def resumed(
    rank: int, ranks: int, folder: str, how: str, options: dict[str, Any] | None = None
) -> list[Any]:
    """Stopped after four steps and taken up by a new model: the same bits as without."""
    options = {"algorithm": "two_phase" if ranks > 2 else "auto"} | (options or {})
    net, ddp, state, opt = setup(**options)
    steps_of(net, opt, rank, range(4), ddp)
    middle = [copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())]
    path = Path(folder)
    if how == "file":
        torch.save(state.state_dict(), path / f"state{rank}.pt")
    else:
        dcp_save(state, path)
    steps_of(net, opt, rank, range(4, 8), ddp)
    wanted = everything(net, state)
    # Other bucket sizes, and a first step that lays buckets out anew.
    again, ddp, state, opt = setup(ddp={}, **options)
    again.load_state_dict(middle[0])
    opt.load_state_dict(middle[1])
    if how == "file":
        state.load_state_dict(torch.load(path / f"state{rank}.pt", weights_only=True))
    else:
        dcp_load(state, path)
    steps_of(again, opt, rank, range(4, 8), ddp)
    got = everything(again, state)
    assert got == wanted and got[2] == 8
    return got[0]


def dcp_save(state: CompressionState, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"compression": state.sharded()}, checkpoint_id=str(path / "dcp"))


def dcp_load(state: CompressionState, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = pydist.ddp.saved_world_size(str(path / "dcp"))
        dcp.load({"compression": state.sharded(old)}, checkpoint_id=str(path / "dcp"))


def unsent(ranks: int, state: CompressionState) -> dict[str, Any]:
    """What all ranks have not sent, as it will count in a mean: double precision."""
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, state.state_dict())
    return unsent_of(everyone)


def unsent_of(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of all ranks' saved states."""
    total: dict[str, Any] = {}
    for rank, saved in enumerate(states):
        for name, entry in saved["parameters"].items():
            mass = entry["residual"].double().reshape(-1).numpy() / len(states)
            if "owner" in entry:
                first, last, whole = entry["owner_span"]
                if not whole or rank == 0:
                    mass[first:last] += entry["owner"].double().numpy()
            total[name] = total.get(name, 0) + mass
    return total


def resharded(
    rank: int, ranks: int, folder: str, old: int | None, how: str, algorithm: str
) -> dict[str, Any]:
    """Loads what ``old`` ranks saved, returns the unsent mass at once, goes on, and saves."""
    path = Path(folder)
    net, ddp, state, opt = setup(algorithm=algorithm)
    found = None
    if old is not None:
        if how == "file":
            states = [torch.load(path / f"{old}-{r}.pt", weights_only=True) for r in range(old)]
            refused = raised_by(lambda: state.load_state_dict(states[0]))
            assert refused[0] == "ValueError", refused
            assert f"saved by rank 0 of {old}" in refused[1], refused
            state.load_state_dict(states)
        else:
            dcp_load(state, path / str(old))
        found = unsent(ranks, state)
        assert state.step == 4 * (1 if old == 4 else 2)
    steps_of(net, opt, rank, range(4), ddp)
    left = unsent(ranks, state)
    if how == "file":
        torch.save(state.state_dict(), path / f"{ranks}-{rank}.pt")
    else:
        dcp_save(state, path / str(ranks))
    return {"found": found, "left": left}
