"""What ranks do in test_optim_checkpoints.py: copies, checkpoints and damaged states."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks_collectives import bits
from ranks_faults import raised_by
from ranks_lion import model, train
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist.optim import (
    DistributedLion,
    OneBitAdam,
    OneBitLamb,
    SignSGD,
    Signum,
    ZeroOneAdam,
    saved_world_size,
)

WARM = {"warmup_steps": 2}
LOCAL = {
    "var_freeze_step": 2, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 4,
}  # fmt: skip
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lion": (DistributedLion, {"weight_decay": 0.1}),
    "lion_exact": (DistributedLion, {"exact_skip": True, "momentum_dtype": torch.bfloat16}),
    "sign": (SignSGD, {}),
    "signum": (Signum, {}),
    "adam": (OneBitAdam, WARM),
    "lamb": (OneBitLamb, {**WARM, "weight_decay": 0.1}),
    "zero_one": (ZeroOneAdam, LOCAL),
}
VOTING = ("lion", "lion_exact", "sign", "signum")


def make(kind: str, net: Any, **options: Any) -> Any:
    cls, usual = KINDS[kind]
    named = net.named_parameters() if isinstance(net, torch.nn.Module) else net
    return cls(named, **{"lr": 0.01, **usual, **options})


def flat(saved: Any) -> Iterator[Any]:
    """All that a state holds, in order."""
    if isinstance(saved, dict):
        for key in sorted(saved, key=str):
            yield key
            yield from flat(saved[key])
    elif isinstance(saved, list | tuple):
        for one in saved:
            yield from flat(one)
    elif isinstance(saved, Tensor):
        local = saved.to_local() if hasattr(saved, "to_local") else saved
        yield str(local.dtype), tuple(local.shape), bits(local)
    else:
        yield saved


def everything(net: torch.nn.Module, opt: Any) -> list[Any]:
    return [bits(p) for p in net.parameters()] + list(flat(opt.state_dict()))


def lines(found: list[Any], wanted: list[Any]) -> str:
    for i, (a, b) in enumerate(zip(found, wanted, strict=False)):
        if a != b:
            return f"entry {i} behind {str(found[max(0, i - 4) : i])[-99:]}: {a!s:.40} {b!s:.40}"
    return f"{len(found)} entries for {len(wanted)}"


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    assert found == wanted, lines(found, wanted)


# --------------------------------------------------------------------------- copies


def copies(rank: int, ranks: int, kind: str) -> None:
    """A copy goes on as the original does, between two local steps too; it is not attached."""
    for until in (0, 1, 4):
        net = model()
        opt = make(kind, net)
        if kind in VOTING:
            ddp = DDP(net)
            opt.attach(ddp)
            train(ddp, opt, rank, range(until))
            opt.detach()
        train(net, opt, rank, range(until, until + 1))
        file = io.BytesIO()
        torch.save((net, opt), file)
        file.seek(0)
        twins = [
            copy.deepcopy((net, opt)),
            pickle.loads(pickle.dumps((net, opt))),
            torch.load(file, weights_only=False),
        ]
        train(net, opt, rank, range(until + 1, until + 4))
        for other, twin in twins:
            assert type(twin) is type(opt) and repr(twin).startswith(type(opt).__name__)
            train(other, twin, rank, range(until + 1, until + 4))
            assert_equal(everything(other, twin), everything(net, opt))


def copies_of_attached(rank: int, ranks: int) -> None:
    """Of an attached optimizer, and of a DDP model that has one: nothing of DDP goes along."""
    net = model()
    ddp = DDP(net)
    opt = make("lion", net)
    opt.attach(ddp)
    train(ddp, opt, rank, range(2))
    copied, twin = copy.deepcopy((net, opt))
    alone = copy.deepcopy(ddp)
    train(ddp, opt, rank, range(2, 4))
    train(copied, twin, rank, range(2, 4))
    assert_equal(everything(copied, twin), everything(net, opt))
    other = torch.optim.SGD(alone.parameters(), lr=0.1)
    train(alone, other, rank, range(2))  # it averages gradients as any DDP model
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, [bits(p) for p in alone.parameters()])
    assert all(one == everyone[0] for one in everyone)


def copies_with_groups(rank: int, ranks: int) -> list[tuple[str, str]]:
    """A group of the user's is shared by copies in this process, and lost in a pickle."""
    group = dist.new_group([1, 0])
    net = model()
    opt = make("lion", net, group=group)
    train(net, opt, rank, range(2))
    shared, twin = copy.deepcopy((net, opt))
    lost, pickled = pickle.loads(pickle.dumps((net, opt)))
    train(net, opt, rank, range(2, 4))
    train(shared, twin, rank, range(2, 4))
    assert_equal(everything(shared, twin), everything(net, opt))
    raised = [raised_by(lambda: train(lost, pickled, rank, range(2, 3)))]
    pickled.bind(group)
    train(lost, pickled, rank, range(2, 4))
    assert_equal(everything(lost, pickled), everything(net, opt))
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, pickle.dumps(opt))
    foreign = pickle.loads(everyone[1 - rank])
    raised.append(raised_by(lambda: foreign.bind(group)))
    return raised


# --------------------------------------------------------------------------- torch's checkpoints


def _wrapped(kind: str, how: str, seed: int) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """A model as it is saved, the bare one, and its optimizer."""
    net = model(seed)
    ddp = DDP(net) if how in ("ddp", "attached") else net
    named: Any = list(net.named_parameters())
    if how == "renamed":
        named = [(f"other.{n}", p) for n, p in named]
    if how == "groups":  # with a learning rate as a tensor, and one group that is added later
        named = [{"params": named[3:], "lr": torch.tensor(0.02)}, {"params": named[1:3]}]
    opt = make(kind, named)
    if how == "groups":
        opt.add_param_group({"params": list(net.named_parameters())[:1], "weight_decay": 0.2})
    if how == "attached":
        opt.attach(ddp)
    return ddp, net, opt


def _train(ddp: Any, opt: Any, how: str, rank: int, steps: range) -> None:
    with ddp.no_sync() if how == "ddp" else nullcontext():
        train(ddp, opt, rank, steps)


def torch_checkpoint(
    rank: int, ranks: int, kind: str, how: str, until: int, flatten: bool, folder: str
) -> None:
    """``dcp.save`` and ``dcp.load``, into what was not used yet: training goes on bit for bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ddp, net, opt = _wrapped(kind, how, 0)
    _train(ddp, opt, how, rank, range(until))
    a, b = get_state_dict(ddp, opt, options=options)
    dcp.save({"model": a, "optimizer": b}, checkpoint_id=folder)
    _train(ddp, opt, how, rank, range(until, until + 5))

    again, bare, other = _wrapped(kind, how, 1)
    a, b = get_state_dict(again, other, options=options)
    state = {"model": a, "optimizer": b}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=options,
    )  # fmt: skip
    _train(again, other, how, rank, range(until, until + 5))
    assert_equal(everything(bare, other), everything(net, opt))


def full_state(rank: int, ranks: int, kind: str) -> list[tuple[str, str]]:
    """One file of rank 0's: with the states of all ranks it serves, else all others refuse it."""
    full = StateDictOptions(full_state_dict=True)
    cast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(4))
    raised = []
    for consolidated in (False, True):
        if consolidated:
            opt.consolidate_state_dict()
        saved = [get_optimizer_state_dict(net, opt, options=full) if rank == 0 else {}]
        other = copy.deepcopy(net)
        again = make(kind, other)
        before = everything(other, again)

        def load(again: Any = again, other: Any = other, saved: Any = saved) -> None:
            set_optimizer_state_dict(other, again, saved[0], options=cast)

        if rank or consolidated:
            raised.append(raised_by(load))
        else:
            load()
        if not consolidated and rank:
            assert_equal(everything(other, again), before)
    train(net, opt, rank, range(4, 8))
    train(other, again, rank, range(4, 8))
    assert_equal(everything(other, again), everything(net, opt))
    return raised


def save_in_a_folder(rank: int, ranks: int, kind: str, folder: str) -> Any:
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(4))
    a, b = get_state_dict(net, opt)
    dcp.save({"model": a, "optimizer": b}, checkpoint_id=folder)
    return opt.state_dict()


def load_from_a_folder(
    rank: int, ranks: int, kind: str, folder: str, saved: list[Any]
) -> list[bytes]:
    """Of more ranks than there are now; as if all their states were given."""
    net = model(3)
    opt = make(kind, net)
    a, b = get_state_dict(net, opt)
    text = "nothing"
    try:
        dcp.load({"model": a, "optimizer": b}, checkpoint_id=folder)
    except CheckpointException as error:  # which is no Exception
        text = str(error)
    assert kind == "sign" or f"rank {rank} of {ranks}" in text, text
    if kind == "sign":
        assert raised_by(lambda: saved_world_size(folder))[0] == "ValueError"
    world = len(saved) if kind == "sign" else saved_world_size(folder)
    with opt.saved_by(world):
        a, b = get_state_dict(net, opt)
    state = {"model": a, "optimizer": b}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    other = copy.deepcopy(net)
    listed = make(kind, other)
    listed.load_state_dict(saved)
    assert_equal(everything(net, opt), everything(other, listed))
    train(net, opt, rank, range(4, 8))
    return [bits(p) for p in net.parameters()]


def fsdp_checkpoint(rank: int, ranks: int, inside: int, folder: str) -> None:
    """Sharded models: voters are replicas of a shard (of one, where there is no replica)."""
    from ranks_fsdp_lion import _state, local, made, mesh_of
    from ranks_fsdp_lion import _train as train_sharded

    def new() -> tuple[torch.nn.Module, Any]:
        mesh = mesh_of(ranks, inside)
        net, opt = made(mesh)
        with torch.no_grad():  # what is frozen is no optimizer's, and must be equal for DCP
            for p in net.parameters():
                if not p.requires_grad:
                    local(p).div_(1 + mesh.get_local_rank("across"))
        return net, opt

    for until in (0, 3):
        path = Path(folder) / str(until)
        net, opt = new()
        train_sharded(net, opt, rank, range(until))
        a, b = get_state_dict(net, opt)
        dcp.save({"model": a, "optimizer": b}, checkpoint_id=path)
        train_sharded(net, opt, rank, range(until, until + 3))
        again, other = new()
        a, b = get_state_dict(again, other)
        state = {"model": a, "optimizer": b}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        train_sharded(again, other, rank, range(until, until + 3))
        assert_equal([bits(x) for x in _state(other)], [bits(x) for x in _state(opt)])


# --------------------------------------------------------------------------- what is refused


def refused(rank: int, ranks: int, kind: str) -> dict[str, tuple[str, str]]:
    """What is another's is refused by name, and nothing has changed."""
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(4))
    mine = copy.deepcopy(opt.state_dict())
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, mine)
    other_kind = "adam" if kind in ("lion", "lion_exact") else "lion"
    strangers = make(other_kind, model())
    train(model(), strangers, rank, range(1))
    renamed = copy.deepcopy(mine)
    names = [f"x.{name}" for name in renamed["param_groups"][0]["param_names"]]
    names[0] = "y.0.weight"
    renamed["param_groups"][0]["param_names"] = names
    early = copy.deepcopy(mine)
    early["param_groups"][0]["step"] = -1
    cases = {
        "other optimizer": strangers.state_dict(), "names": renamed, "step": early,
        "foreign": {"model": {}}, "nothing": [], "none": None,
        "fewer": {**mine, "param_groups": [{**mine["param_groups"][0], "params": [0, 1]}]},
    }  # fmt: skip
    if kind != "sign":
        cases["rank"] = everyone[1 - rank]
        short = copy.deepcopy(mine)
        entry = short["state"][0]
        key = next(key for key in entry if key in ("momentum", "exp_avg"))
        where = entry[key] if isinstance(entry[key], dict) else entry
        at = next(iter(where)) if where is not entry else key
        where[at] = where[at].flatten()[:2]
        cases["short"] = short
    before = everything(net, opt)
    raised = {}
    for name, saved in cases.items():
        raised[name] = raised_by(lambda saved=saved: opt.load_state_dict(saved))
        assert_equal(everything(net, opt), before)
    opt.load_state_dict(mine)
    assert_equal(everything(net, opt), before)
    return raised


def matched(rank: int, ranks: int, kind: str) -> None:
    """By name in another order and in other groups; a parameter without a state starts anew."""
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(4))
    saved = copy.deepcopy(opt.state_dict())
    train(net, opt, rank, range(4, 6))
    other = model(1)
    other.load_state_dict(net.state_dict())
    again = make(kind, list(reversed(list(other.named_parameters()))))
    again.load_state_dict(saved)
    for (name, p), i in zip(net.named_parameters(), saved["state"], strict=False):
        q = dict(other.named_parameters())[name]
        index = again.param_groups[0]["param_names"].index(name)
        now = again.state_dict()["state"].get(index, {})
        assert list(flat(now)) == list(flat(saved["state"][i])), name
        assert p.shape == q.shape
    if kind != "sign":
        del saved["state"][2]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.load_state_dict(saved)
        assert any("no state of '2.weight'" in str(w.message) for w in caught)


def different_on_a_rank(rank: int, ranks: int, kind: str) -> tuple[str, str]:
    """What must be equal on all ranks was changed in one rank's file: the next step says so."""
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(3))  # 0/1 Adam has just had a sync
    saved = copy.deepcopy(opt.state_dict())
    if rank:
        saved["state"][2]["exp_avg_sq"].mul_(2)
    opt.load_state_dict(saved)
    return raised_by(lambda: train(net, opt, rank, range(3, 8)))
