"""What ranks do in test_ddp_levels.py: the DDP hook on two levels."""

from __future__ import annotations

import copy
import gc
import math
import os
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from levels_oracle import LevelsOracle
from ranks_collectives import bits
from ranks_ddp import (
    CODECS,
    MIN_NUMEL,
    MODES,
    SEED,
    Net,
    backward,
    check_gradients,
    chunks_of,
    kept,
    kinds_of,
    local_gradients,
    memory_order,
)
from ranks_ddp_state import everything, loss_of, setup, steps_of
from ranks_faults import raised_by
from ranks_hierarchy import levels
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist
from pydist import QSGD, BlockInt, Raw, Sign, TopK, simulate
from pydist.ddp import Schedule

SCHEDULE = Schedule([(0, TopK(0.1, block=32)), (2, QSGD(4, block=96))])
"""Blocks of 32 and 96 elements: shares are whole blocks of both."""


def trained(
    rank: int, ranks: int, mesh: Any, local: int, case: tuple[Any, ...], failures: list[str],
) -> list[bytes]:  # fmt: skip
    """Trains; rank 0 compares gradients and everyone's residuals with the oracle."""
    codec, dtype_name, mode, options, chunk = case
    where = f"{codec} {dtype_name} {mode} {options}, {ranks // local} x {local}"
    codec = SCHEDULE if codec == "schedule" else CODECS[codec]
    dtype = getattr(torch, dtype_name)
    net = Net(huge=mode == "huge").to(dtype)
    bare = copy.deepcopy(net)
    with warnings.catch_warnings(), chunks_of(chunk):
        warnings.simplefilter("ignore")  # DDP's advice on unused parameters
        ddp = DDP(net, **MODES[mode])
        usual = {"min_numel": MIN_NUMEL, "seed": SEED, "mesh": mesh}
        state = pydist.ddp.compress(ddp, codec, **usual | options)
        norm, mean = state.options.clip_norm, state.options.op == "mean"
        oracle = LevelsOracle(
            kinds_of(net, state.options, dtype),
            {name: state.options.unit(name, p) for name, p in net.named_parameters()},
            ranks // local, local, seed=SEED, dtype=dtype_name, mean=mean,
            storage=str(state.options.residual_dtype)[6:], owner=state.options.owner_feedback,
            momentum=state.options.momentum,
            limit=math.inf if norm is None else norm * ranks ** (0.5 if mean else -0.5),
        )  # fmt: skip
        for step in range(4 if codec is SCHEDULE else 3):
            oracle.change(kinds_of(net, state.options, dtype, state.options.stage(step)))
            net.zero_grad()
            backward(ddp, mode, rank, step, dtype)
            state.stats()  # looks at what became of the step
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, kept(state))
            try:
                if rank == 0:
                    wanted = oracle.step(local_gradients(bare, mode, ranks, step, dtype), step)
                    check_gradients(net, wanted, f"{where}, step {step}")
                    oracle.check(everyone, f"{where}, step {step}")
            except AssertionError as error:  # raised later: the others would wait for this rank
                failures.append(str(error))
            with torch.no_grad():
                for p, q in zip(net.parameters(), bare.parameters(), strict=True):
                    if p.grad is not None:
                        p -= 0.01 * p.grad
                    q.copy_(p)
    return [bits(p) for p in net.parameters()]


def conforms(rank: int, ranks: int, local: int, cases: list[tuple[Any, ...]]) -> list[Any]:
    """One after the other: name of the codec, dtype, mode, options, chunk."""
    failures: list[str] = []
    mesh = levels(ranks, local)
    results = [trained(rank, ranks, mesh, local, case, failures) for case in cases]
    assert not failures, "\n".join(failures)
    return results


# --------------------------------------------------------------------------- other doors


class One(torch.nn.Module):
    """A parameter whose gradient is what it is called with."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def equals_simulation(rank: int, ranks: int, local: int) -> None:
    """Of a single parameter, bit-identical to ``simulate.all_reduce(nodes=…)``."""
    mesh, nodes, n = levels(ranks, local), ranks // local, 5003
    for codec, inner in (
        (QSGD(4), None), (Sign("l2", block=64), Raw("float32")), (BlockInt(3), None),
        (TopK(0.05, block=96), None), (Sign(None), None), (Raw("bfloat16"), None),
    ):  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            given = [
                torch.randn(n, generator=torch.Generator().manual_seed(i)).to(dtype)
                for i in range(ranks)
            ]
            ddp = DDP(One(n, dtype))
            state = pydist.ddp.compress(
                ddp, codec, mesh=mesh, inner=inner, error_feedback=False, min_numel=1, seed=3
            )
            ddp(given[rank]).backward()
            wanted = simulate.all_reduce(given, codec, nodes=nodes, inner=inner, seed=3, step=0)
            got = ddp.module.weight.grad
            assert torch.equal(got.view(-1), wanted), f"{codec} {dtype}"
            stats = state.stats()
            assert stats["ranks_per_node"] == local and stats["wire_bytes_inside"] > 0


def inner_codecs(rank: int, ranks: int, local: int) -> list[Any]:
    """Encoded inside a node too: replicas stay equal, and near the mean; raw ones stay exact."""
    mesh = levels(ranks, local)
    results: list[Any] = []
    for inner in (BlockInt(8, block=32), QSGD(8, entropy="elias"), Sign("l1"), pydist.Ternary()):
        ddp = DDP(Net(huge=False))
        pydist.ddp.compress(ddp, BlockInt(8), mesh=mesh, inner=inner, min_numel=MIN_NUMEL)
        backward(ddp, "plain", rank, 1, torch.float32)
        exact = [p.grad.clone() for p in ddp.module.parameters() if p.grad is not None]
        results.append([bits(x) for x in exact])
        bare = local_gradients(Net(huge=False), "plain", ranks, 1, torch.float32)
        for name, p in ddp.module.named_parameters():
            if p.grad is not None and p.numel() < MIN_NUMEL and p.numel():
                mean = torch.stack([torch.from_numpy(g[name]) for g in bare]).mean(0)
                got = torch.from_numpy(memory_order(p, p.grad))
                assert torch.allclose(got, mean, atol=1e-6), f"{inner} {name}"
    return results


def of_nodes(rank: int, ranks: int, sizes: list[int], variables: str) -> list[Any]:
    """``levels="auto"`` on nodes with so many ranks, as launchers describe them."""
    node = next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))
    described = {
        "torchrun": {"GROUP_RANK": str(node), "LOCAL_WORLD_SIZE": str(sizes[node])},
        "others": {"LOCAL_WORLD_SIZE": str(sizes[node])},
        "none": {},
    }[variables]
    group = dist.new_group(list(range(ranks)))  # what is found is remembered by group
    before = {name: os.environ.pop(name, None) for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE")}
    os.environ.update(described)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ddp = DDP(Net(huge=False), process_group=group)
            state = pydist.ddp.compress(ddp, Sign("l1"), levels="auto", min_numel=MIN_NUMEL)
            backward(ddp, "plain", rank, 1, torch.float32)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    texts = [str(w.message) for w in caught if "levels=" in str(w.message)]
    stats = state.stats()
    return [stats["ranks_per_node"], texts, [bits(p.grad) for p in ddp.module.parameters()
            if p.grad is not None]]  # fmt: skip


# --------------------------------------------------------------------------- state


def resumed(rank: int, ranks: int, local: int, options: dict[str, Any]) -> list[Any]:
    """Stopped after four steps and taken up by a new model: the same bits as without."""
    mesh = levels(ranks, local)
    net, ddp, state, opt = setup(mesh=mesh, **options)
    steps_of(net, opt, rank, range(4), ddp)
    middle = copy.deepcopy([net.state_dict(), opt.state_dict(), state.state_dict()])
    steps_of(net, opt, rank, range(4, 8), ddp)
    wanted = everything(net, state)
    again, ddp, state, opt = setup(ddp={}, mesh=mesh, **options)
    again.load_state_dict(middle[0])
    opt.load_state_dict(middle[1])
    state.load_state_dict(middle[2])
    steps_of(again, opt, rank, range(4, 8), ddp)
    got = everything(again, state)
    assert got == wanted and got[2] == 8
    return got[0]


def mass(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What all ranks have not sent, as it will count in a mean; float64."""
    total: dict[str, Tensor] = {}
    for saved in states:
        for name, entry in saved["parameters"].items():
            if "residual" not in entry:  # it travels raw, and has a momentum
                continue
            residual, first = entry["residual"].double().reshape(-1), 0
            place = saved["levels"]
            if "span" in entry:
                first = entry["span"][0]
            elif place is not None:
                residual = residual / place[3]
            shape = dict(model_shapes())[name]
            whole = total.setdefault(name, torch.zeros(math.prod(shape), dtype=torch.float64))
            whole[first : first + residual.numel()] += residual / len(states)
            if "owner" in entry:
                first, last, everyones = entry["owner_span"]
                holder = saved["rank"] == 0 if place is None else place[0] == 0
                if not everyones or holder:
                    whole[first:last] += entry["owner"].double()
    return total


def model_shapes() -> list[tuple[str, tuple[int, ...]]]:
    from ranks_ddp_state import model

    return [(name, tuple(p.shape)) for name, p in model().named_parameters()]


def gathered(state: Any, ranks: int) -> list[dict[str, Any]]:
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, state.state_dict())
    return everyone


def regrouped(rank: int, ranks: int, way: list[int], options: dict[str, Any]) -> None:
    """From level to level: flat (1 rank per node), other nodes; nothing unsent is lost."""
    states = None
    for local in way:
        mesh = levels(ranks, local) if local > 1 else None
        net, ddp, state, opt = setup(mesh=mesh, momentum=0.5, **options)
        if states is not None:
            own = raised_by(lambda: state.load_state_dict(states[rank]))  # noqa: B023
            assert own[0] == "ValueError" and "give the states of all" in own[1], own
            before = mass(states)
            state.load_state_dict(states)
            after = mass(gathered(state, ranks))
            for name, wanted in before.items():
                assert torch.allclose(after[name], wanted, rtol=1e-5, atol=1e-7), name
        steps_of(net, opt, rank, range(2), ddp)
        states = gathered(state, ranks)
        for saved in states:
            for name, entry in saved["parameters"].items():
                assert ("span" in entry) == (local > 1), f"{name}: {entry.keys()}"


def divides_memory(rank: int, ranks: int, local: int) -> None:
    """Residuals take 1 / local of the memory that they take on one level."""
    sizes = []
    for mesh in (None, levels(ranks, local)):
        net, ddp, state, opt = setup(Sign("l1", block=32), mesh=mesh, error_feedback="worker")
        steps_of(net, opt, rank, [0], ddp)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, state.stats()["residual_bytes"])
        sizes.append(sum(everyone))
    assert sizes[0] == local * sizes[1], sizes


# --------------------------------------------------------------------------- what goes wrong


def not_finite(rank: int, ranks: int, local: int, value: float, bad: int) -> None:
    """Everything becomes NaN on every rank; with ``exact_skip`` nothing else changes."""
    mesh = levels(ranks, local)
    for exact in (False, True):
        net, ddp, state, opt = setup(ddp={}, mesh=mesh, exact_skip=exact)
        steps_of(net, opt, rank, range(2), ddp)
        before = everything(net, state)
        opt.zero_grad()
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(rank))
        if rank == bad:
            x[0, 0] = value
        ddp(x).square().mean().backward()
        for name, p in net.named_parameters():
            assert bool(p.grad.isnan().all()), f"{name} on rank {rank}"
        assert state.stats()["non_finite_steps"] == 1
        after = everything(net, state)
        if exact:
            assert after == before
        for entry in state.state_dict()["parameters"].values():
            assert bool(entry["residual"].isfinite().all())
        steps_of(net, opt, rank, range(2, 4), ddp)
        assert all(bool(p.isfinite().all()) for p in net.parameters())


def differs(rank: int, ranks: int, local: int, who: int) -> list[Any]:
    """One rank has another model, codec, or gradient: all raise, and the groups go on."""
    mesh = levels(ranks, local)
    found = [
        raised_by(lambda: setup(Sign("l1") if rank == who else Sign("l2"), mesh=mesh)),
        raised_by(lambda: setup(mesh=mesh, inner=BlockInt(8) if rank == who else None)),
        raised_by(lambda: setup(mesh=None if rank == who else mesh)),
    ]
    net, ddp, state, opt = setup(mesh=mesh)
    steps_of(net, opt, rank, [0], ddp)
    before = [bits(p) for p in net.parameters()]
    if rank == who:
        state.residuals.worker[0] = torch.zeros(3)
        state.kept.spans[0] = (1, 4)
        state._steps.layouts.forget()
    opt.zero_grad()
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(rank))
    found.append(raised_by(lambda: ddp(x).square().mean().backward()))
    assert [bits(p) for p in net.parameters()] == before
    net, ddp, state, opt = setup(mesh=mesh)
    steps_of(net, opt, rank, [0, 1], ddp)
    return found


def wrong(rank: int, ranks: int) -> list[Any]:
    """Arguments that make no sense together, on every rank."""
    mesh = levels(ranks, 2)
    half = dist.new_group([0, 1]), dist.new_group([2, 3])
    mine = half[rank // 2]
    return [
        raised_by(lambda: setup(levels="nodes")),
        raised_by(lambda: setup(levels="auto", mesh=mesh)),
        raised_by(lambda: setup(mesh=mine)),
        raised_by(lambda: setup(mesh=(mine, mine))),
        raised_by(lambda: setup(inner=BlockInt(8))),
        raised_by(lambda: setup(mesh=mesh, inner="int8")),
        raised_by(lambda: setup(mesh=mesh, momentum=0.9, local_after=3)),
    ]


# --------------------------------------------------------------------------- other ways of training


def into_local(rank: int, ranks: int, local: int, in_node: bool) -> None:
    """With the first local step a rank's residual shares go into its gradients, and arrive."""
    mesh = levels(ranks, local)
    options = {"local_after": 2, "subgroup": mesh[1] if in_node else None}
    net, ddp, state, opt = setup(Sign("l1", block=32), ddp={}, mesh=mesh, **options)
    steps_of(net, opt, rank, range(2), ddp)
    saved = state.state_dict()["parameters"]
    assert any(bool(entry["residual"].any()) for entry in saved.values())
    bare = copy.deepcopy(net)
    opt.zero_grad()
    bare.zero_grad()
    loss_of(ddp, rank, 2).backward()
    loss_of(bare, rank, 2).backward()
    for (name, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
        wanted = q.grad.reshape(-1).clone()
        if (entry := saved.get(name)) is not None:
            # What an owner had not handed out counts as this rank's own, by all ranks.
            first, last = entry["span"]
            wanted[first:last] += entry["residual"]
            if "owner" in entry and (rank // local == 0 or not entry["owner_span"][2]):
                begin, end, _ = entry["owner_span"]
                wanted[begin:end] += entry["owner"] * ranks
        if in_node:
            everyone = [torch.empty_like(wanted) for _ in range(local)]
            dist.all_gather(everyone, wanted, group=mesh[1])
            wanted = torch.stack(everyone).mean(0)
        assert torch.allclose(p.grad.reshape(-1), wanted, rtol=1e-5, atol=1e-6), name
    opt.step()
    state.stats()
    assert not any(x.numel() for x in state.residuals.tensors())
    steps_of(net, opt, rank, [3], ddp)


def several_backwards(rank: int, ranks: int, local: int) -> list[bytes]:
    """Two backwards of a step, with momentum: what was reduced before is not reduced again."""
    mesh = levels(ranks, local)
    net, ddp, state, opt = setup(Raw(), ddp={}, mesh=mesh, momentum=0.5)
    opt.zero_grad()
    loss_of(ddp, rank, 0).backward()
    once = [p.grad.clone() for p in net.parameters()]
    loss_of(ddp, rank, 1).backward()
    bare = copy.deepcopy(net)
    bare.zero_grad()
    means = []
    for other in range(ranks):
        bare.zero_grad()
        loss_of(bare, other, 1).backward()
        means.append([p.grad.clone() for p in bare.parameters()])
    for p, first, *rest in zip(net.parameters(), once, *means, strict=True):
        assert torch.allclose(p.grad, first + torch.stack(rest).mean(0), atol=1e-6)
    opt.step()
    steps_of(net, opt, rank, [2, 3], ddp)
    return [bits(p) for p in net.parameters()]


def copied(rank: int, ranks: int, local: int) -> list[bytes]:
    """A copy that is given the mesh goes on as the original; without it, it says what it lacks."""
    mesh = levels(ranks, local)
    net, ddp, state, opt = setup(mesh=mesh, algorithm="two_phase")
    steps_of(net, opt, rank, range(2), ddp)
    twin, again = copy.deepcopy(net), copy.deepcopy(state)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(opt.state_dict()))
    other = DDP(twin)
    kind, message = raised_by(lambda: pydist.ddp.compress(other, copy.deepcopy(again)))
    assert kind == "MismatchError" or "mesh" in message, (kind, message)
    pydist.ddp.compress(other, again, mesh=(mesh[0], mesh[1]))
    assert pydist.ddp.compress(other, again, mesh=(mesh[0], mesh[1])) is again
    steps_of(net, opt, rank, range(2, 4), ddp)
    steps_of(twin, optimizer, rank, range(2, 4), other)
    assert [bits(p) for p in twin.parameters()] == [bits(p) for p in net.parameters()]
    return [bits(p) for p in net.parameters()]


def lets_go(rank: int, ranks: int, local: int) -> None:
    """What a step needed is gone with it, without the garbage collector."""
    mesh = levels(ranks, local)
    for where in (None, mesh):
        net, ddp, state, opt = setup(mesh=where)
        made: list[Any] = []
        start = type(state._steps.carrier).start

        def noted(self: Any, *args: Any, _start: Any = start, _made: Any = made) -> Any:
            sending = _start(self, *args)
            _made.append(weakref.ref(sending.call))
            return sending

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(state._steps.carrier), "start", noted)
            steps_of(net, opt, rank, range(2), ddp)
        gc.collect()
        gc.disable()
        try:
            steps_of(net, opt, rank, range(2, 4), ddp)
            state.stats()
            dist.barrier()
            assert made and not any(ref() is not None for ref in made)
        finally:
            gc.enable()


def other_blocks(rank: int, ranks: int, local: int) -> None:
    """A codec with other blocks: one rank's state is refused when it is loaded, all ranks' go."""
    mesh = levels(ranks, local)
    net, ddp, state, opt = setup(Sign("l1", block=64), mesh=mesh, algorithm="two_phase")
    steps_of(net, opt, rank, range(2), ddp)
    states = gathered(state, ranks)
    net, ddp, state, opt = setup(Sign("l1", block=96), mesh=mesh, algorithm="two_phase")
    kind, message = raised_by(lambda: state.load_state_dict(states[rank]))
    assert kind == "ValueError" and "give the states of all" in message, message
    state.load_state_dict(states)
    after = mass(gathered(state, ranks))
    for name, wanted in mass(states).items():
        assert torch.allclose(after[name], wanted, rtol=1e-5, atol=1e-7), name
    steps_of(net, opt, rank, range(2), ddp)
