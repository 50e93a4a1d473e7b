"""What ranks do in test_collectives.py."""

from __future__ import annotations

import gc
import random
import threading
import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pydist
from pydist import Sign
from pydist.collectives import flat as collectives
from pydist.reference import signs as reference
from pydist.transport import exchange
from pydist.transport.communicator import communicator

VOTES = Sign(scale=None)


def inputs(ranks: int, n: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Every rank's tensor, known to all ranks: few levels, so that zeros and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-1.5, -1e-7, -0.0, 0.0, 1e-7, 2.0])
    return [
        levels[torch.randint(len(levels), (n,), generator=generator)].to(dtype)
        for _ in range(ranks)
    ]


def expected(
    tensors: list[Tensor], *, op: str, ties: Any = "hash", seed: int = 0, step: int = 0
) -> Tensor:
    """The result by the specification; flat."""
    n, ranks = tensors[0].numel(), len(tensors)
    if not all(bool(x.isfinite().all()) for x in tensors):
        return torch.full((n,), float("nan"), dtype=tensors[0].dtype)
    payloads = np.stack(
        [
            reference.pack_signs(x.reshape(-1).float().numpy(), zero_bit=(rank + step) % 2)[0]
            for rank, x in enumerate(tensors)
        ]
    )
    if op == "vote":
        planes = reference.majority_vote(payloads, ties=ties, seed=seed, step=step, n=n)
        values = reference.unpack_votes(planes, n)
    else:
        planes = reference.count_votes(payloads)
        values = reference.unpack_votes(planes, n, ranks=ranks, mean=op == "mean")
    return torch.from_numpy(values).to(tensors[0].dtype)


def bits(x: Tensor) -> bytes:
    """The bytes of a tensor; every NaN counts as one."""
    x = x.detach().cpu()
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check(result: Tensor, tensors: list[Tensor], what: str, **options: Any) -> None:
    """Raises AssertionError where a result differs from the specification."""
    wanted = expected(tensors, **options)
    got = result.detach().cpu().reshape(-1)
    if bits(got) != bits(wanted):
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        i = int((~same).nonzero()[0]) if not bool(same.all()) else -1
        raise AssertionError(f"{what}: element {i} is {got[i]}, expected {wanted[i]}")


# --------------------------------------------------------------------------- values


def equals_reference(
    rank: int,
    ranks: int,
    sizes: list[int],
    dtypes: list[str],
    chunk: int | None,
    device: str = "cpu",
) -> list[bytes]:
    """Every combination of options; rank 0 compares with the reference, the test the ranks."""
    combinations = [("vote", ties) for ties in ("hash", "zero", "positive")]
    combinations += [("mean", "hash"), ("sum", "hash")]
    whole = exchange.CHUNK_BYTES
    exchange.CHUNK_BYTES = 4 * chunk if chunk else whole
    results = []
    try:
        for number, (op, ties) in enumerate(combinations):
            for algorithm in ("auto", "two_phase", "all_gather"):
                for n in sizes:
                    for name in dtypes:
                        dtype, step = getattr(torch, name), 5 + number
                        options = {"op": op, "ties": ties, "seed": 11, "step": step}
                        tensors = inputs(ranks, n, dtype, seed=n + number)
                        x = tensors[rank].clone().to(device)
                        out = pydist.all_reduce(x, VOTES, algorithm=algorithm, **options)
                        assert out is x
                        if rank == 0:
                            check(x, tensors, f"{options}, {algorithm}, {n} {name}", **options)
                        results.append(bits(x))
    finally:
        exchange.CHUNK_BYTES = whole
    return results


def shapes(rank: int, ranks: int) -> list[bytes]:
    base = inputs(ranks, 6 * 10, torch.float32, seed=1)

    def views(x: Tensor) -> list[Tensor]:
        x = x.clone()
        return [
            x.view(6, 10), x.view(6, 10).t(), x[::2], x.view(6, 10)[:, 3:7], x[7:40],
            x[5].clone(), x[:0], x.view(2, 3, 10).permute(1, 2, 0), torch.nn.Parameter(x),
            torch.nn.Parameter(x.view(6, 10).t().clone(memory_format=torch.preserve_format)),
            x.view(6, 10)[1:5].t().requires_grad_(),
        ]  # fmt: skip

    results = []
    for i in range(len(views(base[0]))):
        every = [views(x)[i] for x in base]  # of a new clone each: they share memory
        before = [x.detach().clone() for x in every]
        x = every[rank]
        stride = x.stride()
        out = pydist.all_reduce(x, VOTES, op="sum", step=i)
        assert out is x and x.shape == before[0].shape and x.stride() == stride
        check(x, before, f"view {i}", op="sum", step=i)
        results.append(bits(x))
    # Elements outside a view stay as they were.
    x = torch.full((6, 10), 7.0)
    pydist.all_reduce(x[:, 3:7], VOTES, op="vote", step=0)
    assert bool((x[:, :3] == 7).all()) and bool((x[:, 7:] == 7).all())
    assert bool((x[:, 3:7] == 1).all())
    return results


def step_counter(rank: int, ranks: int) -> None:
    """``step=None`` takes the number of calls so far, which is saved; a step may be a tensor."""
    tensors = inputs(ranks, 500, torch.float32, seed=3)
    start = collectives.state_dict()["step"]
    seen = []
    for i in range(3):
        x = tensors[rank].clone()
        pydist.all_reduce(x, VOTES, op="vote")
        check(x, tensors, f"call {i}", op="vote", step=start + i)
        seen.append(x)
    assert collectives.state_dict() == {"step": start + 3}
    collectives.load_state_dict({"step": start + 1})
    x = tensors[rank].clone()
    pydist.all_reduce(x, VOTES, op="vote")
    assert torch.equal(x, seen[1]) and not torch.equal(seen[0], seen[1])
    x = tensors[rank].clone()
    pydist.all_reduce(x, VOTES, op="vote", step=torch.tensor([start]))
    assert torch.equal(x, seen[0])
    assert collectives.state_dict() == {"step": start + 3}, "a call was not counted"
    if ranks > 1:  # a step on one rank alone fails once and leaves the counters equal
        with pytest.raises(pydist.MismatchError, match="step"):
            pydist.all_reduce(x, VOTES, op="vote", step=None if rank else 10**6)
        pydist.all_reduce(x, VOTES, op="vote")


def not_finite(rank: int, ranks: int) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        for who in range(ranks):
            for op in ("vote", "mean"):
                for algorithm in ("two_phase", "all_gather"):
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        x = torch.ones(1001, dtype=dtype)
                        if rank == who:
                            x[997] = value
                        pydist.all_reduce(x, VOTES, op=op, algorithm=algorithm)
                        assert bool(x.isnan().all()), f"{value} on rank {who}, {op}, {algorithm}"
    y = torch.ones(1001)
    pydist.all_reduce(y, VOTES)
    assert bool((y == 1).all()), "the flag of one call reached the next"


def not_finite_in_last_chunk(rank: int, ranks: int) -> None:
    """The flag comes with the last chunk, after the first ones were decoded."""
    exchange.CHUNK_BYTES, whole = 64, exchange.CHUNK_BYTES
    try:
        for algorithm in ("two_phase", "all_gather"):
            x = torch.ones(16 * 32 * 30 + 5)
            if rank == ranks - 1:
                x[-1] = float("inf")
            pydist.all_reduce(x, VOTES, algorithm=algorithm)
            assert bool(x.isnan().all())
    finally:
        exchange.CHUNK_BYTES = whole


# --------------------------------------------------------------------------- order


def waited_in_reverse(rank: int, ranks: int) -> None:
    sizes = [40_000, 3, 0, 1001, 64, 100_003, 33, 5000]
    every = [inputs(ranks, n, torch.float32, seed=n) for n in sizes]
    mine = [tensors[rank].clone() for tensors in every]
    works = [
        pydist.all_reduce(x, VOTES, op="vote", step=i, async_op=True) for i, x in enumerate(mine)
    ]
    for i in reversed(range(len(sizes))):
        assert works[i].wait() is mine[i]
        assert works[i].wait(timeout=1) is mine[i] and works[i].is_completed()
        check(mine[i], every[i], f"tensor {i}", op="vote", step=i)
    # A copy is written back when waited for, once.
    x = torch.ones(10, 4).t()
    work = pydist.all_reduce(x, VOTES, op="sum", async_op=True)
    work.wait()
    x.fill_(5.0)
    work.wait()
    assert bool((x == 5).all())


def wait_has_a_timeout(rank: int, ranks: int) -> float:
    dist.barrier()
    if rank == 0:
        time.sleep(1.5)
    x = torch.ones(8)
    started = time.monotonic()
    work = pydist.all_reduce(x, VOTES, op="sum", async_op=True)
    if rank != 0:
        try:
            work.wait(timeout=0.1)
            raise AssertionError("no TimeoutError")
        except TimeoutError:
            waited = time.monotonic() - started
    else:
        waited = 0.0
    work.wait()
    assert bool((x == ranks).all())
    return waited


def order_trap(rank: int, ranks: int, rounds: int, pause: float, with_groups: bool) -> None:
    """Eight buckets in flight and random pauses in each rank: the second phase of one bucket must
    not wait for what a later one has to deliver."""
    chance = random.Random(rank)
    pairs = [dist.new_group([i, i + 1]) for i in range(0, ranks - 1, 2)] if with_groups else []
    mine = pairs[rank // 2] if rank // 2 < len(pairs) else None
    for turn in range(rounds):
        every = [inputs(ranks, 700 * i + 33, torch.float32, seed=8 * turn + i) for i in range(8)]
        xs = [tensors[rank].clone() for tensors in every]
        works, pair_works = [], []
        for i, x in enumerate(xs):
            options = {"op": "vote", "step": turn, "algorithm": "two_phase" if i % 3 else "auto"}
            works.append(pydist.all_reduce(x, VOTES, async_op=True, **options))
            time.sleep(chance.random() * pause)
            if mine is not None:
                y = every[i][rank].clone()
                work = pydist.all_reduce(
                    y, VOTES, op="vote", step=turn, group=mine, algorithm="two_phase",
                    async_op=True,
                )  # fmt: skip
                pair_works.append((i, y, work))
        for i, y, work in reversed(pair_works):
            work.wait()
            first = rank // 2 * 2
            check(y, every[i][first : first + 2], f"round {turn}, pair {i}", op="vote", step=turn)
        for i, work in enumerate(works):
            work.wait()
            time.sleep(chance.random() * pause / 4)
            check(xs[i], every[i], f"round {turn}, bucket {i}", op="vote", step=turn)


# --------------------------------------------------------------------------- groups


def disjoint_subgroups(rank: int, ranks: int) -> None:
    """Two pairs at once, never used together; made in the order that suits each rank."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = [0, 1] if rank < 2 else [2, 3]
    for turn in range(5):
        tensors = inputs(2, 3000, torch.float32, seed=turn + 100 * (rank // 2))
        x = tensors[pair.index(rank)].clone()
        time.sleep(0.01 * ((rank * 7 + turn) % 3))
        pydist.all_reduce(x, VOTES, op="vote", group=groups[rank // 2], algorithm="two_phase")
        check(x, tensors, f"turn {turn}", op="vote", step=turn)


def subgroup_then_larger(rank: int, ranks: int) -> None:
    """Ranks that know different numbers of groups still meet in the next one.

    Ranks 1 and 3 use a group alone first; torch's own names for local groups would then differ.
    """
    odd = dist.new_group([1, 3])
    tail = dist.new_group([1, 2, 3])
    everyone = dist.new_group(list(range(ranks)))
    if rank in (1, 3):
        tensors = inputs(2, 999, torch.float32, seed=5)
        x = tensors[(rank - 1) // 2].clone()
        pydist.all_reduce(x, VOTES, op="vote", group=odd, algorithm="two_phase")
        check(x, tensors, "ranks 1 and 3", op="vote", step=0)
    else:
        try:
            pydist.all_reduce(torch.ones(4), VOTES, group=odd)
            raise AssertionError("a rank outside the group took part")
        except ValueError as error:
            assert f"rank {rank} is not in this process group" in str(error), error
    for group, members in ((tail, [1, 2, 3]), (everyone, list(range(ranks)))):
        if rank in members:
            tensors = inputs(len(members), 999, torch.float32, seed=6)
            x = tensors[members.index(rank)].clone()
            pydist.all_reduce(x, VOTES, op="sum", group=group, step=3)
            check(x, tensors, f"ranks {members}", op="sum", step=3)


def pydist_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("pydist-")]


def destroyed_group(rank: int, ranks: int, wait: bool) -> None:
    """A destroyed group takes its threads along, also with calls in flight."""
    before = len(pydist_threads())
    group = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=5))
    xs = [torch.ones(5000) for _ in range(8)]
    works = [pydist.all_reduce(x, VOTES, op="sum", group=group, async_op=True) for x in xs]
    assert len(pydist_threads()) == before + 3  # front, back, watch
    if wait:
        for work in works:
            work.wait()
    started = time.monotonic()
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    took = time.monotonic() - started
    assert len(pydist_threads()) == before, pydist_threads()
    assert took < 8, f"destroying took {took:.1f} s"
    for x in xs:
        assert bool((x == ranks).all())


def started_again(rank: int, ranks: int, store: str) -> None:
    """The world is destroyed and made anew in the same process."""
    for turn in range(3):
        x = torch.ones(40)
        pydist.all_reduce(x, VOTES, op="sum")
        assert bool((x == ranks).all())
        assert collectives.state_dict() == {"step": 1}
        dist.destroy_process_group()
        gc.collect()
        assert not pydist_threads()
        try:
            pydist.all_reduce(x, VOTES)
            raise AssertionError("no process group, no error")
        except ValueError as error:
            assert "no process group" in str(error)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}{turn}", rank=rank, world_size=ranks
        )


def left_in_flight(rank: int, ranks: int) -> None:
    """The process ends after this, without waiting for anything."""
    for i in range(8):
        pydist.all_reduce(torch.ones(200_000), VOTES, op="vote", step=i, async_op=True)


def keeps_no_tensors(rank: int, ranks: int) -> int:
    """How many tensors of finished calls stay alive: gradients of the last step, say."""
    import weakref

    x = torch.ones(1000)
    alive = weakref.ref(x)
    pydist.all_reduce(x, VOTES)
    del x
    # The threads let go of a job a moment after they have announced its end.
    for _ in range(100):
        if alive() is None:
            return 0
        time.sleep(0.01)
    return 1


def traffic(rank: int, ranks: int, n: int) -> dict[str, int]:
    """Bytes of one two-phase call, by phase."""
    comm = communicator()
    before = comm.traffic.bytes_sent.copy()
    pydist.all_reduce(torch.ones(n), VOTES, op="vote", algorithm="two_phase")
    return dict(comm.traffic.bytes_sent - before)
