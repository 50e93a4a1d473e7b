"""What ranks do in test_hook_faults.py: states that are saved, loaded and damaged."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_state import everything, loss_of, model, setup, steps_of
from ranks_faults import raised_by
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist

# --------------------------------------------------------------------------- checkpoints


def frozen(rank: int, ranks: int, folder: str) -> list[Any]:
    """What is saved and loaded does not depend on what is frozen at that moment."""
    import torch.distributed.checkpoint as dcp

    results = []
    for freeze_save, freeze_load in ((False, False), (True, False), (False, True), (True, True)):
        path = os.path.join(folder, f"{freeze_save}{freeze_load}")
        net, ddp, state, opt = setup()
        steps_of(net, opt, rank, range(3), ddp)
        net[2].requires_grad_(not freeze_save)
        wanted = everything(net, state)[1]
        dcp.save({"pydist": state.sharded()}, checkpoint_id=path)
        net, ddp, state, opt = setup()
        net[2].requires_grad_(not freeze_load)
        dcp.load({"pydist": state.sharded()}, checkpoint_id=path)
        assert everything(net, state)[1] == wanted, (freeze_save, freeze_load)
        results.append(wanted)
    assert all(one == results[0] for one in results)
    assert {name.split(".")[0] for name, *_ in results[0]} == {"0", "2", "4"}
    return [str(results[0][0][0]).encode()]


def damage_one(saved: dict[str, Any], r: random.Random) -> str:
    """Changes one thing in a saved state; what it was."""
    entries = saved["parameters"]
    entry = entries[r.choice(list(entries))]
    key = r.choice([k for k in entry if isinstance(entry[k], Tensor)])
    values = entry[key]
    bad = r.choice([float("nan"), float("inf"), -float("inf"), 1e38, -3e19])

    spans = [[0, 1], [-1, 4, 0], [0, 10**9, 0], "a"]

    def element() -> None:
        entry[key] = values.clone()
        entry[key].view(-1)[r.randrange(values.numel())] = bad

    def scalar(name: str, *choices: Any) -> Callable[[], None]:
        return lambda: saved.update({name: r.choice(choices)})

    changes: dict[str, Callable[[], Any]] = {
        "element": element,
        "longer": lambda: entry.update({key: torch.cat([values, values])}),
        "shorter": lambda: entry.update({key: values.reshape(-1)[:-1]}),
        "integers": lambda: entry.update({key: values.to(torch.int32)}),
        "a list": lambda: entry.update({key: values.tolist()}),
        "None": lambda: entry.update({key: None}),
        "another name": lambda: entries.update({"stranger": entry}),
        "no entries": lambda: saved.pop("parameters"),
        "entries": scalar("parameters", None, [], 3, {"0.weight": 7}),
        "entry key": lambda: entry.update({"exp_avg": values}),
        "step": scalar("step", -1, 2**70, None, "3", float("nan"), 1.5),
        "rank": scalar("rank", -1, 7, "0", None),
        "world_size": scalar("world_size", 0, -2, 9, None),
        "weight": scalar("weight", 0, 99, 0.5, None),
        "version": scalar("version", 1, 3, None, "2"),
        "scale": scalar("scale", 0.0, -1.0, float("nan"), "big"),
        "rescaled": scalar("rescaled", 0.0, float("inf"), None),
        "span": lambda: entry.update({"owner_span": r.choice(spans)}),
        "missing": lambda: saved.pop(r.choice([k for k in saved if k != "parameters"])),
        "stride": lambda: entry.update({"stride": r.choice([[3], [2, 2], [-1, 1], ["a", "b"]])}),
    }  # fmt: skip
    what = r.choice(list(changes))
    changes[what]()
    return what


def loads_or_not(state: Any, trials: int, seed: int) -> int:
    """Loads damaged states: each is refused, and the state then is as it was."""
    r, refused = random.Random(seed), 0
    good = state.state_dict()

    def seen() -> Any:
        now = state.state_dict()
        tensors = {
            name: {k: bits(x) if isinstance(x, Tensor) else x for k, x in entry.items()}
            for name, entry in now["parameters"].items()
        }
        return {**now, "parameters": tensors}

    before = seen()
    for _ in range(trials):
        saved = {**good, "parameters": {k: dict(v) for k, v in good["parameters"].items()}}
        what = damage_one(saved, r)
        try:
            state.load_state_dict(saved)
        except (TypeError, ValueError) as error:
            refused += 1
            assert str(error).startswith("state"), (what, error)
        else:
            raise AssertionError(f"{what} was taken")
        assert seen() == before, what
    for foreign in ({}, {"state": {}, "param_groups": []}, None, 3, "text", [], [{}], [good, 3]):
        kind, message = raised_by(lambda f=foreign: state.load_state_dict(f))
        assert kind in ("TypeError", "ValueError"), (foreign, kind, message)
        assert seen() == before
    return refused


def damaged_states(rank: int, ranks: int, trials: int) -> list[Any]:
    """No damaged state is taken, and none changes anything."""
    net, ddp, state, opt = setup(momentum=0.5)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    steps_of(net, opt, rank, range(3), ddp)
    assert loads_or_not(state, trials, rank) == trials
    steps_of(net, opt, rank, range(3, 5), ddp)
    return [bits(p) for p in net.parameters()]


def other_step(rank: int, ranks: int) -> tuple[str, str]:
    """States of different steps are found out with the next one."""
    net, ddp, state, opt = setup()
    steps_of(net, opt, rank, range(2), ddp)
    saved = state.state_dict()
    saved["step"] += rank
    state.load_state_dict(saved)
    return raised_by(lambda: steps_of(net, opt, rank, [2], ddp))


def poisoned(rank: int, ranks: int, what: str) -> list[Any]:
    """What memory spoils in a residual or momentum is dropped, counted and named."""
    net, ddp, state, opt = setup(momentum=0.5 if what == "momentum" else 0.0, algorithm="two_phase")
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    steps_of(net, opt, rank, range(3), ddp)
    name = "2.weight"
    ordinal = state.parameters.ordinal_of(name)
    if rank == ranks - 1:
        held = {
            "worker": lambda: state.residuals.worker[ordinal],
            "owner": lambda: state.residuals.owner[ordinal].values,
            "momentum": lambda: state.momenta.held[ordinal],
        }[what]()
        held[3] = float("nan")
    moved = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3, 9):
            opt.zero_grad()
            loss_of(ddp, rank, step).backward()
            if all(bool(p.grad.isfinite().all()) for p in net.parameters()):  # the usual guard
                opt.step()
                moved += 1
    assert moved >= 5, moved
    assert all(bool(x.isfinite().all()) for x in state.residuals.tensors())
    mine = rank == ranks - 1
    assert (state.stats()["damage_dropped"] == {name: 1}) == mine, state.stats()["damage_dropped"]
    assert state.scalars()["damage_dropped"] == float(mine)
    assert any(name in str(one.message) for one in caught) == mine
    return [bits(p) for p in net.parameters()]


def poisoned_together(rank: int, ranks: int) -> tuple[str, str]:
    """What all ranks must hold alike cannot be dropped on one of them."""
    net, ddp, state, opt = setup(algorithm="all_gather")
    steps_of(net, opt, rank, range(3), ddp)
    if rank == 0:
        next(iter(state.residuals.owner.values())).values[3] = float("nan")
    return raised_by(lambda: steps_of(net, opt, rank, range(3, 6), ddp))


def recipe(rank: int, ranks: int, code: str, folder: str) -> list[Any]:
    """The documentation's recipe: from the last checkpoint that is whole, as if undisturbed."""

    def run(where: str, steps: int) -> tuple[int, list[Any]]:
        net = model()
        ddp = DDP(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        names: dict[str, Any] = {
            "ddp": ddp, "model": net, "optimizer": optimizer, "steps": steps, "dist": dist,
            "pydist": pydist, "torch": torch, "os": os, "shutil": shutil,
            "Path": lambda name: Path(where) / name,
            "train": lambda step: steps_of(net, optimizer, rank, [step], ddp),
        }  # fmt: skip
        exec(compile(code, "docs/ddp.md", "exec"), names)
        return names["start"], everything(net, names["state"])

    dist.barrier()
    start, wanted = run(os.path.join(folder, "undisturbed"), 7)
    assert start == 0
    where = os.path.join(folder, "disturbed")
    run(where, 6)
    if rank == 0:  # the machine went down while the last one was written
        last = sorted(Path(where).glob("checkpoints/step-*"))[-1] / "00001.pt"
        last.write_bytes(last.read_bytes()[:-300])
    dist.barrier()
    start, found = run(where, 7)
    assert start == 4 and found == wanted, start
    return wanted[0]
