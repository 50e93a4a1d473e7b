"""What ranks do in test_lion.py: the plain path of DistributedLion."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from lion_oracle import Oracle, Param
from ranks_collectives import bits
from torch import Tensor

from pydist.optim import DistributedLion

SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (1001,), "none": (0,), "one": (1,), "scalar": (), "matrix": (7, 5),
    "transposed": (9, 4), "channels_last": (2, 3, 4, 4), "block": (64,),
}  # fmt: skip
NAMES = list(SHAPES)


def parameters(
    rank: int, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, torch.nn.Parameter]:
    """Different on every rank, so that the broadcast at the start is tested too."""
    generator = torch.Generator().manual_seed(100 + rank)
    params = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator).to(dtype)
        if name == "transposed":
            x = x.t().contiguous().t()
        if name == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        params[name] = torch.nn.Parameter(x)
    return params


def stored(x: Tensor) -> np.ndarray:
    """Values in memory order, as float32."""
    x = x.detach()
    flat = x.as_strided((x.numel(),), (1,)).cpu() if x.numel() else x.cpu().reshape(-1)
    return flat.float().numpy().copy()


def gradient(name: str, like: Tensor, worker: int, step: int) -> Tensor:
    """Few levels: zeros are common, and so are ties. Known to all ranks."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + NAMES.index(name))
    levels = torch.tensor([-1.0, -0.25, 0.0, 0.0, 0.25, 1.0])
    x = levels[torch.randint(len(levels), tuple(like.shape), generator=generator)]
    grad = torch.empty_like(like)
    return grad.copy_(x)


def groups(named: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    items = list(named.items())
    return [
        {"params": items[:3], "lr": 0.03, "betas": (0.95, 0.98), "weight_decay": 0.1},
        {"params": items[3:5]},
        {"params": items[5:], "lr": 0.002, "betas": (0.5, 0.9), "weight_decay": 0.0},
    ]


def equals_oracle(
    rank: int, ranks: int, options: dict[str, Any], other: dict[str, Any]
) -> list[bytes]:
    """Trains with the optimizer and in the simulation; bit-identical after every step.

    ``other``: ``dtype``, ``device``, ``groups`` and events by step: ``missing`` (step, worker,
    parameter), ``bad`` (step, worker, parameter, value), ``strided``: gradients in another memory
    order.
    """
    dtype = getattr(torch, other.get("dtype", "float32"))
    params = {
        name: torch.nn.Parameter(p.detach().to(other.get("device", "cpu")))
        for name, p in parameters(rank, dtype).items()
    }
    start = {name: stored(p) for name, p in parameters(0, dtype).items()}
    usual = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.05}
    argument: Any = groups(params) if other.get("groups") else params.items()
    momentum_dtype = getattr(torch, options.pop("momentum_dtype", "float32"))
    opt = DistributedLion(argument, momentum_dtype=momentum_dtype, **usual, **options)
    oracle_params = []
    for group in opt.param_groups:
        for p in group["params"]:
            name = next(n for n, q in params.items() if q is p)
            rates = (group["lr"], group["betas"], group["weight_decay"])
            oracle_params.append(Param(start[name], str(dtype)[6:], *rates))
    settings = {k: v for k, v in options.items() if k != "algorithm"}
    oracle = Oracle(oracle_params, ranks, momentum_storage=str(momentum_dtype)[6:], **settings)
    for step in range(other.get("steps", 6)):
        every: list[list[np.ndarray | None]] = []
        for worker in range(ranks):
            mine: list[np.ndarray | None] = []
            for name, p in params.items():
                grad: Tensor | None = gradient(name, p, worker, step)
                for s, w, n, value in other.get("bad", ()):
                    if (s, w % ranks, n) == (step, worker, name):
                        grad[(-1,) * grad.dim()] = float(value)
                gone = {(s, w % ranks, n) for s, w, n in other.get("missing", ())}
                if (step, worker, name) in gone:
                    grad = None
                mine.append(None if grad is None else stored(grad))
                if worker == rank:
                    p.grad = grad if grad is None or not other.get("strided") else grad.contiguous()
            every.append(mine)
        opt.step()
        oracle.step(every)
        for name, p, q in zip(params, params.values(), oracle.params, strict=True):
            what = f"step {step}, {name}"
            assert stored(p).tobytes() == q.value.tobytes(), f"{what}: parameter"
            momentum = opt.state[p]["momentum"]
            assert momentum.stride() == p.stride() or p.numel() < 2
            assert stored(momentum).tobytes() == q.momenta[rank].tobytes(), f"{what}: momentum"
    assert opt.skipped_steps == oracle.skipped
    return [bits(p) for p in params.values()]


# --------------------------------------------------------------------------- as any optimizer


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 33), torch.nn.GELU(), torch.nn.Linear(33, 20), torch.nn.Tanh(),
        torch.nn.Linear(20, 3),
    ).to(dtype)  # fmt: skip


def loss_of(net: torch.nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    dtype = next(net.parameters()).dtype
    x = torch.randn(8, 6, generator=generator).to(next(net.parameters()).device, dtype)
    return (net(x).float() - x[:, :3].float()).square().mean()


def train(net: torch.nn.Module, opt: Any, rank: int, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(net, rank, step).backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


def everything(net: torch.nn.Module, opt: DistributedLion) -> list[bytes]:
    params = list(net.parameters())
    return [bits(p) for p in params] + [bits(opt.state[p]["momentum"]) for p in params]


def resume(rank: int, ranks: int, dtype: str, options: dict[str, Any]) -> None:
    """Ten steps at once equal five, a checkpoint through torch.save, and five."""

    def new(seed: int) -> tuple[torch.nn.Module, DistributedLion, Any]:
        net = model(seed, getattr(torch, dtype))
        opt = DistributedLion(net.named_parameters(), lr=0.01, weight_decay=0.1, **options)
        return net, opt, torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)

    net, opt, scheduler = new(0)
    train(net, opt, rank, range(5), scheduler)
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    train(net, opt, rank, range(5, 10), scheduler)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, opt_again, scheduler_again = new(1)
    again.load_state_dict(saved[0])
    opt_again.load_state_dict(saved[1])
    scheduler_again.load_state_dict(saved[2])
    for p in again.parameters():
        assert opt_again.state[p]["momentum"].dtype == options.get("momentum_dtype", torch.float32)
    train(again, opt_again, rank, range(5, 10), scheduler_again)
    assert everything(net, opt) == everything(again, opt_again)
    assert opt.param_groups[0]["step"] == opt_again.param_groups[0]["step"] == 10


def schedulers(rank: int, ranks: int) -> None:
    torch_schedulers = torch.optim.lr_scheduler
    makers: list[Any] = [
        lambda opt: torch_schedulers.StepLR(opt, 2, 0.1),
        lambda opt: torch_schedulers.OneCycleLR(opt, 0.02, total_steps=8),
        lambda opt: torch_schedulers.LambdaLR(opt, lambda step: 1 / (1 + step)),
        lambda opt: torch_schedulers.CosineAnnealingLR(opt, 8),
    ]
    for make in makers:
        x = torch.nn.Parameter(torch.zeros(50))
        opt = DistributedLion([x], lr=0.01)
        scheduler = make(opt)
        way = 0.0
        for _ in range(6):
            x.grad = torch.ones(50)
            way += opt.param_groups[0]["lr"]
            opt.step()
            scheduler.step()
        assert bool(x.isclose(torch.tensor(-way)).all()), (x[0], way)


def closure_and_tensor_lr(rank: int, ranks: int) -> list[bytes]:
    net = model()
    opt = DistributedLion(net.named_parameters(), lr=torch.tensor(0.01))  # type: ignore[arg-type]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, rank, 0)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert opt.step(lambda: 3.0) == 3.0
    return [bits(p) for p in net.parameters()]


def added_group(rank: int, ranks: int) -> list[bytes]:
    first, second = torch.nn.Parameter(torch.ones(40)), torch.nn.Parameter(torch.randn(40))
    opt = DistributedLion([("first", first)], lr=0.01)
    for step in range(6):
        if step == 3:
            opt.add_param_group({"params": [("second", second)], "lr": 0.1})
        first.grad = torch.full((40,), 1.0)
        second.grad = torch.full((40,), -1.0)
        start = second.detach().clone()
        opt.step()
        moved = 0.1 if step >= 3 else 0.0
        assert bool((second - start).isclose(torch.tensor(moved), atol=1e-6).all())
    try:
        opt.add_param_group({"params": [("first", first)]})
        raise AssertionError("a parameter was taken twice")
    except ValueError:
        assert len(opt.param_groups) == 2
    opt.step()
    return [bits(first), bits(second)]


def frozen(rank: int, ranks: int) -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    start = net[0].weight.clone()
    opt = DistributedLion(net.named_parameters(), lr=0.01, weight_decay=0.5)
    train(net, opt, rank, range(3))
    assert torch.equal(net[0].weight, start)
    assert not bool(opt.state[net[0].weight]["momentum"].any())


def scaler(
    rank: int, ranks: int, unscale: bool, momentum: bool, device: str = "cpu"
) -> list[bytes]:
    """An overflow on one rank skips the step on all of them; nobody waits for ever."""
    net = model().to(device)
    plain = model().to(device)
    opt = DistributedLion(net.named_parameters(), lr=0.01, exact_skip=momentum)
    other = DistributedLion(plain.named_parameters(), lr=0.01, exact_skip=momentum)
    scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=1024.0)
    for step in range(6):
        before = [bits(p) for p in net.parameters()]
        for o in (opt, other):
            o.zero_grad()
        scaler.scale(loss_of(net, rank, step)).backward()
        loss_of(plain, rank, step).backward()
        if step == 2 and rank == ranks - 1:
            net[2].weight.grad[0, 0] = float("inf")
            plain[2].weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(opt)
            for each in (net, plain):
                torch.nn.utils.clip_grad_norm_(each.parameters(), 1e9)
        scaler.step(opt)
        scaler.update()
        other.step()
        if step == 2:
            assert [bits(p) for p in net.parameters()] == before
            assert opt.skipped_steps == 1
    assert opt.skipped_steps == other.skipped_steps == 1
    assert scaler.get_scale() == (512.0 if rank == ranks - 1 else 1024.0)
    # Scales are powers of two, so they leave no trace.
    assert everything(net, opt) == everything(plain, other)
    return [bits(p) for p in net.parameters()]


def clipped(rank: int, ranks: int) -> list[bytes]:
    net = model()
    opt = DistributedLion(net.named_parameters(), lr=0.01)
    for step in range(4):
        opt.zero_grad()
        (1000 * loss_of(net, rank, step)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        opt.step()
    for p in net.parameters():
        assert float(opt.state[p]["momentum"].norm()) < 0.5
    return [bits(p) for p in net.parameters()]


def mixed_instruction_sets(rank: int, ranks: int, aggregate: str) -> tuple[str, list[bytes]]:
    from pydist import _C

    net = model()
    opt = DistributedLion(
        net.named_parameters(), lr=0.005, weight_decay=0.1, aggregate=aggregate,
        momentum_dtype=torch.bfloat16 if aggregate == "average" else torch.float32,
    )  # fmt: skip
    train(net, opt, rank, range(20))
    return _C.current_isa(), [bits(p) for p in net.parameters()]
