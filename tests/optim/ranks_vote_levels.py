"""What ranks do in test_vote_levels.py: votes on two levels beside those on one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_faults import raised_by
from ranks_hierarchy import levels
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist.optim import DistributedLion, SignSGD, Signum
from pydist.transport import exchange

KINDS: dict[str, Any] = {
    "lion": lambda p, **o: DistributedLion(p, lr=0.01, weight_decay=0.1, **o),
    "signum": lambda p, **o: Signum(p, lr=0.01, **o),
    "sign_sgd": lambda p, **o: SignSGD(p, lr=0.01, **o),
}
SHAPES = [(40, 33), (33,), (1,), (0,), (7, 5, 3), (1001,), (31,)]


class Given(nn.Module):
    """Parameters whose gradients are what the forward pass is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = nn.ParameterList(torch.randn(shape).to(dtype) for shape in SHAPES)

    def forward(self, given: list[Tensor | None]) -> Any:
        pairs = zip(self.parts, given, strict=True)
        return sum((p * g).sum() for p, g in pairs if g is not None)


def gradients(rank: int, step: int, dtype: torch.dtype, bad: bool) -> list[Tensor | None]:
    """Many ties and zeros; some ranks lack some, one parameter is used by nobody at first."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    given: list[Tensor | None] = [
        torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in SHAPES
    ]
    if rank % 2:
        given[1] = None
    if step < 2:
        given[4] = None
    whole = given[0]
    assert whole is not None
    if bad and step == 1 and rank == 3:
        whole[0, 0] = float("nan")
    return given


def state_of(net: nn.Module, optimizer: Any) -> list[Any]:
    kept = [optimizer.state[p] for p in net.parameters() if p in optimizer.state]
    momenta = [bits(entry["momentum"]) for entry in kept if "momentum" in entry]
    return [[bits(p) for p in net.parameters()], momenta, optimizer.skipped_steps]


def equals_one_level(rank: int, ranks: int, local: int, cases: list[tuple[Any, ...]]) -> list[Any]:
    """Weights, momenta and skipped steps, step by step.

    Cases: the optimizer, its options, the weights' dtype, attached or not, bytes of a chunk.
    """
    mesh, results = levels(ranks, local), []
    usual = exchange.CHUNK_BYTES
    for name, options, dtype_name, attached, chunk in cases:
        where, dtype = f"{name} {options} {attached}", getattr(torch, dtype_name)
        nets = [Given(dtype) for _ in range(2)]
        made = [KINDS[name](nets[0].named_parameters(), **options)]
        made.append(KINDS[name](nets[1].named_parameters(), mesh=mesh, **options))
        models: list[Any] = list(nets)
        if attached:
            models = [DDP(net, bucket_cap_mb=0.004, find_unused_parameters=True) for net in nets]
            for one, model in zip(made, models, strict=True):
                one.attach(model)
        exchange.CHUNK_BYTES = chunk or usual
        try:
            for step in range(4):
                for model, one in zip(models, made, strict=True):
                    one.zero_grad()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model(gradients(rank, step, dtype, bad=not attached)).backward()
                        one.step()
                found = [state_of(*pair) for pair in zip(nets, made, strict=True)]
                assert found[0] == found[1], f"{where}, step {step}"
        finally:
            exchange.CHUNK_BYTES = usual
        stats = made[1].stats()
        assert stats["wire_bytes_inside"] > 0 and made[0].stats()["wire_bytes_inside"] == 0
        results.append(found[1])
        for one in made if attached else ():
            one.detach()
    return results


def sends_less(rank: int, ranks: int, local: int) -> list[float]:
    """Bytes between nodes: on one level, and on two, in all by the ranks of a node."""
    mesh, sent = levels(ranks, local), []
    for options in ({"algorithm": "two_phase"}, {"algorithm": "two_phase", "mesh": mesh}):
        net = nn.Linear(500, 400)
        optimizer = DistributedLion(net.named_parameters(), lr=0.1, **options)
        net.weight.grad, net.bias.grad = (torch.randn_like(p) for p in net.parameters())
        optimizer.step()
        stats = optimizer.stats()
        sent.append(stats["wire_bytes"] - stats["wire_bytes_inside"])
    return sent


def differs(rank: int, ranks: int, who: int) -> list[Any]:
    """A rank with another learning rate: all raise, nothing has changed, the groups go on."""
    mesh, net = levels(ranks, 2), Given(torch.float32)
    optimizer = DistributedLion(net.named_parameters(), lr=0.1, mesh=mesh)

    def step() -> None:
        net(gradients(rank, 3, torch.float32, bad=False)).backward()
        optimizer.step()

    step()
    before = state_of(net, optimizer)
    optimizer.param_groups[0]["lr"] = 0.2 if rank == who else 0.1
    found = [raised_by(step)]
    assert state_of(net, optimizer) == before
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    step()
    other = (dist.new_group([0, 1]), dist.new_group([2, 3]))[rank // 2]
    for options in ({"levels": "gradients"}, {"mesh": (other, other)}, {"mesh": "nodes"}):
        found.append(raised_by(lambda: DistributedLion(net.named_parameters(), **options)))  # noqa: B023
    again = copy.deepcopy(optimizer)  # it finds nodes itself: here one level
    optimizer.zero_grad()
    step()
    wanted = [bits(p) for p in net.parameters()]
    for p, q in zip(again.param_groups[0]["params"], net.parameters(), strict=True):
        p.grad = q.grad
    again.step()
    assert [bits(p) for p in again.param_groups[0]["params"]] == wanted
    return found


def only_one_has_a_mesh(rank: int, ranks: int) -> Any:
    """Compared before anyone waits for the groups."""
    mesh, net = levels(ranks, 2), Given(torch.float32)
    options: dict[str, Any] = {"levels": "votes", "mesh": mesh if rank == 0 else None}
    return raised_by(lambda: DistributedLion(net.named_parameters(), **options))
