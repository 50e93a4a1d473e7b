"""What ranks do in test_hook_faults.py: options, names, warnings, frameworks."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ranks_ddp_state
import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_state import loss_of, model, setup, steps_of
from ranks_faults import raised_by
from ranks_hook_faults import Images
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist import QSGD, Raw, Sign, TopK
from pydist.ddp import CompressionState, compress, compression_hook, restore

# --------------------------------------------------------------------------- options


class Inner(nn.Module):
    """A child called ``module``, beside a parameter of the inner name; packed frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.module = nn.Linear(40, 40, bias=False)
        self.weight = nn.Parameter(torch.ones(40))
        for i, dtype in enumerate((torch.uint8, torch.int32, torch.complex64, torch.bool)):
            frozen = nn.Parameter(torch.zeros(5000, dtype=dtype), requires_grad=False)
            self.register_parameter(f"packed{i}", frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.weight


def compiled(net: nn.Module) -> Any:
    """The wrapper of ``torch.compile``, without a compiler."""
    return torch.compile(net, backend="eager")


def names(rank: int, ranks: int) -> list[Any]:
    """Names are those of the model, whatever its children are called and whoever wraps it."""
    for wrap in (lambda net: net, compiled):
        net = Inner()
        ddp = DDP(wrap(net))
        state = compress(ddp, {"module.weight": QSGD(4, block=64), "weight": None})
        assert state.parameters.names[:2] == ["weight", "packed0"]
        assert state.parameters.names[-1] == "module.weight"
        assert state.stats()["fallbacks"] == {}
        by_pairs = CompressionState(QSGD(4), named_parameters=ddp.named_parameters())
        assert set(by_pairs.parameters.names) == set(state.parameters.names)
    ddp = DDP(net := Inner())
    compress(ddp, Sign("l1", block=64))
    ddp(torch.ones(2, 40)).sum().backward()
    return [bits(net.module.weight.grad)]


def warned_by(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def warnings_of(rank: int, ranks: int) -> dict[str, list[str]]:
    """What each way of use is warned of."""

    def use(codec: Any, optimizer: Any = torch.optim.SGD, **options: Any) -> Callable[[], None]:
        def call() -> None:
            net = model()
            ddp = DDP(net)
            compress(ddp, codec, **{"min_numel": 100} | options)
            opt = optimizer(net.parameters(), lr=0.1)
            for step in range(2):
                opt.zero_grad()
                loss_of(ddp, rank, step).backward()
                opt.step()

        return call

    def discarded() -> None:
        net = model()
        ddp = DDP(net)
        compress(ddp, QSGD(4, block=64), min_numel=100, momentum=0.5)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(6):
            opt.zero_grad()
            loss_of(ddp, rank, step).backward()
            if step % 2 == 0:  # of the others the gradients are not wanted
                opt.step()

    def heavy(params: Any, lr: float) -> Any:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    return {
        "pattern": warned_by(use({"nothing.*": QSGD(4), "*": Raw()}, exclude=["*.bias", "*.gone"])),
        "adapters": warned_by(use(QSGD(4), min_numel=100_000)),
        "block": warned_by(use(QSGD(4, block=512), exclude=["*.weight"], min_numel=0)),
        "sign and adam": warned_by(use(Sign("l1", block=64), torch.optim.Adam)),
        "topk and adamw": warned_by(use(TopK(0.1, block=64), torch.optim.AdamW)),
        "discarded": warned_by(discarded),
        "twice": warned_by(use(QSGD(4, block=64), heavy, momentum=0.5)),
        "sign and sgd": warned_by(use(Sign("l1", block=64))),
        "qsgd and adam": warned_by(use(QSGD(4, block=64), torch.optim.Adam)),
        "asked for": warned_by(use(Sign("l1", block=64), torch.optim.Adam, error_feedback=True)),
        "without": warned_by(use(Sign("l1", block=64), torch.optim.Adam, error_feedback=False)),
    }


# --------------------------------------------------------------------------- frameworks


class Fabric(nn.Module):
    """Wraps as Lightning Fabric does."""

    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


@contextlib.contextmanager
def fabric_known() -> Iterator[None]:
    """Puts the stand-in where Fabric's own wrapper lives.

    Not by ``mock.patch.dict``, which would also forget what is imported meanwhile.
    """
    module: Any = types.ModuleType("lightning_fabric.wrappers")
    module._FabricModule = Fabric
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]


def wrapped(rank: int, ranks: int) -> list[Any]:
    """The model is found in whatever holds it; equal calls are one; restore() undoes them."""
    for wrap in (Fabric, compiled, lambda m: nn.Sequential(m), lambda m: m):
        ddp = DDP(model())
        held = wrap(ddp)
        state = compress(held, QSGD(4, block=64), min_numel=100)
        assert compress(held, QSGD(4, block=64), min_numel=100) is state
        assert compress(ddp, QSGD(4, block=64), min_numel=100) is state
        kind, message = raised_by(
            functools.partial(compress, held, QSGD(8, block=64), min_numel=100)
        )
        assert kind == "ValueError" and "already with other arguments" in message, message
        loss_of(ddp, rank, 0).backward()
        assert state.stats()["ratio"] > 1
        restore(held)
        assert raised_by(functools.partial(restore, held))[0] == "ValueError"
    plain = [DDP(model()) for _ in range(2)]
    restored = plain[1]
    state = compress(restored, Sign("l1", block=64), min_numel=100)
    loss_of(restored, rank, 0).backward()
    restore(restored)
    for ddp in plain:
        opt = torch.optim.SGD(ddp.parameters(), lr=0.1)
        steps_of(ddp, opt, rank, range(1, 4), ddp)
    results = [[bits(p) for p in ddp.parameters()] for ddp in plain]
    assert results[0] == results[1]
    again = compress(restored, QSGD(4, block=64), min_numel=100)
    loss_of(restored, rank, 4).backward()
    assert again is not state and again.stats()["ratio"] > 1 and state.stats()["steps"] == 1
    return results[0]


def one_rank_wrong(rank: int, ranks: int, what: str) -> tuple[str, str]:
    """What goes wrong on one rank is everyone's."""
    ddp, wrong = DDP(model()), rank == 1
    codec: Any = QSGD(4, block=64)
    options = {"warmup_stepz": 3} if what == "keyword" and wrong else {}
    target: Any = nn.Linear(2, 2) if what == "model" and wrong else ddp
    if what == "again":
        compress(ddp, codec)
        options = {"min_numel": 5} if wrong else {}
    if what == "copy" and wrong:
        codec = copy.deepcopy(compress(DDP(nn.Linear(2, 3)), codec))
    elif what == "copy":
        compress(DDP(nn.Linear(2, 3)), codec)
    found = raised_by(lambda: compress(target, codec, **options))
    x = torch.ones(3)
    dist.all_reduce(x)  # the group goes on
    assert x[0] == ranks
    return found


def joined(rank: int, ranks: int) -> list[Any]:
    """Uneven inputs, with what looks at backwards and steps."""
    options: list[dict[str, Any]] = [
        {"momentum": 0.5, "clip_norm": 0.1}, {"momentum": 0.5, "exact_skip": True},
        {"codec": TopK(0.1, block=64), "error_every": 1},
    ]  # fmt: skip
    return [x for one in options for x in ranks_ddp_state.joined(rank, ranks, **one)]


def hook_in_hook(rank: int, ranks: int) -> list[Any]:
    """torch's wrapper hands over the bucket in half precision, parameters of several orders too."""
    net = Images()
    ddp = DDP(net)
    state = CompressionState(Raw(), named_parameters=net, min_numel=10)
    ddp.register_comm_hook(state, fp16_compress_wrapper(compression_hook))
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(rank))
    for step in range(4):
        if step == 3:
            net.a.to(memory_format=torch.channels_last)
        ddp.zero_grad()
        ddp(x).backward()
        for p, wanted in zip(
            net.parameters(), torch.autograd.grad(net(x), list(net.parameters())), strict=True
        ):
            dist.all_reduce(mean := wanted.contiguous().clone())
            assert p.grad is not None
            torch.testing.assert_close(p.grad, mean / ranks, rtol=1e-2, atol=1e-3)
    return [bits(p.grad.contiguous()) for p in net.parameters() if p.grad is not None]


def thawed(rank: int, ranks: int) -> list[Any]:
    """Layers are thawed one after the other, and the model wrapped anew each time; tied weights."""
    net = model()
    net.register_parameter("tied", net[0].weight)
    state: Any = None
    for layer in (4, 2, 0):
        for i in (0, 2, 4):
            net[i].requires_grad_(i >= layer)
        ddp = DDP(net)
        state = compress(
            ddp, Sign("l1", block=64) if state is None else copy.deepcopy(state),
            **({"min_numel": 100} if state is None else {}),
        )  # fmt: skip
        opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        steps_of(net, opt, rank, range(2), ddp)
        assert state.step == 2 * (3 - layer // 2), (state.step, layer)
    assert set(state.state_dict()["parameters"]) == {"tied", "2.weight", "4.weight"}
    return [bits(p) for p in net.parameters()]


def mixed_types(rank: int, ranks: int) -> list[Any]:
    """The model's type changes after the hook is in: half precision from then on."""
    net, ddp, state, opt = setup(ddp={})
    steps_of(net, opt, rank, range(2), ddp)
    held = state.residuals.norm()
    net.to(torch.bfloat16)
    kind, message = raised_by(lambda: ddp(torch.ones(2, 20, dtype=torch.bfloat16)).sum().backward())
    if not kind:
        assert held > 0 and all(bool(p.grad.isfinite().all()) for p in net.parameters())
    return [kind.encode(), message.encode()]


def interrupted(rank: int, ranks: int) -> str:
    """Ctrl-C while another rank is stuck ends backward at once."""
    net, ddp, state, opt = setup(ddp={})
    steps_of(net, opt, rank, range(2), ddp)
    store: Any = dist.distributed_c10d._get_default_store()
    if rank != 0:
        store.wait(["interrupted"])  # stuck, until the other has got away
        return ""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        loss_of(ddp, rank, 2).backward()
    except KeyboardInterrupt as error:
        return type(error).__name__
    finally:
        store.set("interrupted", "1")
    return "nothing"
