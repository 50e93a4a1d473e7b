"""What ranks do in test_optim_faults.py: optimizers among other people's tools."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_faults import raised_by
from ranks_lion import loss_of, model, train
from ranks_optim_checkpoints import assert_equal, everything, make
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist.optim import DistributedLion


def values(net: nn.Module) -> list[bytes]:
    return [bits(p) for p in net.parameters()]


def assert_replicas(net: nn.Module, ranks: int) -> None:
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, values(net))
    assert all(one == everyone[0] for one in everyone), "replicas differ"


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


# --------------------------------------------------------------------------- memory formats


class Images(nn.Module):
    """Convolutions, whose weights torch lays out anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def _set_gradients(net: nn.Module, rank: int, step: int) -> None:
    """The same ones whatever the memory format is."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    for p in net.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def memory_format(rank: int, ranks: int, kind: str) -> None:
    """Changed after some steps, and before a state is loaded: elements stay themselves."""
    net, still = Images(), Images()
    opt, other = make(kind, net), make(kind, still)
    formats = {1: torch.channels_last, 3: torch.contiguous_format, 5: torch.channels_last}
    for step in range(8):
        if step in formats:
            net.to(memory_format=formats[step])
        if step == 6:
            saved, again = copy.deepcopy(opt.state_dict()), make(kind, net)
            again.load_state_dict(saved)
            opt = again
        for one, by in ((net, opt), (still, other)):
            _set_gradients(one, rank, step)
            by.step()
        if step < 6:
            assert_equal(values(net), values(still))
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def memory_format_attached(rank: int, ranks: int) -> None:
    """DDP lays out its buckets before, and the optimizer's state is in yet another order."""
    net, still = Images(), Images()
    opt, other = make("lion", net), make("lion", still)
    ddp, wrapped = DDP(net), DDP(still)
    opt.attach(ddp)
    other.attach(wrapped)
    net.to(memory_format=torch.channels_last)
    for step in range(5):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        for one, by in ((ddp, opt), (wrapped, other)):
            by.zero_grad()
            (one(x).mul(64).round().div(64)).square().sum().backward()
            by.step()
    assert_replicas(net, ranks)
    near = [
        float((a - b).abs().gt(0).float().mean())
        for a, b in zip(net.parameters(), still.parameters(), strict=True)
    ]
    # Convolutions of another memory format round gradients otherwise: some votes differ.
    assert max(near) < 0.2, near


def other_strides(rank: int, ranks: int) -> tuple[str, str]:
    """One rank alone made its optimizer after it changed the memory format."""
    net = Images()
    if rank:
        net.to(memory_format=torch.channels_last)
    return raised_by(lambda: make("lion", net))


# --------------------------------------------------------------------------- attached


def joined(rank: int, ranks: int, kind: str, unused: bool) -> None:
    """Ranks that ran out of data vote with zero gradients, and stay replicas."""
    net, plain = model(), model()
    ddp = DDP(net, find_unused_parameters=unused)
    opt, other = make(kind, net), make(kind, plain)
    opt.attach(ddp)
    mine = 2 + 2 * rank
    with ddp.join():
        for step in range(mine):
            opt.zero_grad()
            loss_of(ddp, rank, step).backward()
            opt.step()
    for step in range(2 * ranks):
        other.zero_grad(set_to_none=unused)
        if step < mine:
            loss_of(plain, rank, step).backward()
        elif not unused:
            for p in plain.parameters():
                p.grad = torch.zeros_like(p)
        other.step()
    assert_equal(values(net), values(plain))
    assert opt.stats()["step"] == 2 * ranks
    train(ddp, opt, rank, range(8, 10))
    assert_replicas(net, ranks)


def outside_buckets(rank: int, ranks: int, how: str) -> None:
    """What DDP does not reduce is voted on in ``step()``, as on the plain path."""
    net, plain = model(), model()
    if how == "thawed":
        for one in (net, plain):
            one[0].requires_grad_(False)
    if how == "ignored":
        DDP._set_params_and_buffers_to_ignore_for_model(net, ["2.weight"])
    ddp = DDP(net)
    opts = []
    for one in (net, plain):
        named = list(one.named_parameters())
        opts.append(make("lion", named[2:] if how == "added" else named))
        if how == "added":
            one[0].requires_grad_(False)
    opt, other = opts
    if how == "added":
        ddp = DDP(net)
    opt.attach(ddp)
    train(ddp, opt, rank, range(2))
    train(plain, other, rank, range(2))
    assert_equal(values(net), values(plain))
    for one, by in ((net, opt), (plain, other)):
        one[0].requires_grad_(True)
        if how == "added":
            by.add_param_group({"params": list(one[0].named_parameters("0")), "lr": 0.02})
    before = values(net)
    train(ddp, opt, rank, range(2, 5))
    train(plain, other, rank, range(2, 5))
    assert_equal(values(net), values(plain))
    assert all(a != b for a, b in zip(values(net), before, strict=True)), "one never moved"


def second_optimizer(rank: int, ranks: int) -> dict[str, tuple[str, str]]:
    """Refused at once, and welcome after ``detach()``."""
    net = model()
    ddp = DDP(net)
    opt = make("lion", net)
    opt.attach(ddp)
    train(ddp, opt, rank, range(2))
    before = values(net)
    loss_of(ddp, rank, 2).backward()
    adam = torch.optim.AdamW(net.parameters(), lr=0.1)
    second = make("signum", net)
    raised = {
        "attach": raised_by(lambda: second.attach(ddp)),
        "again": raised_by(lambda: opt.attach(ddp)),
        "torch's": raised_by(adam.step),
        "pydist's": raised_by(second.step),
    }
    assert values(net) == before
    opt.step()
    train(ddp, opt, rank, range(3, 5))
    assert_replicas(net, ranks)
    # One that steps on other parameters is none of its business.
    alone = nn.Linear(2, 2)
    alone.weight.grad = torch.ones(2, 2)
    torch.optim.SGD(alone.parameters(), lr=1.0).step()
    loss_of(ddp, rank, 5).backward()  # votes that no step() will ask for
    opt.detach()
    raised["detached"] = raised_by(opt.detach)
    for _ in range(2):
        adam.zero_grad()
        loss_of(ddp, rank, 6).backward()
        adam.step()
    assert_replicas(net, ranks)  # DDP averages again
    second.attach(ddp)
    train(ddp, second, rank, range(7, 9))
    second.detach()
    with ddp.no_sync():
        train(ddp, opt, rank, range(9, 11))
    assert_replicas(net, ranks)
    return raised


# --------------------------------------------------------------------------- what is no replica


def partitions(rank: int, ranks: int, kind: str) -> list[tuple[str, str]]:
    """Of ZeRO, of a mixture of experts, of a pipeline: refused by name, nothing overwritten."""
    raised = []
    net = model()
    cls = type(make(kind, model()))
    extra = {"warmup_steps": 2} if kind == "adam" else {}
    before = values(net)
    raised.append(
        raised_by(
            lambda: ZeroRedundancyOptimizer(net.parameters(), optimizer_class=cls, lr=0.1, **extra)
        )
    )
    experts = nn.ModuleDict({"shared": nn.Linear(4, 4), "expert": nn.Linear(4, 4)})
    with torch.no_grad():
        for p in experts["shared"].parameters():
            p.copy_(torch.arange(p.numel()).view_as(p))
        for p in experts["expert"].parameters():
            p.mul_(1 + rank)
    kept = values(experts)
    raised.append(raised_by(lambda: make(kind, experts)))
    stage = nn.ModuleDict({f"stage{rank}": nn.Linear(4, 4)})
    raised.append(raised_by(lambda: make(kind, stage)))
    assert values(net) == before and values(experts) == kept
    return raised


def replicas_that_differ(rank: int, ranks: int) -> list[str]:
    """Without anything equal they were made without a seed: rank 0's, and a warning."""
    torch.manual_seed(rank)
    net = nn.Linear(4, 4)
    found = warned(lambda: make("lion", net))
    assert_replicas(net, ranks)
    return found


def swapped(rank: int, ranks: int, kind: str) -> dict[str, tuple[str, str]]:
    """Parameters put in the place of others: state goes along, or all ranks refuse."""
    net, still = model(), model()
    opt, other = make(kind, net), make(kind, still)
    train(net, opt, rank, range(3))
    train(still, other, rank, range(3))
    for module in net:
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    opt.param_groups[0]["params"] = list(net.parameters())
    train(net, opt, rank, range(3, 7))
    train(still, other, rank, range(3, 7))
    assert_equal(everything(net, opt), everything(still, other))
    raised = {}
    kept = list(net.parameters())
    for name, change in {
        "shape": lambda p: torch.zeros(p.shape[0] + 1, *p.shape[1:]),
        "values": lambda p: p.detach() + rank,
    }.items():
        new = [nn.Parameter(change(p)) for p in kept]
        for p in new:
            p.grad = torch.ones_like(p)
        opt.param_groups[0]["params"] = new
        raised[name] = raised_by(lambda: [opt.step() for _ in range(4)])  # local steps are late
        opt.param_groups[0]["params"] = kept
    opt.zero_grad()
    larger = kept[2]
    before = larger.data
    larger.data = torch.zeros(400, 70)
    larger.grad = torch.ones(400, 70)
    raised["data"] = raised_by(lambda: [opt.step() for _ in range(4)])
    larger.data, larger.grad = before, None
    return raised


def made_before_values(rank: int, ranks: int, kind: str) -> None:
    """An optimizer of a model on the meta device, whose parameters get values later."""
    with torch.device("meta"):
        net = model()
    opt = make(kind, net)
    plain = model()
    net.to_empty(device="cpu")
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(rank)  # all take over rank 0's, as in a constructor
    opt.param_groups[0]["params"] = list(net.parameters())
    other = make(kind, plain)
    train(net, opt, rank, range(1))
    assert_replicas(net, ranks)
    net.load_state_dict(model().state_dict())
    opt.load_state_dict(other.state_dict())
    train(net, opt, rank, range(4))
    train(plain, other, rank, range(4))
    assert_equal(everything(net, opt), everything(plain, other))


def sharded_later(rank: int, ranks: int, kind: str) -> None:
    """As Accelerate does: FSDP2 puts DTensors in the place of an optimizer's parameters."""
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", (2, ranks // 2), mesh_dim_names=("across", "inside")
    )
    group = mesh["across"].get_group()

    def run(late: bool) -> list[bytes]:
        net = model()
        opt = make(kind, net, group=group) if late else None
        if opt is not None:
            opt.load_state_dict(opt.state_dict())  # which makes a state of the whole parameters
        for part in (net[0], net[2], net[4], net):
            fully_shard(part, mesh=mesh["inside"])
        if opt is None:
            opt = make(kind, net, group=group)
        opt.param_groups[0]["params"] = list(net.parameters())
        train(net, opt, rank, range(3))
        return [bits(p.to_local()) for p in net.parameters()]

    assert run(True) == run(False)


# --------------------------------------------------------------------------- tools


def compiled(rank: int, ranks: int, kind: str) -> None:
    net, plain = model(), model()
    opt, other = make(kind, net), make(kind, plain)
    step = torch.compile(opt.step, backend="eager")
    for i in range(5):
        opt.zero_grad()
        loss_of(net, rank, i).backward()
        step()
    train(plain, other, rank, range(5))
    assert_equal(everything(net, opt), everything(plain, other))


def packed(rank: int, ranks: int, kind: str) -> None:
    """Frozen weights of other types in the list: left alone, and saved with the rest."""
    net, plain = model(), model()
    frozen = [
        nn.Parameter(torch.full((7,), rank, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float64)
    ]
    before = [p.clone() for p in frozen]
    usual = [nn.Parameter(torch.zeros(7), requires_grad=False) for _ in frozen]
    named, others = list(net.named_parameters()), list(plain.named_parameters())
    named[2:2] = [(f"packed{i}", p) for i, p in enumerate(frozen)]
    others[2:2] = [(f"packed{i}", p) for i, p in enumerate(usual)]  # ties hash places
    opt, other = make(kind, named), make(kind, others)
    train(net, opt, rank, range(4))
    train(plain, other, rank, range(4))
    assert_equal(values(net), values(plain))
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    train(net, opt, rank, range(4, 6))
    train(plain, other, rank, range(4, 6))
    assert_equal(values(net), values(plain))


class Writer:
    """As TensorBoard's."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written[tag] = (scalar_value, global_step)


def statistics(rank: int, ranks: int, kind: str) -> dict[str, float]:
    """Asked for at any time, from another thread too; they change nothing."""
    net, plain = model(), model()
    opt, other = make(kind, net), make(kind, plain)
    opt.stats(), opt.advice(), opt.state_dict()
    over, found = threading.Event(), []

    def ask() -> None:
        while not over.wait(0.0005):
            try:
                found.append(opt.stats())
                opt.state_dict(), opt.advice(), list(opt.state.items())
            except Exception as error:
                found.append(error)
                return

    asking = threading.Thread(target=ask)
    asking.start()
    train(net, opt, rank, range(6))
    over.set()
    asking.join()
    errors = [one for one in found if isinstance(one, Exception)]
    assert found and not errors, errors[:1]
    train(plain, other, rank, range(6))
    assert_equal(everything(net, opt), everything(plain, other))
    writer = Writer()
    opt.log(writer)
    opt.log_summary()
    stats = opt.stats()
    assert {f"pydist/{k}": (float(v), 6) for k, v in stats.items()} == writer.written
    return stats


def wrong_types(rank: int, ranks: int, kind: str) -> list[tuple[str, str]]:
    """Of one rank alone: it raises there by name, and on the others too."""
    wrong: list[dict[str, Any]] = [{"lr": "fast"}, {"weight_decay": "some"}, {"seed": "x"}]
    return [raised_by(lambda w=w: make(kind, model(), **(w if rank else {}))) for w in wrong]


def as_people_load(rank: int, ranks: int, kind: str) -> None:
    """Before the first backward, with a scheduler, and with gradients that are zeroed."""
    net = model()
    opt = make(kind, net)
    first = copy.deepcopy(opt.state_dict())
    train(net, opt, rank, range(4))
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    train(net, opt, rank, range(4, 7))

    again = model(1)
    again.load_state_dict(weights)
    other = make(kind, again, lr=0.5)
    other.load_state_dict(saved)
    other.load_state_dict(saved)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1.0)
    assert isinstance(other, DistributedLion | torch.optim.Optimizer)
    for group in other.param_groups:
        group["lr"] = 0.01
    for step in range(4, 7):
        other.zero_grad(set_to_none=False)
        loss_of(again, rank, step).backward()
        other.step()
        schedule.last_epoch += 1
    assert_equal(values(again), values(net))
    other.load_state_dict(first)
    assert all(group["step"] == 0 for group in other.param_groups)
