"""What ranks do in test_gpu_hooks.py: DDP and FSDP on a device and on the CPU, bit by bit.

Gradients are given, or sums of small whole numbers, so that they are equal on both; what pydist
makes of them, and keeps, must then be equal too.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import ranks_fsdp
import torch
from ranks import forget_shardings
from ranks_codecs import first_difference
from ranks_collectives import bits
from ranks_ddp import CODECS, chunks_of
from ranks_gpu_collectives import group_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist
from pydist import Raw

SHAPES = [(40, 30), (30,), (17, 30), (9, 17), (), (1001,), (300, 5)]
STEPS, SPOILED, RESUMED = 5, 2, 3


class Given(nn.Module):
    """Parameters whose gradients are what the forward pass is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = nn.ParameterList(torch.randn(shape).to(dtype) for shape in SHAPES)

    def forward(self, given: list[Tensor]) -> Any:
        return sum((p * g).sum() for p, g in zip(self.parts, given, strict=True))


def gradients(rank: int, step: int, filled_with_nan: bool, dtype: torch.dtype) -> list[Tensor]:
    """Those of one step on one rank; some are zero, and in one step one holds a NaN."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    given = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if step == 1:
        given[3].zero_()  # as of a parameter that was not used
    if step == SPOILED and filled_with_nan:
        given[2][5, 7] = float("nan")
    return [g.to(dtype) for g in given]


class Trained:
    """A model with pydist's hook on one device.

    Args:
        device: Where it is.
        group: Whose ranks reduce its gradients.
        codec: Their codec.
        dtype: Of the parameters.
        options: More options of the hook.
    """

    def __init__(
        self, device: str, group: Any, codec: Any, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        self._made = device, group, codec, dtype, options
        self.device, self.net = device, Given(dtype).to(device)
        self.ddp = DDP(self.net, bucket_cap_mb=0.004, process_group=group)
        usual = {"min_numel": 100, "seed": 7}
        self.state = pydist.ddp.compress(self.ddp, codec, **usual | options)

    def step(self, given: list[Tensor]) -> list[bytes]:
        """The gradients that all ranks have afterwards."""
        for p in self.net.parameters():
            p.grad = None
        self.ddp([g.to(self.device) for g in given]).backward()
        return [bits(p.grad) for p in self.net.parameters()]

    def kept(self) -> dict[str, Any]:
        """What the hook keeps, as bytes."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: plain(value) for key, value in x.items()}
            return bits(x) if isinstance(x, Tensor) else x

        return plain(self.state.state_dict()["parameters"])

    def resumed(self) -> Trained:
        """A new model that takes up the state from a file."""
        file = io.BytesIO()
        torch.save(self.state.state_dict(), file)
        file.seek(0)
        again = type(self)(*self._made)
        again.state.load_state_dict(torch.load(file, weights_only=True))
        return again


def ddp_equals_cpu(
    rank: int, ranks: int, device: str, on_device: bool, cases: list[tuple[Any, ...]]
) -> list[list[bytes]]:
    """The hook on the device and on the CPU: gradients and state, step by step.

    Args:
        rank: This rank.
        ranks: How many there are.
        device: The device.
        on_device: Messages stay on it.
        cases: A codec's name, the parameters' dtype, options of the hook, bytes of a chunk.
    """
    results: list[list[bytes]] = []
    for name, dtype, options, chunk in cases:
        made = CODECS[name], getattr(torch, dtype), options
        with group_of(ranks, False) as plain, group_of(ranks, on_device) as other:
            with warnings.catch_warnings(), chunks_of(chunk):
                warnings.simplefilter("ignore")
                here, there = Trained("cpu", plain, *made), Trained(device, other, *made)
                results += compared(here, there, rank, ranks, f"{name} {dtype} {options}")[0]
    return results


def compared(
    here: Trained, there: Trained, rank: int, ranks: int, what: str
) -> tuple[list[list[bytes]], Trained]:
    """Trains both, resuming one on the way.

    Returns:
        Their gradients, step by step, and the one that was resumed.
    """
    results: list[list[bytes]] = []
    dtype = here.net.parts[0].dtype
    for step in range(STEPS):
        if step == RESUMED:
            there = there.resumed()
        given = gradients(rank, step, rank == ranks - 1, dtype)
        wanted, got = here.step(given), there.step(given)
        assert got == wanted, f"{what}, step {step}: gradients differ"
        assert there.kept() == here.kept(), f"{what}, step {step}: residuals differ"
        results.append(got)
    assert here.state.stats()["non_finite_steps"] == 1
    return results, there


# --------------------------------------------------------------------------- FSDP


def sharded_on(group: Any, device: str, **codecs: Any) -> Any:
    """The model of whole numbers, sharded over a group on a device, and pydist's state."""
    mesh = DeviceMesh.from_group(group, torch.device(device).type)
    net = ranks_fsdp.sharded(ranks_fsdp.Net(whole=True), mesh=mesh)
    return net, pydist.fsdp.compress(net, seed=11, min_numel=ranks_fsdp.SMALL, **codecs)


def loss_of(net: Any, rank: int, step: int, device: str) -> Tensor:
    """Whole numbers in, whole numbers out: exact in any order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, weight = (torch.randint(-1, 2, (3, n), generator=generator).float() for n in (12, 8))
    return (net(x.to(device), step == 1) * weight.to(device)).sum()


def fsdp_equals_cpu(
    rank: int, ranks: int, device: str, on_device: bool, cases: list[tuple[Any, Any, bool]]
) -> None:
    """Reduced gradients of one codec, gathered weights of another.

    Args:
        rank: This rank.
        ranks: How many there are.
        device: The device.
        on_device: Messages stay on it.
        cases: Codec of gradients, codec of weights, error feedback.
    """
    for of_gradients, of_weights, feedback in cases:
        with group_of(ranks, False) as plain, group_of(ranks, on_device) as other:
            where = [("cpu", plain), (device, other)]
            options = {"gradients": of_gradients, "error_feedback": feedback}
            nets = [sharded_on(g, d, parameters=Raw(), **options)[0] for d, g in where]
            for step in range(3):
                for net, (d, _) in zip(nets, where, strict=True):
                    net.zero_grad()
                    loss_of(net, rank, step, d).backward()
                same_gradients(*nets, f"{of_gradients}, step {step}")
            logs = []
            for d, g in where:
                net, _ = sharded_on(g, d, gradients=Raw(), parameters=of_weights)
                logs.append(ranks_fsdp.recorded(net)[1])
                loss_of(net, rank, 0, d).backward()
            assert len(logs[0]) == len(logs[1]) > 3
            for (_, _, wanted, *_), (unit, _, got, *_) in zip(*logs, strict=True):
                first_difference(got.cpu(), wanted, f"{of_weights}: weights of {unit.name!r}")
        forget_shardings()


def same_gradients(here: nn.Module, there: nn.Module, where: str) -> None:
    """Raises AssertionError where this rank's shards differ."""
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"{where}: {name}"
        if p.grad is not None:
            first_difference(q.grad.to_local().cpu(), p.grad.to_local(), f"{where}: {name}")
