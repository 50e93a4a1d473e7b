"""What ranks do in test_hierarchy.py: all-reduce on two levels."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks_codecs import first_difference, inputs
from ranks_collectives import bits
from ranks_faults import raised_by
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import pydist
from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK, simulate
from pydist.collectives import grid as hierarchy
from pydist.collectives.flat import load_state_dict, state_dict
from pydist.reference import raw as reference_raw
from pydist.transport import exchange

CODECS = [
    QSGD(4, block=64), BlockInt(8), BlockInt(4, 32, "stochastic"), BlockFloat(block=96),
    Sign("l1", block=32), Raw(), Raw("bfloat16"), TopK(0.1, block=64),
    QSGD(3, block=64, norm="l2", entropy="elias"),
]  # fmt: skip


def levels(ranks: int, local: int) -> tuple[Any, Any]:
    """This rank's groups across and inside."""
    nodes = [list(range(i, i + local)) for i in range(0, ranks, local)]
    peers = [list(range(i, ranks, local)) for i in range(local)]
    inside = [dist.new_group(node) for node in nodes]
    across = [dist.new_group(column) for column in peers]
    rank = dist.get_rank()
    return across[rank % local], inside[rank // local]


# --------------------------------------------------------------------------- values


def equals_simulation(
    rank: int, ranks: int, local: int, sizes: list[int], dtypes: list[str], chunk: int | None,
    device: str = "cpu",
) -> list[bytes]:  # fmt: skip
    """Every codec, both ways of summing, other codecs inside; any length."""
    group, results = levels(ranks, local), []
    whole, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, chunk or exchange.CHUNK_BYTES
    try:
        # Not equal to a flat call: every share has a scaler of its own.
        for number, codec in enumerate([*CODECS, Ternary()]):
            for n in sizes:
                for name in dtypes:
                    tensors = inputs(ranks, n, getattr(torch, name), seed=n + number)
                    inner = (None, BlockInt(8, block=32), QSGD(8), Raw("float32"))[number % 4]
                    for op in ("mean", "sum"):
                        options = {"op": op, "seed": 3, "step": 5 + number, "inner": inner}
                        nodes = ranks // local
                        wanted = simulate.all_reduce(tensors, codec, nodes=nodes, **options)
                        for algorithm in ("auto", "two_phase"):
                            x = tensors[rank].clone().to(device)
                            out = pydist.all_reduce(
                                x, codec, group=group, algorithm=algorithm, **options
                            )
                            assert out is x
                            first_difference(x, wanted, f"{op} {codec} {n} {name} {inner}")
                            results.append(bits(x))
    finally:
        exchange.CHUNK_BYTES = whole
    return results


def is_the_flat_call_of_node_sums(rank: int, ranks: int, local: int) -> None:
    """With plain values inside, positions and draws are those of one rank a node."""
    n, group, nodes = 1003, levels(ranks, local), ranks // local
    for codec in (*CODECS, Sign(None)):
        tensors = inputs(ranks, n, torch.float32, seed=7)
        sums = []
        for i in range(nodes):
            part = np.stack([x.numpy() for x in tensors[i * local : (i + 1) * local]])
            sums.append(torch.from_numpy(reference_raw.sum_values(part, "float32")[0]))
        for op in ("sum", "vote") if codec == Sign(None) else ("sum",):
            wanted = simulate.all_reduce(sums, codec, op=op, seed=1, step=2)
            x = tensors[rank].clone()
            pydist.all_reduce(x, codec, op=op, group=group, seed=1, step=2)
            first_difference(x, wanted, f"{op} {codec}")
            simulated = simulate.all_reduce(tensors, codec, op=op, seed=1, step=2, nodes=nodes)
            first_difference(simulated, wanted, f"simulated {op} {codec}")


def votes(rank: int, ranks: int, local: int) -> None:
    """A node has one voice; ties, zeros and means are those of as many ranks as nodes."""
    group, nodes = levels(ranks, local), ranks // local
    for n in (0, 1, 33, 1001):
        tensors = inputs(ranks, n, torch.float32, seed=n)
        for op, ties in (("vote", "hash"), ("vote", "zero"), ("mean", "hash"), ("sum", "hash")):
            options = {"op": op, "ties": ties, "seed": 7, "step": n}
            x = tensors[rank].clone()
            pydist.all_reduce(x, Sign(None), group=group, **options)
            wanted = simulate.all_reduce(tensors, Sign(None), nodes=nodes, **options)
            first_difference(x, wanted, f"{op} {ties} of {n}")
            largest = float(x.abs().max()) if n else 0.0
            assert largest <= (nodes if op == "sum" else 1), f"{op}: {largest}"


def near_the_exact_mean(rank: int, ranks: int, local: int) -> None:
    """Two roundings of a code each, of what is summed: within their steps of the exact mean."""
    n, group, block = 5000, levels(ranks, local), 64
    nodes = ranks // local
    tensors = inputs(ranks, n, torch.float32, seed=3)
    exact = torch.stack(tensors).double().mean(0)
    codec = BlockInt(8, block=block)
    x = tensors[rank].clone()
    pydist.all_reduce(x, codec, group=group, seed=1, step=2)
    # Rounded to nearest: half a step of each node's sum (its largest value over 127), divided by
    # all ranks, and half a step of the mean; and float32 sums.
    sums = torch.stack(tensors).view(nodes, local, n).sum(1)
    largest = lambda y: torch.stack([part.abs().max() for part in y.split(block)])  # noqa: E731
    step = sum(largest(total) for total in sums) / 127 / ranks
    first = step.repeat_interleave(block)[:n]
    mean = largest(exact.float() + 0).repeat_interleave(block)[:n]
    bound = 0.5 * first + 0.5 * (mean + 0.5 * first.max()) / 127 + 1e-6 * exact.abs().max()
    error = (x.double() - exact).abs()
    assert bool((error <= bound).all()), float((error / bound).max())
    flat = tensors[rank].clone()
    pydist.all_reduce(flat, codec, seed=1, step=2)
    flat_error = float((flat.double() - exact).norm())
    assert float((x.double() - exact).norm()) < 2 * flat_error


def mesh_and_shapes(rank: int, ranks: int, local: int) -> None:
    """A mesh is two groups; views are written in place."""
    mesh = init_device_mesh("cpu", (ranks // local, local), mesh_dim_names=("across", "inside"))
    tensors = inputs(ranks, 60, torch.float32, seed=1)
    wanted = simulate.all_reduce(tensors, QSGD(4), nodes=ranks // local, seed=1, step=0)
    assert state_dict(mesh) == {"step": 0}
    x = tensors[rank].clone()
    pydist.all_reduce(x, QSGD(4), group=mesh, seed=1)
    first_difference(x, wanted, "mesh")
    assert state_dict(mesh) == {"step": 1}
    load_state_dict({"step": 0}, mesh)
    wide = torch.full((6, 20), 7.0)
    view = wide[:, 5:15]
    view.copy_(tensors[rank].view(6, 10))
    work = pydist.all_reduce(view, QSGD(4), group=mesh, seed=1, async_op=True)
    assert work.wait() is view and work.is_completed() and work.wait(1) is view
    first_difference(view, wanted.view(6, 10), "view")
    assert bool((wide[:, :5] == 7).all()) and bool((wide[:, 15:] == 7).all())


def not_finite(rank: int, ranks: int, local: int) -> None:
    """On any rank, in any share: NaN on all ranks of all nodes; so is what float16 cannot hold."""
    group = levels(ranks, local)
    for codec in (QSGD(4, 32), Sign(None), Raw()):
        for who in range(ranks):
            x = torch.ones(1001)
            if rank == who:
                x[500 * (who % 3)] = float("inf") if who % 2 else float("nan")
            pydist.all_reduce(x, codec, group=group)
            assert bool(x.isnan().all()), f"{codec} on rank {who}"
        x = torch.ones(1001)
        pydist.all_reduce(x, codec, group=group)
        assert bool(x.isfinite().all()), "the flag of one call reached the next"
    for value, dtype in ((3e38, torch.float32), (6e4, torch.float16)):  # sums beyond them
        x = torch.full((1001,), 1.0, dtype=dtype)
        x[7] = value
        tensors = [x] * ranks
        wanted = simulate.all_reduce(tensors, BlockInt(8), op="sum", nodes=ranks // local)
        assert bool(wanted.isnan().all()) == (ranks > 1)
        x = x.clone()
        pydist.all_reduce(x, BlockInt(8), op="sum", group=group)
        first_difference(x, wanted, f"{value}")


# --------------------------------------------------------------------------- order


def in_flight(rank: int, ranks: int, local: int, rounds: int, pause: float) -> None:
    """Many calls at once, on the grid, on its groups and on all ranks, with random pauses."""
    chance, group = random.Random(rank), levels(ranks, local)
    nodes, node, place = ranks // local, rank // local, rank % local
    for turn in range(rounds):
        works: list[tuple[Any, Tensor, Tensor]] = []
        for i, codec in enumerate([*CODECS, Sign(None)]):
            tensors = inputs(ranks, 700 * i + 33, torch.float32, seed=8 * turn + i)
            options: dict[str, Any] = {"seed": i, "step": turn}
            kinds: list[tuple[Any, list[Tensor], dict[str, Any]]] = [
                (group, tensors, {"nodes": nodes}),
                (group[0], tensors[place::local], {}),
                (group[1], tensors[node * local : (node + 1) * local], {}),
                (None, tensors, {}),
            ]
            for where, those, more in kinds:
                x = tensors[rank].clone()
                work = pydist.all_reduce(x, codec, group=where, async_op=True, **options)
                works.append((work, x, simulate.all_reduce(those, codec, **options, **more)))
                time.sleep(chance.random() * pause)
        for work, x, wanted in reversed(works):
            work.wait()
            first_difference(x, wanted, f"round {turn}")


# --------------------------------------------------------------------------- errors


def differs(rank: int, ranks: int, local: int, who: list[int], change: dict[str, Any]) -> Any:
    """Some ranks ask for something else; all raise, and the grid is as good as before."""
    group, results = levels(ranks, local), []
    good = torch.ones(1000)
    before = pydist.all_reduce(good, BlockInt(8), group=group, async_op=True)  # still under way
    options = {"codec": QSGD(4), "op": "mean", "step": 1, "group": group}
    if rank in who:
        options |= change
    x = torch.ones(int(options.pop("n", 64)))  # type: ignore[call-overload]
    codec = options.pop("codec")
    works: list[Any] = []
    results.append(
        raised_by(lambda: works.append(pydist.all_reduce(x, codec, async_op=True, **options)))
    )
    if works:
        results[-1] = raised_by(works[0].wait)
    assert bool((x == 1).all()), "something was written"
    before.wait()
    after = torch.ones(1000)
    pydist.all_reduce(after, BlockInt(8), group=group)
    assert bool((after == 1).all()) and bool((good == 1).all())
    return results[-1]


def no_grid(rank: int, ranks: int, kind: str) -> tuple[str, str]:
    """Groups that four ranks cannot use as two levels."""
    across, inside = levels(ranks, 2)
    crosswise = [dist.new_group([0, 3]), dist.new_group([1, 2])][0 if rank in (0, 3) else 1]
    pair = {
        "swapped on one rank": (inside, across) if rank == 0 else (across, inside),
        "swapped on two ranks": (inside, across) if rank in (0, 3) else (across, inside),
        "one group twice": (inside, inside),
        "the world and a node": (dist.group.WORLD, inside),
        "crosswise": (crosswise, inside),
    }[kind]
    result = raised_by(lambda: pydist.all_reduce(torch.ones(5), QSGD(4), group=pair))
    x = torch.ones(9)
    pydist.all_reduce(x, QSGD(4), group=(across, inside))
    assert bool((x == 1).all())
    return result


def wrong(rank: int, ranks: int) -> None:
    """What no rank can use; nobody waits for anybody."""
    pair, x, y = levels(ranks, 2), torch.ones(8), torch.ones(2)
    gather, scatter = pydist.all_gather, pydist.reduce_scatter
    line = init_device_mesh("cpu", (ranks,))
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: pydist.all_reduce(x, QSGD(4), group=line), ValueError, "2 dimensions .* got 1"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=(*pair, pair[0])), TypeError, "two groups"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=(pair[0], 3)), TypeError, "ProcessGroup, int"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=(pair[0], dist.GroupMember.NON_GROUP_MEMBER)),
         ValueError, f"rank {rank} is not in both groups"),
        (lambda: pydist.all_reduce(x, QSGD(4), inner=Raw()), ValueError, "inner=Raw.* two levels"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=pair, inner=3), TypeError, "codec .* got int"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=pair, op="vote"), ValueError, "op='vote'"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=pair, algorithm="x"), ValueError, "algorith"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=pair, seed=-1), ValueError, "seed must be"),
        (lambda: pydist.all_reduce(x, QSGD(4), group=pair, step=-1), ValueError, "step must be"),
        (lambda: gather(x, x[:3], QSGD(4), group=pair), ValueError, "output must have 4 x 3"),
        (lambda: scatter(x[:3], x, QSGD(4), group=pair), ValueError, "input must have 4 x 3"),
        (lambda: scatter(x[1:3], x, QSGD(4), group=pair), ValueError, "overlap"),
        (lambda: scatter(y, x, QSGD(4), group=pair, op="vote"), ValueError, "op='vote'"),
        (lambda: scatter(y, x, QSGD(4), group=pair, inner=3), TypeError, "codec .* got int"),
        (lambda: scatter(y, x, QSGD(4), inner=Raw()), ValueError, "inner=Raw.* two levels"),
        (lambda: scatter(y, x, QSGD(4), group=line), ValueError, "2 dimensions .* got 1"),
    ]  # fmt: skip
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    pydist.all_reduce(x, QSGD(4), group=pair)
    assert bool((x == 1).all())


def traffic(rank: int, ranks: int, local: int, n: int) -> dict[str, int]:
    """Bytes of messages that this rank sent across and inside in a call."""
    group = levels(ranks, local)
    where = hierarchy.grid(group)
    before = where.traffic()
    pydist.all_reduce(torch.ones(n), BlockInt(8, block=64), group=group, algorithm="two_phase")
    after = where.traffic()
    return {
        level: sum((after[level] - before[level]).values())
        - sum((after[level] - before[level])[what] for what in ("agreement", "confirmation"))
        for level in after
    }


def a_lost_rank(rank: int, ranks: int) -> Any:
    """Rank 3 dies; the ranks of its node fail, and so does the other node, at once."""
    group = levels(ranks, 2)
    pydist.all_reduce(torch.ones(8), QSGD(4), group=group)
    if rank == 3:
        import os

        os._exit(0)
    return raised_by(lambda: pydist.all_reduce(torch.ones(8), QSGD(4), group=group))
