"""What ranks do in test_ddp_faults.py: die, stall, dawdle, disagree, bring NaN, resume."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_checkpoint import unsent
from ranks_ddp_state import SMALL, everything, loss_of, model, setup, steps_of
from ranks_faults import SHORT, raised_by, speaking, still_works
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist import QSGD, Sign, Ternary, TopK
from pydist.ddp import CompressionState, compress, compression_hook
from pydist.encoding.bucket import BucketCoder
from pydist.transport.communicator import Communicator

CODECS: dict[str, Any] = {
    "qsgd": QSGD(4, block=64),
    "sign": Sign("l1", block=64),
    "topk": TopK(0.1, block=32),
    "all": {"0.weight": TopK(0.1, block=32), "2.weight": QSGD(4, block=64, entropy="elias"),
            "4.weight": Sign("l1", block=64), "*": Ternary()},
}  # fmt: skip
WHOLE = ("parameters", "residuals", "step", "momenta")
PATIENCE = timedelta(seconds=SHORT + 12)  # less than the timeout of all other groups


def made(codec: str, **options: Any) -> Any:
    """A model on its way in two phases: in each of them a rank needs all others."""
    return setup(CODECS[codec], **{"algorithm": "two_phase"} | options)


# --------------------------------------------------------------------------- checkpoints


def save(folder: Path, step: int, rank: int, net: Any, opt: Any, state: CompressionState) -> None:
    """A rank's file of a step: it is complete or not there."""
    saved = {"step": step, "model": net.state_dict(), "optimizer": opt.state_dict(),
             "compression": state.state_dict()}  # fmt: skip
    file = folder / f"{step:06d}-{rank}.pt"
    torch.save(saved, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def last_complete(folder: Path) -> list[Path]:
    """All ranks' files of the last step of which no file is missing; empty before the first."""
    steps = sorted({file.name.split("-")[0] for file in folder.glob("*.pt")}, reverse=True)
    for step in steps:
        files = [folder / f"{step}-{i}.pt" for i in range(len(list(folder.glob(f"{step}-*.pt"))))]
        if all(file.exists() for file in files):
            ranks = torch.load(files[0], weights_only=True)["compression"]["world_size"]
            if len(files) == ranks:
                return files
    return []


def load(folder: Path, net: Any, opt: Any, state: CompressionState) -> int:
    """Takes up the last complete checkpoint, of any number of ranks; returns the next step."""
    saved = [torch.load(file, weights_only=True) for file in last_complete(folder)]
    if not saved:
        return 0
    net.load_state_dict(saved[0]["model"])
    opt.load_state_dict(saved[0]["optimizer"])
    state.load_state_dict([one["compression"] for one in saved])
    return int(saved[0]["step"])


def whole(net: Any, opt: Any, state: CompressionState) -> list[Any]:
    """Parameters, this rank's residuals, step; and momenta."""
    return [*everything(net, state), [bits(opt.state[p]["momentum_buffer"])
                                      for p in net.parameters()]]  # fmt: skip


def straight(rank: int, ranks: int, codec: str, steps: int) -> list[Any]:
    """A run that nothing disturbs."""
    net, ddp, state, opt = made(codec)
    steps_of(net, opt, rank, range(steps), ddp)
    return whole(net, opt, state)


def taken_up(rank: int, ranks: int, codec: str, folder: str, steps: int) -> tuple[int, list[Any]]:
    """From the last checkpoint to the end."""
    net, ddp, state, opt = made(codec)
    start = load(Path(folder), net, opt, state)
    steps_of(net, opt, rank, range(start, steps), ddp)
    return start, whole(net, opt, state)


def mixed_checkpoint(rank: int, ranks: int, steps: int) -> tuple[str, str]:
    """Files of different steps are no checkpoint."""
    net, ddp, state, opt = made("sign")
    states = []
    for step in range(steps):
        steps_of(net, opt, rank, [step], ddp)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, state.state_dict())
        states.append(everyone)
    mixed = [*states[-1][:-1], states[-2][-1]]
    return raised_by(lambda: state.load_state_dict(mixed))


def shrunk(rank: int, ranks: int, codec: str, folder: str, steps: int) -> dict[str, Any]:
    """Four ranks end at a checkpoint, and three take it up; what was not sent before and after."""
    net, ddp, state, opt = made(codec)
    start = load(Path(folder), net, opt, state)
    found = unsent(ranks, state)
    before = float(loss_of(net, 0, 1000).detach())
    steps_of(net, opt, rank, range(start, start + steps), ddp)
    save(Path(folder), start + steps, rank, net, opt, state)
    after = float(loss_of(net, 0, 1000).detach())
    dist.barrier()
    return {"start": start, "found": found, "left": unsent(ranks, state), "loss": (before, after),
            "parameters": [bits(p) for p in net.parameters()]}  # fmt: skip


# --------------------------------------------------------------------------- death


def short_group(ranks: int) -> dist.ProcessGroup:
    return dist.new_group(list(range(ranks)), timeout=timedelta(seconds=SHORT))


def at_bucket(state: CompressionState, where: str, act: Callable[[], None]) -> ExitStack:
    """Lets this rank act at its third bucket: as it is handed over, or in a phase of it.

    The places: ``"backward"``: buckets before it are under way; ``"reduce"``: between the phases;
    ``"decode"``: its shard has gone out, what the others sent was not looked at; ``"_start"``:
    as the bucket is prepared.
    """
    name = "reduce_bucket" if where == "backward" else where
    owner: Any = state._steps if name in ("reduce_bucket", "_start") else BucketCoder
    usual, calls = getattr(owner, name), []

    def acting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            act()
        return usual(*args)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(owner, name, acting))
    return stack


def killed(
    rank: int, ranks: int, who: int, codec: str, where: str, death: int, folder: str
) -> tuple[str, tuple[str, str], int]:
    """A rank is killed in the step ``death``; the others say what they raise then and after."""
    group = short_group(ranks)
    net, ddp, state, opt = made(codec, ddp={**SMALL, "process_group": group})
    for step in range(death + 2):
        with ExitStack() as stack:
            if rank == who and step == death:
                stack.enter_context(
                    at_bucket(state, where, lambda: os.kill(os.getpid(), signal.SIGKILL))
                )
            message = raised_by(lambda: steps_of(net, opt, rank, [step], ddp))[1]  # noqa: B023
        if message:
            bare = raised_by(lambda: loss_of(net, rank, 0).backward())
            assert bare == ("", ""), "the bare model is as good as before"
            return message, raised_by(lambda: steps_of(net, opt, rank, [death], ddp)), step
        if step % 2:
            save(Path(folder), step + 1, rank, net, opt, state)
    raise AssertionError("nothing failed")


# --------------------------------------------------------------------------- stalls


def stalled(rank: int, ranks: int, who: int, codec: str, where: str) -> tuple[str, str]:
    """A rank stands still until the others have raised; ``"stopped"``: all of its threads."""
    group = short_group(ranks)
    net, ddp, state, opt = made(codec, ddp={**SMALL, "process_group": group})
    steps_of(net, opt, rank, range(2), ddp)
    pids: list[Any] = [None] * ranks
    dist.all_gather_object(pids, os.getpid())
    store = dist.distributed_c10d._get_default_store()
    raised = [f"{group.group_name}/raised/{i}" for i in range(ranks)]
    others = [raised[i] for i in range(ranks) if i != who]

    def stand_still() -> None:
        if where == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            store.wait(others, PATIENCE)

    place = "reduce" if where == "stopped" else where
    with at_bucket(state, place, stand_still) if rank == who else ExitStack():
        found = raised_by(lambda: steps_of(net, opt, rank, [2], ddp))
    store.set(raised[rank], "yes")
    if where == "stopped" and rank == (who + 1) % ranks:
        store.wait(others, PATIENCE)
        os.kill(pids[who], signal.SIGCONT)
    dist.barrier()
    still_works(rank, ranks)
    return found


# --------------------------------------------------------------------------- delays


@contextmanager
def dawdling(dice: random.Random) -> Iterator[None]:
    """Holds this rank up at random: in the hook, in the agreement and in every phase."""

    def held_up(usual: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(dice.choice((0, 0, 0, 0.0005, 0.002)) if dice.random() < 0.998 else 0.05)
            return usual(*args, **kwargs)

        return call

    places: list[tuple[Any, str]] = [(CompressionState, "reduce_bucket"), (Communicator, "agree")]
    places += [
        (BucketCoder, name)
        for name in ("encode", "reduce", "decode", "scales", "merge_scales", "finish")
    ]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, held_up(getattr(owner, name))))
        yield


def delayed(rank: int, ranks: int, codec: str, algorithm: str, steps: int) -> list[bytes]:
    """The same bits whoever is late, and no rank waits for ever."""
    finals = []
    for late in (False, True):
        net, ddp, state, opt = made(codec, algorithm=algorithm)
        with dawdling(random.Random(rank)) if late else ExitStack():
            steps_of(net, opt, rank, range(steps), ddp)
        assert state.stats()["buckets"] >= 5 * (steps - 1)
        finals.append(whole(net, opt, state))
    assert finals[0] == finals[1], "a delay changed the result"
    return finals[0][0]


# --------------------------------------------------------------------------- storms


class Storm:
    """Spoils gradients of this rank, by a plan that all ranks know.

    Attributes:
        bad: The steps in which some rank's gradients are not finite.
    """

    def __init__(self, net: torch.nn.Module, rank: int, ranks: int, steps: int) -> None:
        dice = random.Random(11)
        self.bad = sorted(dice.sample(range(steps), steps // 2))
        self._rank, self._step = rank, -1
        params = list(net.parameters())
        self._plan: dict[int, list[tuple[int, int, int, float]]] = {}
        for step in self.bad:
            self._plan[step] = []
            for _ in range(dice.choice((1, 1, 2, 5))):
                place = dice.randrange(len(params))
                element = dice.randrange(params[place].numel())
                value = float(dice.choice(("nan", "inf", "-inf")))
                self._plan[step].append((dice.randrange(ranks), place, element, value))
        for place, param in enumerate(params):
            param.register_hook(lambda grad, place=place: self._spoil(place, grad))

    def at(self, step: int) -> None:
        self._step = step

    def _spoil(self, place: int, grad: Tensor) -> Tensor:
        for rank, where, element, value in self._plan.get(self._step, []):
            if (rank, where) == (self._rank, place):
                grad = grad.clone(memory_format=torch.contiguous_format)
                grad.view(-1)[element] = value
        return grad


def storm(rank: int, ranks: int, codec: str, exact: bool, scaled: bool, steps: int) -> list[Any]:
    """Half of the steps bring NaN and infinities, on any ranks, in any buckets."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
    net, ddp, state, opt = made(
        codec, exact_skip=exact, scaler=scaler if scaled else None
    )  # fmt: skip
    weather = Storm(net, rank, ranks, steps)
    for step in range(steps):
        weather.at(step)
        opt.zero_grad()
        scaler.scale(loss_of(ddp, rank, step)).backward()
        bad = not all(bool(p.grad.isfinite().all()) for p in net.parameters())
        assert bad == (step in weather.bad), f"step {step}"
        if scaled:
            scaler.step(opt)
            scaler.update()
        elif not bad:
            opt.step()
        for entry in state.state_dict()["parameters"].values():
            assert bool(entry["residual"].isfinite().all()), f"residual, step {step}"
            assert "owner" not in entry or bool(entry["owner"].isfinite().all())
        for p in net.parameters():
            assert bool(p.isfinite().all()), f"parameter, step {step}"
            assert not opt.state[p] or bool(opt.state[p]["momentum_buffer"].isfinite().all())
    assert state.stats()["non_finite_steps"] == len(weather.bad) == steps // 2
    if exact:  # bit for bit what the good batches alone give; a loss scale is a power of two
        if scaled:
            state.rescale(1 / state.scale)
        clean, clean_ddp, clean_state, clean_opt = made(codec, exact_skip=True)
        good = [step for step in range(steps) if step not in weather.bad]
        steps_of(clean, clean_opt, rank, good, clean_ddp)
        got, wanted = whole(net, opt, state), whole(clean, clean_opt, clean_state)
        for what, one, other in zip(WHOLE, got, wanted,
                                    strict=True):  # fmt: skip
            assert one == other, what
    return [bits(p) for p in net.parameters()]


# --------------------------------------------------------------------------- disagreement


def layers(sizes: list[int], names: str) -> torch.nn.Module:
    torch.manual_seed(1)
    modules = [(name, torch.nn.Linear(a, b, bias=False))
               for name, a, b in zip(names, sizes, sizes[1:], strict=False)]  # fmt: skip
    return torch.nn.Sequential(OrderedDict(modules))


MODELS: dict[str, tuple[list[int], str]] = {
    "usual": ([20, 20, 20, 20], "abc"),
    "buckets": ([20, 20, 20, 20], "abc"),  # fewer of them
    "shape": ([20, 21, 20, 20], "abc"),
    "number": ([20, 20, 20, 20, 20], "abcd"),
    "fewer": ([20, 20, 20], "ab"),
    "order": ([20, 20, 20, 20], "bac"),
}


def other_model(rank: int, ranks: int, what: str, named: bool) -> Any:
    """Rank 1 has another model, and DDP was told not to look (``init_sync=False``).

    With names that is seen at once; without, at the first bucket that differs. No rank waits for
    buckets that the others do not have.
    """
    sizes, names = MODELS[what if rank == 1 else "usual"]
    net = layers(sizes, names)
    cut: dict[str, Any] = {
        "find_unused_parameters": what == "buckets"
    }  # else DDP cuts all as rank 0 does
    if what != "buckets" or rank != 1:
        cut |= SMALL
    ddp = DDP(net, init_sync=False, **cut)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(rank))

    def begin() -> None:
        if named:
            compress(ddp, QSGD(4), min_numel=100)
        else:
            state = CompressionState(QSGD(4), min_numel=100)
            ddp.register_comm_hook(state, compression_hook)
        ddp(x).square().mean().backward()

    found = raised_by(begin)
    still_works(rank, ranks)
    return found


def refused(rank: int, ranks: int, exact: bool) -> tuple[tuple[str, str], list[bytes]]:
    """Rank 1 cannot take part in the third bucket of a step; the next step is as any other.

    With ``exact_skip`` the buckets before it leave no trace either.
    """

    def fail() -> None:
        raise MemoryError("no room for a bucket")

    net, ddp, state, opt = made("all", exact_skip=exact)
    plain, plain_ddp, plain_state, plain_opt = made("all", exact_skip=exact)
    steps_of(net, opt, rank, range(2), ddp)
    with at_bucket(state, "_start", fail) if rank == 1 else ExitStack():
        found = raised_by(lambda: steps_of(net, opt, rank, [7], ddp))
    bad = [bool(p.grad.isnan().all()) for p in net.parameters()]
    assert any(bad) and not all(bad), bad
    steps_of(net, opt, rank, range(2, 4), ddp)
    steps_of(plain, plain_opt, rank, range(4), plain_ddp)
    same = whole(net, opt, state) == whole(plain, plain_opt, plain_state)
    assert same == exact, "the step left a trace" if exact else "nothing happened"
    return found, [bits(p) for p in net.parameters()]


def other_version(rank: int, ranks: int, name: str, value: Any) -> tuple[Any, Any, list[bytes]]:
    """One rank speaks another version: when the state is made, then in the middle of training.

    After that it speaks ours, and training goes on as if those calls had never been.
    """
    odd = value if rank == 1 else getattr(__import__("pydist").wire, name)
    net, ddp, state, opt = made("sign")
    plain, plain_ddp, plain_state, plain_opt = made("sign")
    steps_of(net, opt, rank, range(2), ddp)
    with speaking(name, odd):
        at_once = raised_by(lambda: compress(DDP(model()), QSGD(4)))
        later = raised_by(lambda: steps_of(net, opt, rank, [7], ddp))
    assert all(bool(p.grad.isnan().all()) for p in net.parameters()), "garbage"
    steps_of(net, opt, rank, range(2, 4), ddp)
    steps_of(plain, plain_opt, rank, range(4), plain_ddp)
    assert whole(net, opt, state) == whole(plain, plain_opt, plain_state)
    return at_once, later, [bits(p) for p in net.parameters()]
