"""What ranks do in test_fsdp_faults.py: how other people's tools use sharded models."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_faults import raised_by
from ranks_fsdp import Net, loss_of, sharded
from ranks_fsdp_state import train
from ranks_hook_damage import loads_or_not
from ranks_hook_faults import COPIES, Reader, getters_of, read_all
from ranks_hook_use import Fabric, compiled, fabric_known
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from pydist import QSGD, Sign, fsdp
from pydist.fsdp.private import groups_of
from pydist.fsdp.sharded import _LAYOUTS

OPTIONS: dict[str, Any] = {"min_numel": 100, "error_feedback": True}


def setup(kind: str) -> Any:
    """A sharded model, its state and optimizer; of FSDP1 or FSDP2."""
    net = Net()
    if kind == "fsdp1":
        held: nn.Module = FullyShardedDataParallel(
            net, use_orig_params=True, device_id=torch.device("cpu")
        )
    else:
        held = sharded(net)
    state = fsdp.compress(held, QSGD(4, block=64), **OPTIONS)
    return held, state, torch.optim.SGD(held.parameters(), lr=0.01)


def weights(net: nn.Module) -> list[bytes]:
    """This rank's shards."""
    return [bits(getattr(p, "_local_tensor", p).detach()) for p in net.parameters()]


def kept(state: Any) -> dict[str, Any]:
    """Residuals by name."""
    return {
        name: {k: bits(x) if isinstance(x, Tensor) else x for k, x in entry.items()}
        for name, entry in state.state_dict()["parameters"].items()
    }


def read_in_backward(state: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    """As a forward hook: getters are called once backward comes by."""
    output.register_hook(functools.partial(read_all, state))


def read_meanwhile(rank: int, ranks: int, kind: str) -> None:
    """Readers in another thread, and in the middle of backward, change nothing."""
    results = []
    for read in (False, True):
        net, state, opt = setup(kind)
        if not read:
            train(net, opt, rank, range(5))
        else:
            inner = next(m for m in net.modules() if isinstance(m, Net))
            handle = inner.head.register_forward_hook(functools.partial(read_in_backward, state))
            with Reader(*getters_of(state)) as reader:
                train(net, opt, rank, range(5))
            handle.remove()
            assert reader.error is None and reader.rounds, reader.error
        results.append((weights(net), kept(state)))
    assert results[0] == results[1]


def copied(rank: int, ranks: int, kind: str) -> None:
    """A copy's state goes into the state of a model like the original, and goes on the same."""
    net, state, opt = setup(kind)
    train(net, opt, rank, range(3))
    copies = {name: f(state) for name, f in COPIES.items()}
    other, again, _ = setup(kind)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    again.load_state_dict(copies["pickle"].state_dict())
    assert all(
        kept(one) == kept(state) and one.stats()["step"] == state.step for one in copies.values()
    )
    train(net, opt, rank, range(3, 5))
    train(other, torch.optim.SGD(other.parameters(), lr=0.01), rank, range(3, 5))
    assert weights(other) == weights(net) and kept(again) == kept(state)


def damaged_states(rank: int, ranks: int, trials: int) -> None:
    """No damaged state is taken, and none changes anything."""
    net, state, opt = setup("fsdp2")
    train(net, opt, rank, range(2))
    loads_or_not(state, trials, rank)
    train(net, opt, rank, range(2, 4))


def poisoned(rank: int, ranks: int, kind: str) -> None:
    """One NaN in a residual is dropped, counted and named, and training goes on."""
    net, state, opt = setup(kind)
    train(net, opt, rank, range(2))
    ordinal = state.parameters.ordinal_of("stem.weight")
    before = weights(net)
    if rank == 1:
        state.residuals.worker[ordinal][3] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 6):
            opt.zero_grad()
            loss_of(net, rank, step).backward()
            finite = [bool(getattr(p.grad, "_local_tensor", p.grad).isfinite().all())
                      for p in net.parameters() if p.grad is not None]  # fmt: skip
            good = torch.tensor(float(all(finite)))
            dist.all_reduce(good, op=dist.ReduceOp.MIN)
            if good:
                opt.step()
    assert weights(net) != before
    assert all(bool(x.isfinite().all()) for x in state.residuals.tensors())
    dropped = state.stats()["gradients"]["damage_dropped"]
    assert dropped == ({"stem.weight": 1} if rank == 1 else {}), dropped
    assert any("stem.weight" in str(one.message) for one in caught) == (rank == 1)


class Experts(nn.Module):
    """Another set of parameters has a gradient in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor, use: list[int]) -> Tensor:
        return torch.stack([self.experts[i](x) for i in use]).sum()


def experts(rank: int, ranks: int) -> None:
    """What is remembered of sets of parameters is bounded."""
    net = Experts()
    fully_shard(net)
    state = fsdp.compress(net, QSGD(4, block=64), min_numel=16)
    unit = groups_of(net)[0]._reduce_scatter_comm.unit  # type: ignore[arg-type]
    sizes = set()
    for step in range(40):
        use = [i for i in range(8) if (step + 1) >> i & 1]
        net(torch.ones(2, 16), use).backward()
        for p in net.parameters():
            p.grad = None
        sizes.add(len(unit._layouts))
    assert max(sizes) == _LAYOUTS and len(unit._chosen) == 1
    assert len(state.gradients.raw) <= 16 and len(state.gradients.uncompressed) <= 1


def wrapped(rank: int, ranks: int) -> None:
    """The model is found in whatever holds it; equal calls are one; restore() undoes them."""
    with fabric_known():
        for wrap in (Fabric, compiled, lambda m: m):
            held = wrap(sharded(Net()))
            state = fsdp.compress(held, Sign("l1", block=64), min_numel=100)
            assert fsdp.compress(held, Sign("l1", block=64), min_numel=100) is state
            kind, message = raised_by(
                functools.partial(fsdp.compress, held, Sign("l1", block=64), min_numel=200)
            )
            assert kind == "ValueError" and "already with other arguments" in message, message
            assert state.parameters.names[0] == "never", state.parameters.names
            fsdp.restore(held)
            assert raised_by(functools.partial(fsdp.restore, held))[0] == "ValueError"


def one_rank_wrong(rank: int, ranks: int, what: str) -> tuple[str, str]:
    """What goes wrong on one rank is everyone's."""
    net, wrong = sharded(Net()), rank == 1
    options = {"min_nummel": 3} if what == "keyword" and wrong else {}
    target: Any = nn.Linear(2, 2) if what == "model" and wrong else net
    if what == "seed" and wrong:
        options = {"seed": 5}
    found = raised_by(lambda: fsdp.compress(target, QSGD(4, block=64), **options))
    x = torch.ones(3)
    dist.all_reduce(x)
    assert x[0] == ranks
    return found
