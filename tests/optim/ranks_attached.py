"""What ranks do in test_lion_ddp.py: the attached path, and errors of the optimizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from ranks_collectives import bits
from ranks_faults import raised_by, still_works
from ranks_lion import everything, loss_of, model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist.optim import DistributedLion


class Branches(torch.nn.Module):
    """Some parameters are used by some ranks in some steps, one by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = torch.nn.Linear(6, 40)
        self.left = torch.nn.Linear(40, 3)
        self.right = torch.nn.Linear(40, 3, bias=False)
        self.never = torch.nn.Linear(50, 2)
        self.empty = torch.nn.Parameter(torch.zeros(0))
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.Parameter(torch.ones(9), requires_grad=False)

    def forward(self, x: Tensor, side: str) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.scale * (self.left(x) if side == "left" else self.right(x))


class Strided(torch.nn.Module):
    """Parameters in other memory orders than the usual one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = torch.nn.Parameter(torch.randn(9, 45).t())
        self.short = torch.nn.Parameter(torch.randn(9, 2).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1)
        return x @ self.turned @ self.short.float()


def strided_loss(net: torch.nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(13 * step + rank)
    return net(torch.randn(2, 3, 5, 5, generator=generator)).square().mean()


def side_of(rank: int, step: int) -> str:
    # Steps in which all ranks go left, all right, and some each way.
    return "left" if step % 4 == 0 or (step % 4 != 1 and (rank + step) % 3 == 0) else "right"


def branch_loss(net: torch.nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(31 * step + rank)
    x = torch.randn(5, 6, generator=generator)
    return (net(x, side_of(rank, step)) - x[:, 1:4]).square().sum()


def attached_equals_plain(
    rank: int,
    ranks: int,
    options: dict[str, Any],
    ddp_options: dict[str, Any],
    kind: str,
    device: str = "cpu",
) -> list[bytes]:
    """``kind``: ``plain``, ``accumulate``, ``branches``, ``strided`` or ``not_finite``."""
    branches = kind == "branches"
    makers = {"branches": (Branches, branch_loss), "strided": (Strided, strided_loss)}
    make, loss = makers.get(kind, (model, loss_of))
    net = make().to(device)
    bare = copy.deepcopy(net)
    ddp = DDP(net, **ddp_options)
    usual = {"lr": 0.01, "weight_decay": 0.1, **options}
    attached = DistributedLion(net.named_parameters(), **usual)
    plain = DistributedLion(bare.named_parameters(), **usual)
    attached.attach(ddp)
    for step in range(7):
        attached.zero_grad(set_to_none=step % 3 != 2)
        plain.zero_grad()
        turns = 3 if kind == "accumulate" else 1
        for turn in range(turns):
            with ddp.no_sync() if turn < turns - 1 else nullcontext():
                filled_with_nan = kind == "not_finite" and step == 3 and rank == ranks - 1
                factor = float("inf") if filled_with_nan else 1.0
                (factor * loss(ddp, rank, 10 * step + turn if turns > 1 else step)).backward()
            (factor * loss(bare, rank, 10 * step + turn if turns > 1 else step)).backward()
        attached.step()
        plain.step()
        for (name, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
            assert bits(p) == bits(q), f"step {step}, {name}: parameter"
            m, n = attached.state[p].get("momentum"), plain.state[q].get("momentum")
            m, n = (torch.zeros_like(p) if x is None else x for x in (m, n))
            assert bits(m) == bits(n), f"step {step}, {name}: momentum"
    if branches:
        torch.manual_seed(4)
        fresh = Branches()
        assert torch.equal(net.never.weight, fresh.never.weight), "decayed, and nobody used it"
        assert torch.equal(net.frozen, fresh.frozen)
    assert attached.skipped_steps == plain.skipped_steps == (kind == "not_finite")
    return [bits(p) for p in net.parameters()]


# --------------------------------------------------------------------------- misuse


def attached_model(**ddp_options: Any) -> tuple[DDP, DistributedLion]:
    ddp = DDP(model(), bucket_cap_mb=0.001, **ddp_options)
    opt = DistributedLion(ddp.named_parameters(), lr=0.01)
    opt.attach(ddp)
    return ddp, opt


def one_good_step(ddp: torch.nn.Module, opt: DistributedLion, rank: int) -> None:
    """After an error: the next steps are taken, and replicas are equal."""
    before = [p.detach().clone() for p in ddp.parameters()]
    for step in range(2):
        opt.zero_grad()
        loss_of(ddp, rank, 50 + step).backward()
        opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))


def changed_gradients(rank: int, ranks: int, how: str) -> Any:
    ddp, opt = attached_model()
    start = [bits(p) for p in ddp.parameters()]
    results = []
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = loss_of(ddp, rank, 0)
    (scaler.scale(loss) if how.startswith("scaler") else loss).backward()
    if how == "clip":
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3)
    elif how == "replaced":
        for p in ddp.parameters():
            p.grad = p.grad * 2
    elif how == "scaler_unscale":
        scaler.unscale_(opt)
    step = (lambda: scaler.step(opt)) if how.startswith("scaler") else opt.step
    results.append(raised_by(step))
    assert [bits(p) for p in ddp.parameters()] == start
    one_good_step(ddp, opt, rank)
    return results[0]


def twice(rank: int, ranks: int) -> list[tuple[str, str]]:
    """Attached twice, another hook, another model, no backward, two backwards."""
    ddp, opt = attached_model()
    results = [raised_by(lambda: opt.attach(ddp))]
    results.append(raised_by(lambda: DistributedLion(ddp.named_parameters()).attach(ddp)))
    hooked = DDP(model())
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hooked.register_comm_hook(None, default_hooks.fp16_compress_hook)
    other = DistributedLion(hooked.named_parameters())
    results.append(raised_by(lambda: other.attach(hooked)))
    results.append(raised_by(lambda: other.attach(DDP(model()))))
    results.append(raised_by(lambda: other.attach(model())))  # type: ignore[arg-type]
    results.append(raised_by(opt.step))
    one_good_step(ddp, opt, rank)
    loss_of(ddp, rank, 0).backward()
    results.append(raised_by(loss_of(ddp, rank, 1).backward))
    one_good_step(ddp, opt, rank)
    return results


def plain_use_of_ddp(rank: int, ranks: int) -> list[list[str]]:
    """Which warnings a DDP model gives on the plain path: averaged, local, under no_sync."""
    given = []
    for kind in ("averaged", "local", "no_sync"):
        net = model()
        ddp = net if kind == "local" else DDP(net)
        opt = DistributedLion(net.named_parameters(), lr=0.01)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                opt.zero_grad()
                with ddp.no_sync() if kind == "no_sync" else nullcontext():
                    # The first step overflows everywhere, as under a GradScaler.
                    factor = float("inf") if step == 0 else 1.0
                    (factor * loss_of(ddp, rank, step)).backward()
                opt.step()
        given.append([str(w.message) for w in caught if "pydist" in str(w.filename)
                      or "DistributedLion" in str(w.message)])  # fmt: skip
    return given


# --------------------------------------------------------------------------- errors


def other_model(rank: int, ranks: int, what: str) -> tuple[str, str]:
    """Rank 1 has another model or other settings."""
    named: list[Any] = [("a", torch.nn.Parameter(torch.ones(4, 6))),
                        ("b", torch.nn.Parameter(torch.ones(3)))]  # fmt: skip
    options: dict[str, Any] = {"lr": 0.01}
    if rank == 1:
        changes: dict[str, Callable[[], Any]] = {
            "shape": lambda: named.__setitem__(0, ("a", torch.nn.Parameter(torch.ones(6, 4)))),
            "strides": lambda: named.__setitem__(
                0, ("a", torch.nn.Parameter(torch.ones(6, 4).t()))
            ),
            "dtype": lambda: named.__setitem__(1, ("b", torch.nn.Parameter(torch.ones(3).half()))),
            "float64": lambda: named.__setitem__(
                1, ("b", torch.nn.Parameter(torch.ones(3).double()))
            ),
            "number": lambda: named.pop(),
            "name": lambda: named.__setitem__(1, ("c", named[1][1])),
            "none": lambda: named.clear(),
            "aggregate": lambda: options.update(aggregate="average"),
            "ties": lambda: options.update(ties="zero"),
            "seed": lambda: options.update(seed=1),
            "momentum_dtype": lambda: options.update(momentum_dtype=torch.bfloat16),
            "binarization_range": lambda: options.update(binarization_range=1.0),
            "wrong_aggregate": lambda: options.update(aggregate="mode"),
            "wrong_lr": lambda: options.update(lr=-1.0),
        }
        changes[what]()
    result = raised_by(lambda: DistributedLion(named, **options))
    still_works(rank, ranks)
    return result


def other_added_group(rank: int, ranks: int, size: int, dtype: str) -> tuple[str, str]:
    first = torch.nn.Parameter(torch.ones(5))
    opt = DistributedLion([("a", first)], lr=0.1)
    added = torch.ones(size if rank else 3, dtype=getattr(torch, dtype if rank else "float32"))
    group = {"params": [("b", torch.nn.Parameter(added))]}
    result = raised_by(lambda: opt.add_param_group(group))
    assert len(opt.param_groups) == 1
    first.grad = torch.ones(5)
    opt.step()
    assert bool(first.isclose(torch.tensor(0.9)).all())
    return result


def other_buckets(rank: int, ranks: int) -> tuple[str, str]:
    """Rank 1 has one bucket where others have many: none waits for those that never come."""
    net = model()
    opt = DistributedLion(net.named_parameters(), lr=0.01)
    # Otherwise DDP begins with one bucket and then takes over rank 0's.
    cap = 25 if rank == 1 else 0.001
    ddp = DDP(net, bucket_cap_mb=cap, find_unused_parameters=True)
    opt.attach(ddp)
    loss_of(ddp, rank, 0).backward()
    result = raised_by(opt.step)
    still_works(rank, ranks)
    return result


def other_setting_in_a_step(rank: int, ranks: int, what: str, attach: bool) -> tuple[str, str]:
    """Something changes on rank 1 only; afterwards it is put right and training goes on."""
    net: torch.nn.Module = model()
    start = [bits(p) for p in net.parameters()]
    opt = DistributedLion(net.named_parameters(), lr=0.01)
    if attach:
        net = DDP(net, bucket_cap_mb=0.001)
        opt.attach(net)
    group = opt.param_groups[0]
    usual = dict(group)
    if rank == 1:
        changes: dict[str, dict[str, Any]] = {
            "lr": {"lr": 0.02}, "betas": {"betas": (0.8, 0.99)}, "step": {"step": 5},
            "weight_decay": {"weight_decay": 0.1}, "bad_lr": {"lr": float("nan")},
            "bad_betas": {"betas": (1.5, 0.9)},
        }  # fmt: skip
        group.update(changes[what])
    loss_of(net, rank, 0).backward()
    result = raised_by(opt.step)
    assert [bits(p) for p in net.parameters()] == start
    group.update(usual)
    one_good_step(net, opt, rank)
    return result


def sparse_gradient(rank: int, ranks: int, scaled: bool) -> tuple[str, str]:
    table = torch.nn.Embedding(10, 4, sparse=rank == 1)
    table.weight.data.fill_(1.0)
    opt = DistributedLion(table.named_parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    scaler.scale(table(torch.tensor([1, 2])).sum()).backward()
    result = raised_by(lambda: scaler.step(opt))
    assert bool((table.weight == 1).all())
    table.weight.grad = torch.ones(10, 4)
    opt.step()
    assert bool(table.weight.isclose(torch.tensor(0.9)).all())
    return result


def sparse_gradient_attached(rank: int, ranks: int) -> tuple[str, str]:
    net = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 2))
    ddp = DDP(net)
    opt = DistributedLion(net.named_parameters(), lr=0.1)
    opt.attach(ddp)

    def train() -> None:
        ddp(torch.tensor([rank, 2])).sum().backward()
        opt.step()

    result = raised_by(train)
    still_works(rank, ranks)
    return result


def not_finite_keeps_momenta(rank: int, ranks: int, exact: bool, attach: bool) -> list[bytes]:
    """No NaN enters a momentum; with ``exact_skip`` nothing at all changes."""
    net: torch.nn.Module = model()
    opt = DistributedLion(net.named_parameters(), lr=0.01, exact_skip=exact)
    params = list(net.parameters())
    if attach:
        net = DDP(net, bucket_cap_mb=0.001)
        opt.attach(net)
    values = [float("nan"), float("inf")]
    for step in range(6):
        opt.zero_grad()
        if step >= 2:
            before = [bits(opt.state[p]["momentum"]) for p in params]
            start = [bits(p) for p in params]
        filled_with_nan = rank == 0 and step in (2, 4)
        if filled_with_nan:
            bad = torch.full_like(params[2], values[step // 4])
            handle = params[2].register_hook(lambda grad, bad=bad: bad)
        loss_of(net, rank, step).backward()
        opt.step()
        if filled_with_nan:
            handle.remove()
        if step in (2, 4):
            assert [bits(p) for p in params] == start
            after = [bits(opt.state[p]["momentum"]) for p in params]
            changed = [a != b for a, b in zip(before, after, strict=True)]
            assert not any(changed) if exact else any(changed)
            assert not (rank == 0 and changed[2])
        for p in params:
            assert bool(opt.state[p]["momentum"].isfinite().all())
    assert opt.skipped_steps == 2
    return everything(net.module if attach else net, opt)[: len(params)]
