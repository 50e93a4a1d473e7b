"""What ranks do in test_onebit_use.py: the 1-bit optimizers as any optimizer."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_lion import loss_of, model, stored, train
from ranks_onebit import KINDS
from torch import Tensor

import pydist
from pydist.errors import PydistError
from pydist.optim import OneBitAdam, ZeroOneAdam
from pydist.optim.onebit import OneBitOptimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"warmup_steps": 3},
    "lamb": {"warmup_steps": 3, "weight_decay": 0.1},
    "zero_one": {
        "var_freeze_step": 3, "var_update_scaler": 2, "local_step_scaler": 2,
        "local_step_clipper": 4,
    },
}  # fmt: skip


def make(kind: str, params: Any, **options: Any) -> OneBitOptimizer:
    return KINDS[kind][0](params, **{"lr": 0.01, **SETTINGS[kind], **options})


def everything(net: torch.nn.Module, opt: OneBitOptimizer) -> list[bytes]:
    """Parameters, momenta, residuals."""
    found = [bits(p) for p in net.parameters()]
    for p in net.parameters():
        found += [bits(opt.state[p][key]) for key in ("exp_avg", "exp_avg_sq")]
    residuals = opt.exchange.residuals
    found += [stored(residuals.worker[i]).tobytes() for i in sorted(residuals.worker)]
    found += [stored(residuals.owner[i].values).tobytes() for i in sorted(residuals.owner)]
    return found


def resume(rank: int, ranks: int, kind: str, dtype: str, options: dict[str, Any]) -> None:
    """Twelve steps at once equal some, a checkpoint through torch.save, and the rest."""
    for until in (2, 5, 8):  # in the warm-up; compressed; for 0/1 Adam between two syncs, too

        def new(seed: int) -> tuple[torch.nn.Module, OneBitOptimizer]:
            net = model(seed, getattr(torch, dtype))
            return net, make(kind, net.named_parameters(), **options)

        net, opt = new(0)
        train(net, opt, rank, range(until))
        file = io.BytesIO()
        torch.save([net.state_dict(), opt.state_dict()], file)
        train(net, opt, rank, range(until, 12))
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again, opt_again = new(1)
        again.load_state_dict(saved[0])
        opt_again.load_state_dict(saved[1])
        assert opt_again.param_groups[0]["step"] == until
        train(again, opt_again, rank, range(until, 12))
        assert everything(net, opt) == everything(again, opt_again), until
        assert opt.skipped_steps == opt_again.skipped_steps


def unsent(opt: OneBitOptimizer, ordinal: int) -> Tensor:
    """What would still come into a mean: worker residuals' mean, and owners' residuals."""
    held = opt.exchange.residuals
    total = held.worker[ordinal].double() / opt.communicator.world_size
    share = held.owner.get(ordinal)
    if share is not None and (not share.whole or opt.communicator.rank == 0):
        total[share.first : share.last] += share.values.double()
    dist.all_reduce(total, group=opt.communicator.first)
    return total


def save_for_another_world(rank: int, ranks: int, kind: str) -> tuple[Any, Any, list[np.ndarray]]:
    """This rank's checkpoint after seven steps, and what all ranks had not sent."""
    net = model()
    opt = make(kind, net.named_parameters(), algorithm="two_phase")
    train(net, opt, rank, range(7))
    mass = [unsent(opt, i).numpy() for i in range(len(list(net.parameters())))]
    return net.state_dict(), opt.state_dict(), mass


def load_of_another_world(
    rank: int, ranks: int, kind: str, saved: list[tuple[Any, Any, list[np.ndarray]]]
) -> list[bytes]:
    """The unsent mass and the momenta's mean are those of the old world; training goes on."""
    net = model(5)
    opt = make(kind, net.named_parameters(), algorithm="two_phase")
    try:
        opt.load_state_dict(saved[0][1] if rank else saved[1][1])
        raise AssertionError("another rank's state was taken")
    except ValueError as error:
        assert "give the states of all" in str(error)
    net.load_state_dict(saved[0][0])
    opt.load_state_dict([state for _, state, _ in saved])
    for i, p in enumerate(net.parameters()):
        now = unsent(opt, i).numpy()
        # Sums and quotients in float32.
        assert np.allclose(now, saved[0][2][i], rtol=1e-5, atol=1e-8), i
        momenta = [state["state"][i]["exp_avg"] for _, state, _ in saved]
        if isinstance(momenta[0], dict):  # those of local steps differ by rank
            momenta = [one[f"rank {r} of {len(saved)}"] for r, one in enumerate(momenta)]
        mean = sum(m.double() for m in momenta) / len(momenta)
        assert torch.allclose(opt.state[p]["exp_avg"].double(), mean, rtol=1e-6, atol=0)
    train(net, opt, rank, range(7, 13))
    return [bits(p) for p in net.parameters()]


def scaler(rank: int, ranks: int, kind: str) -> list[bytes]:
    """A scaled loss with an overflow on one rank gives the bits of an unscaled one with a NaN."""
    net, plain = model(), model()
    opt, other = (make(kind, each.named_parameters()) for each in (net, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(9):
        for o in (opt, other):
            o.zero_grad()
        scaler.scale(loss_of(net, rank, step)).backward()
        loss_of(plain, rank, step).backward()
        if step == 4 and rank == ranks - 1:
            net[2].weight.grad[0, 0] = float("inf")
            plain[2].weight.grad[0, 0] = float("nan")
        before = everything(net, opt) if step else None
        scaler.step(opt)
        scaler.update()
        other.step()
        if step == 4:
            assert everything(net, opt) == before
            assert opt.skipped_steps == other.skipped_steps == 1
    # Scales are powers of two, so they leave no trace.
    assert everything(net, opt) == everything(plain, other)
    return [bits(p) for p in net.parameters()]


def groups_and_closure(rank: int, ranks: int, kind: str) -> list[bytes]:
    """Groups have rates of their own; one that is added warms up by itself."""
    net, late = model(), torch.nn.Parameter(torch.full((40,), float(rank)))
    halves = list(net.named_parameters())
    groups = [{"params": halves[:2], "lr": 0.02}, {"params": halves[2:], "weight_decay": 0.2}]
    opt = make(kind, groups, **({"var_freeze_step": 6} if kind == "zero_one" else {}))
    rates = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    losses = []
    for step in range(12):
        if step == 5:
            opt.add_param_group({"params": [("late", late)], "lr": 0.1})
            assert not late.detach().any()  # rank 0's

        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(net, rank, 0) + (late - 3).square().sum()
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
        rates.step()
    assert losses[-1] < losses[5]
    assert bool((late > 0).all())
    return [bits(p) for p in net.parameters()] + [bits(late)] if kind != "zero_one" else []


def unused_stays(rank: int, ranks: int, kind: str) -> None:
    """A parameter that no rank uses in compressed steps keeps everything."""
    net = model()
    opt = make(kind, net.named_parameters(), **({"local_step_clipper": 1} if "_" in kind else {}))
    train(net, opt, rank, range(5))
    param, state = net[0].bias, dict(opt.state[net[0].bias])
    kept = [bits(param), bits(state["exp_avg"]), bits(opt.exchange.residuals.worker[1])]
    for step in range(5, 8):
        opt.zero_grad()
        loss_of(net, rank, step).backward()
        param.grad = None
        opt.step()
    now = opt.state[param]["exp_avg"]
    assert kept == [bits(param), bits(now), bits(opt.exchange.residuals.worker[1])]


# --------------------------------------------------------------------------- against others


def warmup_equals_adamw(rank: int, ranks: int, kind: str) -> None:
    """The warm-up is torch's AdamW on the mean of the gradients.

    Every operation rounds to float32 once here and there, in other order: about ten roundings a
    step and element, relative to an update of lr, over twenty steps.
    """
    net, reference = model(), model()
    freeze = {"warmup_steps": 99} if kind == "adam" else {"var_freeze_step": 99}
    if kind == "zero_one":
        freeze["var_update_scaler"] = 99
    opt = make(kind, net.named_parameters(), lr=0.01, weight_decay=0.1, **freeze)
    adam = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(20):
        for each, o in ((net, opt), (reference, adam)):
            o.zero_grad()
            loss_of(each, rank, step).backward()
        for p in reference.parameters():
            dist.all_reduce(p.grad, group=opt.communicator.first)
            p.grad /= ranks
        opt.step()
        adam.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert float((p - q).abs().max()) < 20 * 10 * 2**-23 * (0.01 + float(q.abs().max()))


def converges(rank: int, ranks: int, kind: str) -> float:
    """Final loss over that of uncompressed momenta, of a regression with noise."""
    losses = []
    for codec in (pydist.Sign("l2"), None):
        net = model(7)
        settings: dict[str, Any] = {"warmup_steps": 40}
        if kind == "zero_one":
            settings = {"var_freeze_step": 40, "local_step_scaler": 60, "local_step_clipper": 4}
        opt = make(kind, net.named_parameters(), codec=codec, **settings)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 300)
        for step in range(300):
            opt.zero_grad()
            loss_of(net, rank, step).backward()
            opt.step()
            rates.step()
        with torch.no_grad():
            losses.append(sum(float(loss_of(net, 10_000, i)) for i in range(50)) / 50)
    return losses[0] / losses[1]


def bytes_sent(rank: int, ranks: int, dtype: str) -> tuple[list[int], list[int]]:
    """Payload bytes of every step of 1-bit Adam and of 0/1 Adam."""
    found = []
    for kind in ("adam", "zero_one"):
        p = torch.nn.Parameter(torch.zeros(2**16, dtype=getattr(torch, dtype)))
        opt = make(kind, [p], algorithm="two_phase")
        counts, sent = [], opt.communicator.traffic.bytes_sent
        for _ in range(10):
            before = sent["phase 1"] + sent["phase 2"]
            p.grad = torch.ones_like(p) * (1 + rank)
            opt.step()
            counts.append(sent["phase 1"] + sent["phase 2"] - before)
        found.append(counts)
    return found[0], found[1]


# --------------------------------------------------------------------------- errors


def raised(call: Any) -> str:
    try:
        call()
    except (PydistError, ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return "nothing"


def disagree(rank: int, ranks: int, kind: str) -> list[str]:
    """What every rank reads where one has another setting or an argument out of range."""
    p = torch.nn.Parameter(torch.ones(5))
    odd = rank == 1
    texts = [
        raised(lambda: make(kind, [p], codec=pydist.Sign("l1" if odd else "l2"))),
        raised(lambda: make(kind, [p], eps=0.0 if odd else 1e-8)),
        raised(lambda: make(kind, [p], codec=pydist.QSGD(2) if odd else pydist.QSGD(4))),
        raised(lambda: make("lamb" if odd and kind != "lamb" else "adam", [p])),
        raised(lambda: make(kind, [torch.nn.Parameter(torch.ones(5 + rank))])),
    ]
    opt = make(kind, [p])
    p.grad = torch.ones(5)
    opt.param_groups[0]["lr"] = 0.1 + rank
    texts.append(raised(opt.step))
    opt.param_groups[0]["lr"] = 0.1
    opt.step()
    p.grad = torch.ones(5).to_sparse() if odd else torch.ones(5)
    texts.append(raised(opt.step))
    return texts


def late_problem(rank: int, ranks: int) -> list[str]:
    """What went wrong on one rank in a local step is raised by all ranks at the next sync."""
    p = torch.nn.Parameter(torch.ones(5))
    opt = ZeroOneAdam(
        [("p", p)], lr=0.1, var_freeze_step=1, local_step_scaler=1, local_step_clipper=4
    )
    texts = []
    for step in range(10):  # syncs in steps 1, 5 and 9
        sparse = step == 7 and rank == 1
        p.grad = torch.ones(5).to_sparse() if sparse else torch.ones(5)
        texts.append(raised(opt.step))
    assert opt.interval == 4
    texts.append(
        raised(
            lambda: opt.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(1)))]})
        )
    )
    return texts


def no_never_touched_drift(rank: int, ranks: int) -> None:
    """Rows that get no gradient neither move nor collect residuals, though signs know no zero."""
    table = torch.nn.Parameter(torch.ones(64, 32))
    opt = OneBitAdam([table], lr=0.1, warmup_steps=2, algorithm="two_phase")
    for step in range(20):
        grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(step + 100 * rank))
        grad[7:40] = 0
        table.grad = grad
        opt.step()
    assert bool((table[7:40] == 1).all())
    assert not bool((table[40:] == 1).any())
    assert not bool(opt.exchange.residuals.worker[0].view(64, 32)[7:40].any())
