"""What ranks do in test_signum.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ranks_collectives import bits
from ranks_lion import gradient as lion_gradient
from ranks_lion import loss_of, model, parameters, stored, train
from signum_oracle import Oracle
from torch.nn.parallel import DistributedDataParallel

from pydist.errors import PydistError
from pydist.optim import SignSGD, Signum
from pydist.optim.voting import VotingOptimizer


def make(params: Any, beta: float | None, **options: Any) -> VotingOptimizer:
    if beta is None:
        return SignSGD(params, **options)
    return Signum(params, momentum=beta, **options)


def equals_oracle(
    rank: int, ranks: int, beta: float | None, options: dict[str, Any], other: dict[str, Any]
) -> list[bytes]:
    """Bit-identical after every step; ``missing``: (step, worker, parameter), ``bad`` too."""
    dtype = other.get("dtype", "float32")
    params = parameters(rank, getattr(torch, dtype))
    start = [stored(p) for p in parameters(0, getattr(torch, dtype)).values()]
    opt = make(params.items(), beta, lr=0.03, weight_decay=0.1, **options)
    settings = {k: v for k, v in options.items() if k != "algorithm"}
    storage = str(settings.pop("momentum_dtype", torch.float32))[6:]
    oracle = Oracle(start, ranks, 0.03, 0.1, beta, dtype, storage, **settings)
    for step in range(5):
        every: list[list[np.ndarray | None]] = []
        for worker in range(ranks):
            mine: list[np.ndarray | None] = []
            for name, p in params.items():
                grad: torch.Tensor | None = lion_gradient(name, p, worker, step)
                if (step, worker, name) in {(s, w % ranks, n) for s, w, n in other.get("bad", ())}:
                    grad[(-1,) * grad.dim()] = float("nan")
                if (step, worker, name) in {
                    (s, w % ranks, n) for s, w, n in other.get("missing", ())
                }:
                    grad = None
                mine.append(None if grad is None else stored(grad))
                if worker == rank:
                    p.grad = grad
            every.append(mine)
        opt.step()
        oracle.step(every)
        for i, (name, p) in enumerate(params.items()):
            assert stored(p).tobytes() == oracle.values[i].tobytes(), f"step {step}, {name}"
            if beta is None:
                assert not opt.state[p]
            elif "momentum" in opt.state[p]:
                ours, theirs = stored(opt.state[p]["momentum"]), oracle.momenta[rank][i]
                assert ours.tobytes() == theirs.tobytes(), f"step {step}, {name}: momentum"
    assert opt.skipped_steps == oracle.skipped == len({s for s, _, _ in other.get("bad", ())})
    return [bits(p) for p in params.values()]


def attached(rank: int, ranks: int, beta: float | None) -> list[bytes]:
    """Votes during backward give the bits of votes in step(), and torch.save resumes them."""
    plain, ddp = model(), DistributedDataParallel(model(), bucket_cap_mb=0.001)
    opt = make(plain.named_parameters(), beta, lr=0.01)
    other = make(ddp.module.named_parameters(), beta, lr=0.01)
    other.attach(ddp)
    for step in range(4):
        for net, o in ((plain, opt), (ddp, other)):
            o.zero_grad()
            loss_of(net, rank, step).backward()
            o.step()
    assert [bits(p) for p in plain.parameters()] == [bits(p) for p in ddp.parameters()]
    again = model(3)
    resumed = make(again.named_parameters(), beta, lr=0.5)
    again.load_state_dict(plain.state_dict())
    resumed.load_state_dict(opt.state_dict())
    train(plain, opt, rank, range(4, 7))
    train(again, resumed, rank, range(4, 7))
    assert [bits(p) for p in plain.parameters()] == [bits(p) for p in again.parameters()]
    return [bits(p) for p in plain.parameters()]


def disagree(rank: int, ranks: int, beta: float | None) -> list[str]:
    """What every rank reads where one has another setting, another rate, a bad value."""
    texts = []
    p = torch.nn.Parameter(torch.ones(5))
    calls: list[Any] = [
        lambda: make([p], beta, seed=int(rank == 1)),
        lambda: make([p], beta, lr=-1.0 if rank == 1 else 0.1),
        lambda: SignSGD([p]) if rank == 1 else Signum([p]),
    ]
    for call in calls:
        try:
            call()
        except (PydistError, ValueError) as error:
            texts.append(str(error))
    opt = make([p], beta)
    p.grad = torch.ones(5)
    opt.param_groups[0]["lr"] = 0.1 + rank
    try:
        opt.step()
    except PydistError as error:
        texts.append(str(error))
    return texts
