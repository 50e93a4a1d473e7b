"""What ranks do in test_ddp_dgc.py: momentum, schedules, local steps, what is observed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ranks_ddp_state as base
import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_checkpoint import dcp_load, dcp_save
from ranks_ddp_state import everything, loss_of, model, setup, steps_of
from ranks_faults import raised_by, still_works
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as torch_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist
from pydist import QSGD, Sign, Ternary, TopK
from pydist.ddp import Schedule

TOPK = TopK(0.1, block=64)
DGC: dict[str, Any] = {"momentum": 0.9, "clip_norm": 0.05}
# Every kind of change: residuals to residuals in other blocks, to none, and back.
STAGES = Schedule([(0, TopK(0.25, block=64)), (2, Sign("l1", block=32)), (5, QSGD(2)), (6, TOPK)])


def any_buckets(rank: int, ranks: int) -> list[Any]:
    return base.any_buckets(rank, ranks, STAGES, **DGC)


# --------------------------------------------------------------------------- checkpoints


def momenta_of(state: Any) -> dict[str, Tensor]:
    return {k: v["momentum"] for k, v in state.state_dict()["parameters"].items()}


def to_other_world(rank: int, ranks: int, saved: list[Any] | None) -> Any:
    """Trains and saves; or loads what others saved, and says what each rank then has."""
    net, ddp, state, opt = setup(TOPK, **DGC)
    if saved is None:
        steps_of(net, opt, rank, range(3), ddp)
        assert set(momenta_of(state)) == {name for name, _ in net.named_parameters()}
        assert state.stats()["momentum_bytes"] == 4 * sum(p.numel() for p in net.parameters())
        return state.state_dict()
    state.load_state_dict(saved)
    return momenta_of(state)


def loaded(rank: int, ranks: int, saved: list[Any] | None, folder: str = "") -> Any:
    """Trains, or loads: from files, or from a distributed checkpoint that it saves as they are."""
    net, ddp, state, opt = setup(TOPK, algorithm="two_phase", **DGC)
    if saved is None:
        steps_of(net, opt, rank, range(3), ddp)
        return state.state_dict()
    if folder and ranks == len(saved):
        state.load_state_dict(saved[rank])
        dcp_save(state, Path(folder))
        net, ddp, state, opt = setup(TOPK, algorithm="two_phase", **DGC)
    if folder:
        dcp_load(state, Path(folder))
    else:
        state.load_state_dict(saved)
    return state.state_dict()


def without_residuals(rank: int, ranks: int, folder: str, momentum: float) -> list[int]:
    """A distributed checkpoint without residuals says too how many ranks saved it."""
    net, ddp, state, opt = setup(Ternary(), momentum=momentum)
    steps_of(net, opt, rank, range(2), ddp)
    dcp_save(state, Path(folder))
    wanted = everything(net, state)
    again, ddp, state, opt = setup(Ternary(), momentum=momentum)
    again.load_state_dict(net.state_dict())
    dcp_load(state, Path(folder))
    assert everything(again, state) == wanted and bool(wanted[1]) == bool(momentum)
    return [pydist.ddp.saved_world_size(str(Path(folder) / "dcp"))]


def without_momentum(rank: int, ranks: int) -> Any:
    """A state with momenta does not fit one that has none."""
    saved = to_other_world(rank, ranks, None)
    net, ddp, state, opt = setup(TOPK)
    return raised_by(lambda: state.load_state_dict(saved))


def own_scale(rank: int, ranks: int) -> list[Any]:
    """Clipping goes on in the unit that rescale() has led to."""
    net, ddp, state, opt = setup(TOPK, **DGC)
    again, ddp_again, resumed, opt_again = setup(TOPK, **DGC)
    state.rescale(1 / 64)
    resumed.load_state_dict(state.state_dict())
    steps_of(net, opt, rank, range(2), ddp)
    steps_of(again, opt_again, rank, range(2), ddp_again)
    assert everything(net, state) == everything(again, resumed)
    unclipped, ddp, state, opt = setup(TOPK, momentum=0.9)
    steps_of(unclipped, opt, rank, range(2), ddp)
    assert bits(unclipped[0].weight) != bits(net[0].weight), "nothing was clipped"
    return everything(net, resumed)[0]


# --------------------------------------------------------------------------- not finite


def released(
    rank: int, ranks: int, local_after: int | None, grouped: bool, options: dict[str, Any]
) -> list[Any]:
    """A NaN in the step that releases residuals: they arrive in the next one, once and whole."""
    codec = Schedule([(0, TopK(0.05, block=64)), (3, None)])
    subgroup = dist.new_group(list(range(ranks))) if grouped else None
    options = {"local_after": local_after, "subgroup": subgroup, "algorithm": "two_phase"} | options
    ddp = {"find_unused_parameters": True, **base.SMALL}  # several buckets from the first step on
    net, ddp, state, opt = setup(codec, ddp=ddp, **options)
    steps_of(net, opt, rank, range(3), ddp)
    before, norm = state.state_dict()["parameters"], state.stats()["residual_norm"]
    assert norm > 0
    filled_with_nan = rank == ranks - 1
    handle = net[2].weight.register_hook(base.with_nan) if filled_with_nan else None
    opt.zero_grad()
    loss_of(ddp, rank, 3).backward()
    if handle is not None:
        handle.remove()
    # Without a subgroup nobody knows of another rank's NaN, and that one's residuals have arrived.
    kept = filled_with_nan or local_after is None or grouped
    total = _unsent(state.state_dict()["parameters"], ranks)
    for name, wanted in _unsent(before, ranks).items():
        assert torch.equal(total[name], wanted) if kept else name not in total, name
    bare = copy.deepcopy(net)  # the step was left out
    loss_of(bare, rank, 4).backward()
    opt.zero_grad()
    loss_of(ddp, rank, 4).backward()
    assert state.stats()["residual_bytes"] == 0
    return [
        {name: p.grad for name, p in net.named_parameters()},
        {name: p.grad for name, p in bare.named_parameters()},
        _unsent(before, ranks) if kept else {},
    ]


def _unsent(saved: dict[str, Any], ranks: int) -> dict[str, Tensor]:
    """What a rank has not sent, an owner's too, as it weighs in a rank's gradient."""
    result = {}
    for name, entry in saved.items():
        if "residual" in entry:
            left = entry["residual"].clone()
            if "owner" in entry:
                first, last, _ = entry["owner_span"]
                left.view(-1)[first:last] += ranks * entry["owner"]
            result[name] = left
    return result


# --------------------------------------------------------------------------- agreement


def other(rank: int, ranks: int, what: str) -> Any:
    """Rank 1 gives another option than the others."""
    stages = [(0, QSGD(8)), (5 if rank == 1 and what == "codec" else 3, QSGD(4))]
    options: dict[str, Any] = {"momentum": 0.5 if rank == 1 and what == "momentum" else 0.9}
    if what == "clip_norm" and rank == 1:
        options["clip_norm"] = 1.0
    ddp = DDP(model())
    found = raised_by(lambda: pydist.ddp.compress(ddp, Schedule(stages), **options))
    still_works(rank, ranks)
    return found


def refused_step(rank: int, ranks: int) -> list[Any]:
    """A step that fails on one rank before its payload leaves momenta and residuals alone."""
    net, ddp, state, opt = setup(TOPK, ddp={}, **DGC)
    steps_of(net, opt, rank, range(2), ddp)
    before = everything(net, state)
    place = state.parameters._places.pop(net[4].weight) if rank == 0 else None
    kind, _ = raised_by(lambda: loss_of(ddp, rank, 7).backward())
    assert kind == "PydistError"
    if place is not None:
        state.parameters._places[net[4].weight] = place
    assert everything(net, state) == before
    steps_of(net, opt, rank, range(2, 4), ddp)
    return everything(net, state)[0]


def refused_late(rank: int, ranks: int) -> list[Any]:
    """A refused last bucket: momenta of those before it stay too, though their residuals moved."""
    ddp_options = {"find_unused_parameters": True, **base.SMALL}
    net, ddp, state, opt = setup(TOPK, ddp=ddp_options, **DGC)
    steps_of(net, opt, rank, range(2), ddp)
    before = state.state_dict()["parameters"]
    place = state.parameters._places.pop(net[0].weight) if rank == 0 else None
    kind, _ = raised_by(lambda: loss_of(ddp, rank, 7).backward())
    assert kind == "PydistError"
    if place is not None:
        state.parameters._places[net[0].weight] = place
    after = state.state_dict()["parameters"]
    assert not torch.equal(after["4.weight"]["residual"], before["4.weight"]["residual"])
    for name, entry in before.items():
        assert torch.equal(after[name]["momentum"], entry["momentum"]), name
    steps_of(net, opt, rank, range(2, 4), ddp)
    return everything(net, state)[0]


# --------------------------------------------------------------------------- post-local SGD


def averaged(
    rank: int, ranks: int, hook: str, groups: list[list[int]] | None, start: int, steps: int
) -> list[bytes]:
    """Post-local SGD, by torch's own hook or by ours with raw gradients."""
    net = model()
    ddp = DDP(net, **base.SMALL)
    subgroup = None
    for members in groups or ():
        made = dist.new_group(members)
        subgroup = made if rank in members else subgroup
    if hook == "torch":
        state = torch_hook.PostLocalSGDState(
            None, subgroup, start, post_local_gradient_allreduce=subgroup is not None
        )
        ddp.register_comm_hook(state, torch_hook.post_localSGD_hook)
    else:
        ours = pydist.ddp.compress(ddp, {"*": None}, local_after=start, subgroup=subgroup)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    averager = PeriodicModelAverager(period=2, warmup_steps=start)
    for step in range(steps):
        steps_of(net, opt, rank, [step], ddp)
        averager.average_parameters(net.parameters())
    if hook != "torch":
        stats = ours.stats()
        assert stats["steps"] == ours.step == steps
        assert set(stats["fallbacks"]) == {"local step"}
    return [bits(p) for p in net.parameters()]


def post_local(
    rank: int, ranks: int, groups: list[list[int]] | None, start: int, steps: int
) -> list[bytes]:
    """Two floats have one sum in any order, so torch's hook must give our bits."""
    finals = [averaged(rank, ranks, hook, groups, start, steps) for hook in ("torch", "pydist")]
    assert finals[0] == finals[1]
    return finals[1]


def into_local(rank: int, ranks: int) -> list[Any]:
    """With the first local step residuals go into the gradients; then nothing travels."""
    net, ddp, state, opt = setup(TOPK, ddp={}, local_after=3, momentum=0.5, algorithm="two_phase")
    steps_of(net, opt, rank, range(3), ddp)
    saved, sent = state.state_dict()["parameters"], state.stats()["wire_bytes"]
    bare = copy.deepcopy(net)
    for step in (3, 4):
        opt.zero_grad()
        bare.zero_grad()
        loss_of(ddp, rank, step).backward()
        loss_of(bare, rank, step).backward()
        now = momenta_of(state)
        for (name, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
            momentum = 0.5 * saved[name]["momentum"] + q.grad
            assert torch.equal(now[name], momentum), name
            wanted = momentum
            if step == 3 and "owner" in saved[name]:
                left = saved[name]["residual"].clone().view(-1)
                first, last, _ = saved[name]["owner_span"]
                left[first:last] += ranks * saved[name]["owner"]
                assert left.any()
                wanted = momentum + left.view(p.shape)
            assert torch.equal(p.grad, wanted), name
            saved[name]["momentum"] = momentum
        assert state.stats()["residual_bytes"] == 0
    assert state.stats()["wire_bytes"] == sent and state.step == 5
    return [int(state.stats()["fallbacks"]["local step"]["parameters"])]


def clipped_local(rank: int, ranks: int, grouped: bool) -> None:
    """The limit is that of the mean that is taken: over the subgroup, or of one rank."""
    subgroup = dist.new_group(list(range(ranks))) if grouped else None
    net, ddp, state, opt = setup({"*": None}, local_after=0, subgroup=subgroup, clip_norm=0.01)
    members = range(ranks) if grouped else [rank]
    limit = 0.01 * len(members) ** 0.5
    bare, wanted = model(), [torch.zeros_like(p) for p in net.parameters()]
    for one in members:
        bare.zero_grad()
        loss_of(bare, one, 0).backward()
        for total, p in zip(wanted, bare.parameters(), strict=True):
            norm = float(p.grad.norm())
            assert norm > 0.01 * ranks**0.5, "nothing to clip"
            total += p.grad * (limit / norm) / len(members)
    loss_of(ddp, rank, 0).backward()
    for p, mean in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, mean, rtol=1e-5, atol=1e-9)


def misuse(rank: int, ranks: int) -> list[Any]:
    wrong: list[dict[str, Any]] = [
        {"momentum": 1.0}, {"momentum": -0.1}, {"clip_norm": 0.0}, {"local_after": -1},
        {"local_after": 3, "op": "sum"}, {"local_after": 3, "exact_skip": True},
        {"subgroup": dist.group.WORLD}, {"local_after": 3, "subgroup": 7}, {"error_every": -2},
    ]  # fmt: skip
    return [raised_by(lambda x=x: pydist.ddp.CompressionState(TOPK, **x)) for x in wrong]


# --------------------------------------------------------------------------- observation


def measured(rank: int, ranks: int, every: int) -> list[Any]:
    """The compression error, against gradients of a bare model and residuals in between."""
    net, ddp, state, opt = setup(TOPK, error_every=every, ddp={}, min_numel=100)
    bare = copy.deepcopy(net)
    found, wanted = [], []
    for step in range(4):
        before = state.state_dict()["parameters"]
        bare.load_state_dict(net.state_dict())
        bare.zero_grad()
        loss_of(bare, rank, step).backward()
        steps_of(net, opt, rank, [step], ddp)
        stats = state.stats()
        found.append((stats["compression_error"], stats["compression_error_step"]))
        whole = rest = 0.0
        gradients = {name: p.grad.double() for name, p in bare.named_parameters()}
        for name, entry in state.state_dict()["parameters"].items():
            old = before[name]["residual"].double() if name in before else 0.0
            whole += float((gradients[name] + old).square().sum())
            rest += float(entry["residual"].double().square().sum())
        wanted.append((rest / whole) ** 0.5)
    assert 0.1 < wanted[0] < wanted[-1] < 1, wanted
    return [found, wanted]


def advised(rank: int, ranks: int) -> Any:
    """Many small buckets: the advice, before a step and after two, and the log's line."""
    net, ddp, state, opt = setup(QSGD(4, block=64), ddp=base.SMALL)
    assert state.advice().verdict == "unknown"
    steps_of(net, opt, rank, range(2), ddp)
    return state.advice()
