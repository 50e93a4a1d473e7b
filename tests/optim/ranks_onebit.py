"""What ranks do in test_onebit.py."""

from __future__ import annotations

from typing import Any

import onebit_oracle
import ranks_lion
import torch
from ranks_collectives import bits
from ranks_lion import parameters, stored
from torch import Tensor

from pydist import optim
from pydist.optim.onebit import OneBitOptimizer

SHAPES = {**ranks_lion.SHAPES, "block": (1536,)}
NAMES = list(SHAPES)
KINDS = {
    "adam": (optim.OneBitAdam, onebit_oracle.Adam),
    "zero_one": (optim.ZeroOneAdam, onebit_oracle.ZeroOne),
    "lamb": (optim.OneBitLamb, onebit_oracle.Lamb),
}


def gradient(name: str, like: Tensor, worker: int, step: int) -> Tensor:
    """Known to all ranks; some elements stay zero, some until the variance is frozen."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + NAMES.index(name))
    grad = torch.empty_like(like).copy_(torch.randn(like.shape, generator=generator))
    if name == "matrix":
        grad[:2] = 0
    if name == "block":
        grad[100 : 300 if step < 4 else 200] = 0
        grad[1024:] = 0
    return grad


def events(other: dict[str, Any], name: str, ranks: int) -> set[tuple[int, int, str]]:
    return {(s, w % ranks, n) for s, w, n in other.get(name, ())}


def everyone(
    params: dict[str, torch.nn.Parameter], rank: int, ranks: int, step: int, other: dict[str, Any]
) -> onebit_oracle.Grads:
    """All ranks' gradients of a step; this rank's own are put into place."""
    every: onebit_oracle.Grads = []
    for worker in range(ranks):
        mine: list[Any] = []
        for name, p in params.items():
            grad: Tensor | None = gradient(name, p, worker, step)
            if (step, worker, name) in events(other, "bad", ranks):
                grad[(-1,) * grad.dim()] = float("nan")
            if (step, worker, name) in events(other, "missing", ranks):
                grad = None
            mine.append(None if grad is None else stored(grad))
            if worker == rank:
                p.grad = grad
        every.append(mine)
    return every


def check_residuals(opt: OneBitOptimizer, oracle: onebit_oracle.Oracle, rank: int) -> None:
    """Residuals bit for bit, and none where nothing ever arrived."""
    residuals = opt.exchange.residuals
    for i, p in enumerate(oracle.params):
        if i in residuals.worker:
            assert stored(residuals.worker[i]).tobytes() == p.residuals[rank].tobytes(), NAMES[i]
            assert not residuals.worker[i][torch.from_numpy(p.v == 0)].any()
        if i in residuals.owner:
            share = residuals.owner[i]
            theirs = p.owner[share.first : share.last]
            assert stored(share.values).tobytes() == theirs.tobytes(), f"{NAMES[i]}: owner"


def equals_oracle(
    rank: int, ranks: int, kind: str, options: dict[str, Any], other: dict[str, Any]
) -> list[bytes]:
    """Bit-identical after every step.

    ``other``: ``dtype``, ``steps``, ``shapes``, and events (step, worker, parameter):
    ``missing`` and ``bad``.
    """
    dtype = other.get("dtype", "float32")
    shapes = other.get("shapes", SHAPES)
    params = parameters(rank, getattr(torch, dtype), shapes)
    start = [stored(p) for p in parameters(0, getattr(torch, dtype), shapes).values()]
    usual = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, **options}
    make, simulate = KINDS[kind]
    lrs = usual.pop("lrs", None)
    opt = make(params.items(), **usual)
    settings = {k: v for k, v in usual.items() if k not in ("algorithm", "codec", "residual_dtype")}
    if "residual_dtype" in usual:
        settings["residual_storage"] = str(usual["residual_dtype"])[6:]
    if "codec" in usual:
        codec = usual["codec"]
        settings["form"] = None if codec is None else codec.block_format
    if lrs is not None:
        settings["lrs"] = lrs
    oracle = simulate(start, ranks, dtype, **settings)
    for step in range(other.get("steps", 8)):
        if lrs is not None:
            opt.param_groups[0]["lr"] = lrs[step]
        every = everyone(params, rank, ranks, step, other)
        opt.step()
        oracle.step(every)
        for i, (name, p) in enumerate(params.items()):
            what = f"step {step}, {name}"
            q = oracle.params[i]
            assert stored(p).tobytes() == oracle.local(i, rank).tobytes(), what
            if opt.state[p]:
                for key, value in (("exp_avg", oracle.momentum(i, rank)), ("exp_avg_sq", q.v)):
                    ours = opt.state[p][key]
                    assert ours.stride() == p.stride() or p.numel() < 2, what
                    assert stored(ours).tobytes() == value.tobytes(), f"{what}: {key}"
        check_residuals(opt, oracle, rank)
    assert opt.skipped_steps == oracle.skipped_by(rank)
    assert oracle.skipped == other.get("skipped", len({s for s, _, _ in other.get("bad", ())}))
    return [bits(p) for p in params.values()]
