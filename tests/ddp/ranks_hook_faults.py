"""What ranks do in test_hook_faults.py: how other people's tools use the hooks' states."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_state import everything, loss_of, model, setup, steps_of
from ranks_faults import raised_by
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel

from pydist import BlockInt, Raw, Sign
from pydist.ddp import CompressionState, compress, compression_hook

# --------------------------------------------------------------------------- readers


class Reader:
    """Calls getters in another thread until it is told to stop."""

    def __init__(self, *getters: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.rounds, self._getters = 0, getters
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.002):
                for getter in self._getters:
                    getter()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Writer:
    """What a logger is to a state."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(name, str) and isinstance(value, float) and isinstance(step, int)


def getters_of(state: Any) -> list[Callable[[], Any]]:
    """All that a state tells."""
    found = [
        state.stats, state.scalars, lambda: state.log(Writer()), state.state_dict,
        lambda: state.sharded().state_dict(), lambda: copy.deepcopy(state), lambda: state.step,
    ]  # fmt: skip
    if isinstance(state, CompressionState):
        found += [state.advice, state.log_summary]
    return found


def read_all(state: Any, _: Tensor) -> None:
    """As the hook of a tensor: calls all getters."""
    for getter in getters_of(state):
        getter()


def read_meanwhile(rank: int, ranks: int, exact_skip: bool) -> list[Any]:
    """Readers in another thread, and in the middle of backward, change nothing."""
    results = []
    for read in (False, True):
        net, ddp, state, opt = setup(exact_skip=exact_skip, momentum=0.5)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        if not read:
            steps_of(net, opt, rank, range(6), ddp)
        else:
            handle = net[2].weight.register_hook(functools.partial(read_all, state))
            with Reader(*getters_of(state)) as reader:
                steps_of(net, opt, rank, range(6), ddp)
            handle.remove()
            assert reader.error is None, reader.error
        results.append(everything(net, state))
    assert results[0] == results[1]
    return results[0][0]


# --------------------------------------------------------------------------- copies


def saved_and_loaded(x: Any) -> Any:
    """Through torch.save."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": saved_and_loaded,
}


def copied(rank: int, ranks: int) -> list[Any]:
    """A copied state goes on in another model as the original does in its own."""
    net, ddp, state, opt = setup(momentum=0.5)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    steps_of(net, opt, rank, range(3), ddp)
    copies = {name: f(state) for name, f in COPIES.items()}
    averaged = AveragedModel(ddp)  # a copy of the whole DDP model
    whole = copy.deepcopy(ddp)
    assert all(not one.bound for one in copies.values())
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    steps_of(net, opt, rank, range(3, 6), ddp)
    averaged.update_parameters(ddp)
    wanted = everything(net, state)
    for name, again in copies.items():
        other = model()
        other.load_state_dict(weights)
        wrapped = DDP(other)
        assert compress(wrapped, again) is again
        sgd = torch.optim.SGD(other.parameters(), lr=0.1)
        steps_of(other, sgd, rank, range(3, 6), wrapped)
        assert everything(other, again) == wanted, name
    # A copied model has a reducer without a hook; one is put in like into any other.
    inner = whole.module
    ((_, state_of_copy),) = [pair for pair in whole._comm_hooks if pair[0] is compression_hook]
    compress(whole, state_of_copy)
    steps_of(inner, torch.optim.SGD(inner.parameters(), lr=0.1), rank, range(3, 6), whole)
    assert everything(inner, state_of_copy) == wanted
    return wanted[0]


def late(rank: int, ranks: int, state: CompressionState, saved: Any) -> list[Any]:
    """A state that was made where there was no process group, registered as trainers do."""
    net = model()
    ddp = DDP(net)
    if saved is not None:
        saved[rank]["parameters"] = {k: dict(v) for k, v in saved[rank]["parameters"].items()}
        state.load_state_dict(saved[rank])
    ddp.register_comm_hook(state, compression_hook)
    steps_of(net, torch.optim.SGD(net.parameters(), lr=0.1), rank, range(3), ddp)
    assert state.bound and state.stats()["ratio"] > 1
    return [bits(p) for p in net.parameters()]


def numbered(rank: int, ranks: int) -> list[Any]:
    """A state without names is loaded before the first backward, and goes on the same."""
    results, held, weights = [], None, None
    for load in (False, True):
        net = model()
        ddp = DDP(net)
        state = CompressionState(Sign("l1", block=64), min_numel=100)
        opt, first = torch.optim.SGD(net.parameters(), lr=0.1), 0
        if load:
            net.load_state_dict(weights)
            state.load_state_dict(held)
            first = 3
        ddp.register_comm_hook(state, compression_hook)
        for step in range(first, 6):
            if step == 3 and not load:
                held = copy.deepcopy(state.state_dict())
                weights = {k: v.clone() for k, v in net.state_dict().items()}
            steps_of(net, opt, rank, [step], ddp)
        results.append(everything(net, state))
    assert results[0] == results[1]
    assert held is not None and all(name.startswith("parameter ") for name in held["parameters"])
    return results[0][0]


# --------------------------------------------------------------------------- memory formats


class Images(nn.Module):
    """Convolutions, whose weights have more than one dense order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 6, (2, 3))
        self.c = nn.Conv3d(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(x)))
        z = self.c(x[:, :2, None, :6, :6].expand(-1, -1, 3, -1, -1))
        return y.square().mean() + z.square().mean()


def turned(rank: int, ranks: int, when: int, algorithm: Any) -> list[Any]:
    """Nothing is mixed up: what was sent and what is kept are together all gradients there were."""
    net = Images()
    ddp, owes = DDP(net), {}
    state = compress(ddp, BlockInt(2, block=32), min_numel=10, momentum=0.0, algorithm=algorithm)
    generator = torch.Generator().manual_seed(rank)
    true = {name: torch.zeros(p.shape) for name, p in net.named_parameters()}
    sent = {name: torch.zeros(p.shape) for name, p in net.named_parameters()}
    for step in range(6):
        if step == when:
            net.a.to(memory_format=torch.channels_last)
            net.b.to(memory_format=torch.channels_last)
            net.c.to(memory_format=torch.channels_last_3d)
        x = torch.randn(2, 3, 7, 9, generator=generator)
        ddp.zero_grad()
        wanted = torch.autograd.grad(net(x), list(net.parameters()))
        for name, g in zip(true, wanted, strict=True):
            dist.all_reduce(g := g.contiguous().clone())
            true[name] += g / ranks
        ddp(x).backward()
        for name, p in net.named_parameters():
            assert p.grad is not None
            sent[name] += p.grad
    for name, entry in state.state_dict()["parameters"].items():
        owed = entry["residual"].contiguous().clone() / ranks
        share = torch.zeros(owed.numel())
        if "owner" in entry and (rank == 0 or not entry["owner_span"][2]):
            share[entry["owner_span"][0] : entry["owner_span"][1]] = entry["owner"]
        order = state.kept.orders[state.parameters.ordinal_of(name)]
        owed += order.shaped(share).contiguous()
        dist.all_reduce(owed)
        owes[name] = owed
        torch.testing.assert_close(sent[name] + owed, true[name], rtol=1e-4, atol=1e-6)
    assert any(bool(x.any()) for x in owes.values())
    return [bits(p.contiguous()) for p in net.parameters()]


# --------------------------------------------------------------------------- several backwards


def accumulated(rank: int, ranks: int, how: str) -> list[Any]:
    """Momentum in the hook and several backwards a step: as momentum in the optimizer."""
    results = []
    for hook in (False, True):
        net = model()
        ddp = DDP(net, static_graph=how == "static", gradient_as_bucket_view=how == "view")
        if hook:
            compress(ddp, Raw(), momentum=0.5)
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.0 if hook else 0.5)
        for step in range(4):
            opt.zero_grad(set_to_none=how != "zeros")
            for part in range(3):
                if how == "no_sync" and part == 0:
                    with ddp.no_sync():
                        loss_of(ddp, rank, 10 * step + part).backward()
                    continue
                loss_of(ddp, rank, 10 * step + part).backward()
            opt.step()
        results.append([p.detach().clone() for p in net.parameters()])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    return [bits(p) for p in results[1]]


def clipped_between(rank: int, ranks: int) -> tuple[str, str]:
    """A gradient that was changed between two backwards of a step cannot be told apart."""
    net = model()
    ddp = DDP(net)
    compress(ddp, Raw(), momentum=0.5)
    loss_of(ddp, rank, 0).backward()
    if rank == 0:
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    found = raised_by(lambda: loss_of(ddp, rank, 1).backward())
    ddp.zero_grad()
    loss_of(ddp, rank, 2).backward()  # and goes on
    return found


def skipped_accumulation(rank: int, ranks: int) -> list[Any]:
    """A NaN in the second backward of a step takes back the first one's part, too."""
    results = []
    for poison in (False, True):
        net, ddp, state, opt = setup(exact_skip=True, momentum=0.5)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        steps_of(net, opt, rank, range(2), ddp)
        if poison:
            opt.zero_grad()
            loss_of(ddp, rank, 20).backward()
            (loss_of(ddp, rank, 21) * (float("nan") if rank == 0 else 1.0)).backward()
        steps_of(net, opt, rank, range(2, 4), ddp)
        found = everything(net, state)
        results.append(found[:2])
    assert results[0] == results[1]
    return results[0][0]
