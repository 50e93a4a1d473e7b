"""What ranks do in test_optim_damage.py: kept state and files that were damaged."""

from __future__ import annotations

import copy
import random as randoms
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks_faults import raised_by
from ranks_lion import model, train
from ranks_optim_checkpoints import VOTING, assert_equal, everything, make
from ranks_optim_faults import assert_replicas, values, warned
from torch import Tensor, nn

# --------------------------------------------------------------------------- damage


def poisoned(rank: int, ranks: int, kind: str, key: str) -> Any:
    """A NaN gets into what is kept: it is dropped with a name, or all ranks are told."""
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(4))
    p = list(net.parameters())[2]
    if key == "residual":
        opt.exchange.residuals.worker[2][5] = float("nan")
    elif rank == 0:
        opt.state[p][key].view(-1)[5] = float("nan")

    def go_on() -> None:
        train(net, opt, rank, range(4, 10))

    before = values(net)
    messages: list[str] = []
    raised = raised_by(lambda: messages.extend(warned(go_on)))
    if not raised[0]:
        assert all(a != b for a, b in zip(values(net), before, strict=True)), "it stands still"
        assert all(bool(p.isfinite().all()) for p in net.parameters())
    return raised, messages, opt.stats()


def standing_still(rank: int, ranks: int, kind: str) -> tuple[str, str]:
    """Gradients that are never finite: after 100 steps somebody must say so."""
    p = nn.Parameter(torch.ones(3))
    opt = make(kind, [("w", p)])
    p.grad = torch.full((3,), float("nan") if rank else 1.0)

    def steps() -> None:
        for _ in range(110):
            opt.step()

    return raised_by(steps)


def damaged_memory(rank: int, ranks: int, kind: str) -> dict[str, tuple[str, str]]:
    """State that someone changed in place: never an address that is too short."""
    key = "momentum" if kind in VOTING else "exp_avg"
    raised = {}
    changes: dict[str, Callable[[Any, Tensor], Any]] = {
        "short": lambda opt, p: opt.state[p].update({key: torch.zeros(2)}),
        "freed": lambda opt, p: opt.state[p][key].untyped_storage().resize_(0),
        "text": lambda opt, p: opt.state[p].update({key: "x"}),
        "gone": lambda opt, p: opt.state[p].pop(key),
    }
    for name, change in changes.items():
        net = model()
        opt = make(kind, net)
        train(net, opt, rank, range(3))
        if rank:
            change(opt, list(net.parameters())[2])
        raised[name] = raised_by(lambda net=net, opt=opt: train(net, opt, rank, range(3, 7)))
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(3))
    opt.state.clear()
    train(net, opt, rank, range(3, 6))
    assert_replicas(net, ranks)
    return raised


# --------------------------------------------------------------------------- damaged states

_BAD: list[Any] = [
    None, "x", -1, 2**70, 3.5, float("nan"), float("inf"), 1e38, True, [], {}, (1, 2), b"\0",
    torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.ones(2, dtype=torch.int8),
    torch.zeros(33, 6, device="meta"), torch.zeros(2, 2).to_sparse(),
]  # fmt: skip


def _damage(saved: Any, random: Any) -> str:
    """Changes one place of a state; says which."""
    path, place = [], saved
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random.choice(keys)
        path.append(str(key))
        inside = place[key]
        deeper = isinstance(inside, dict | list) and len(inside) > 0
        if deeper and random.random() < 0.9:
            place = inside
            continue
        if isinstance(inside, Tensor) and inside.is_floating_point() and random.random() < 0.5:
            how = random.choice(["nan", "huge", "short", "wide", "cut"])
            flat = inside.clone().flatten()
            if how in ("nan", "huge") and flat.numel():
                flat[random.randrange(flat.numel())] = float("nan") if how == "nan" else 3e38
                place[key] = flat.view(inside.shape)
            elif how == "short":
                place[key] = flat[:-1]
            elif how == "wide":
                place[key] = torch.cat([flat, flat])
            else:
                place[key] = inside.clone()
                place[key].untyped_storage().resize_(0)
            return f"{'/'.join(path)} {how}"
        if random.random() < 0.25:
            del place[key]
            return f"{'/'.join(path)} removed"
        bad = random.choice(_BAD)
        place[key] = bad
        return f"{'/'.join(path)} = {type(bad).__name__}"


def damaged_states(rank: int, ranks: int, kind: str, number: int, seed: int) -> dict[str, int]:
    """Loaded, or refused with everything as it was; a step then keeps replicas or raises on all."""
    random = randoms.Random(seed)
    counts = {"loaded": 0, "refused": 0, "told": 0}
    net = model()
    opt = make(kind, net)
    train(net, opt, rank, range(3))
    good, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    for _ in range(number):
        hurt = random.randrange(ranks + 1)  # one rank's file, or all of them
        saved = copy.deepcopy(good)
        what = _damage(saved, random)
        if hurt not in (rank, ranks):
            saved = good
        before = everything(net, opt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused = raised_by(lambda saved=saved, opt=opt: opt.load_state_dict(saved))
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, refused[0])
        if refused[0]:
            assert refused[0] == "ValueError" and "state_dict" in refused[1], (what, refused)
            assert_equal(everything(net, opt), before)
        if any(everyone):  # as a program ends when one of its ranks cannot load
            counts["refused"] += 1
        else:
            counts["loaded"] += 1
            raised = raised_by(lambda opt=opt: train(net, opt, rank, range(3, 7)))
            dist.all_gather_object(everyone, raised[0])
            assert all(everyone) or not any(everyone), (what, everyone, raised)
            counts["told"] += bool(raised[0])
            if not raised[0]:
                assert_replicas(net, ranks)
                assert all(bool(p.isfinite().all()) for p in net.parameters()), what
        net.load_state_dict(weights)
        opt = make(kind, net)
        opt.load_state_dict(good)
    return counts
