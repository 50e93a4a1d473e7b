"""What ranks do in test_parts.py: reduce-scatter and all-gather on two levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ranks_codecs import CODECS, DTYPES, first_difference, inputs
from ranks_collectives import bits
from ranks_custom import CODECS as CUSTOM
from ranks_faults import raised_by
from ranks_hierarchy import levels
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import pydist
from pydist import QSGD, BlockInt, Raw, Sign, Ternary, TopK, simulate
from pydist.collectives import grid as hierarchy
from pydist.collectives.flat import load_state_dict, state_dict
from pydist.encoding.choose import unit_of
from pydist.transport import exchange

EVERY = [*CODECS, *CUSTOM.values(), Sign(None)]
INNER = (None, BlockInt(8, block=32), QSGD(8), Raw("float16"), TopK(0.5, block=32))


@contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    """Chunks of so many bytes."""
    whole, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, size or exchange.CHUNK_BYTES
    try:
        yield
    finally:
        exchange.CHUNK_BYTES = whole


# --------------------------------------------------------------------------- values


def gathers_equal_one_level(
    rank: int, ranks: int, local: int, sizes: list[int], chunk: int | None = None,
    codecs: list[Any] = EVERY, device: str = "cpu",
) -> list[bytes]:  # fmt: skip
    """Every codec, any length, another dtype of the output: bit for bit."""
    group, results = levels(ranks, local), []
    with chunks_of(chunk):
        for number, codec in enumerate(codecs):
            for i, n in enumerate(sizes):
                name, other = (DTYPES[(number + i + j) % 3] for j in range(2))
                tensors = inputs(ranks, n, getattr(torch, name), seed=n + number)
                found = []
                for where in (group, None):
                    out = torch.empty(ranks, n, dtype=getattr(torch, other), device=device)
                    x = tensors[rank].to(device)
                    got = pydist.all_gather(out, x, codec, group=where, seed=3, step=number)
                    assert got is out
                    found.append(out)
                first_difference(*found, f"{codec} {n} {name} {other}")
                if name == other:
                    wanted = simulate.all_gather(tensors, codec, seed=3, step=number)
                    first_difference(found[0], wanted, f"simulated {codec} {n} {name}")
                results.append(bits(found[0]))
    return results


def scatters_equal_simulation(
    rank: int, ranks: int, local: int, sizes: list[int], chunk: int | None = None,
    codecs: list[Any] = EVERY, device: str = "cpu",
) -> None:  # fmt: skip
    """Every codec, all ways of reducing, other codecs inside; any length."""
    group, nodes = levels(ranks, local), ranks // local
    with chunks_of(chunk):
        for number, codec in enumerate(codecs):
            ops = ("mean", "sum", "vote") if codec == Sign(None) else ("mean", "sum")
            for i, n in enumerate(sizes):
                name = DTYPES[(number + i) % 3]
                tensors = inputs(ranks, n * ranks, getattr(torch, name), seed=n + number)
                inner = INNER[(number + i) % len(INNER)]
                for op in ops:
                    options = {"op": op, "seed": 3, "step": 5 + number, "inner": inner}
                    wanted = simulate.reduce_scatter(tensors, codec, nodes=nodes, **options)
                    out = torch.empty(n, dtype=getattr(torch, name), device=device)
                    x = tensors[rank].to(device)
                    assert pydist.reduce_scatter(out, x, codec, group=group, **options) is out
                    first_difference(out, wanted[rank], f"{op} {codec} {n} {name} {inner}")


def is_the_flat_call_of_node_sums(rank: int, ranks: int, local: int) -> None:
    """Parts of whole blocks and plain values inside: those of one rank per node."""
    group, nodes = levels(ranks, local), ranks // local
    for codec in EVERY:
        if isinstance(codec, Ternary):  # each part has a scaler of its own
            continue
        n = 3 * unit_of(codec)
        tensors = inputs(ranks, n * ranks, torch.float32, seed=7)
        sums = []
        for j in range(nodes):
            total = torch.zeros(n * ranks)
            for x in tensors[j * local : (j + 1) * local]:
                total += x
            sums.append(total)
        for op in ("sum", "vote") if codec == Sign(None) else ("sum",):
            flat = simulate.reduce_scatter(sums, codec, op=op, seed=1, step=2)
            wanted = torch.cat(flat).view(ranks, n)[rank]
            out = torch.empty(n)
            pydist.reduce_scatter(out, tensors[rank], codec, op=op, group=group, seed=1, step=2)
            first_difference(out, wanted, f"{op} {codec}")


def in_place_and_counted(rank: int, ranks: int, local: int) -> None:
    """A mesh; this rank's place in the other tensor; views; the counter; eight in flight."""
    mesh = init_device_mesh("cpu", (ranks // local, local), mesh_dim_names=("across", "inside"))
    n, nodes, codec = 60, ranks // local, QSGD(4, block=32)
    tensors = inputs(ranks, n * ranks, torch.float32, seed=1)
    shares = simulate.reduce_scatter(tensors, codec, nodes=nodes, seed=1, step=0)
    gathered = simulate.all_gather([x[:n] for x in tensors], codec, seed=1, step=1)
    x = tensors[rank].clone()
    pydist.reduce_scatter(x[rank * n :][:n], x, codec, group=mesh, seed=1)
    first_difference(x[rank * n :][:n], shares[rank], "in place")
    everything = torch.empty(ranks, n)
    everything[rank] = tensors[rank][:n]
    pydist.all_gather(everything, everything[rank], codec, group=mesh, seed=1)
    first_difference(everything, gathered, "in place")
    assert state_dict(mesh) == {"step": 2}
    load_state_dict({"step": 0}, mesh)
    works: list[tuple[Any, Tensor, Tensor]] = []
    for step in range(4):
        wide, wide_all = torch.full((6, 20), 7.0), torch.full((ranks, 2 * n), 7.0)
        out, out_all = wide[:, 5:15], wide_all[:, ::2]
        both = tensors[rank].clone(), tensors[rank][:n].clone()
        options: dict[str, Any] = {"group": mesh, "seed": 1, "async_op": True}
        scatter = pydist.reduce_scatter(out, both[0], codec, step=0, **options)
        gather = pydist.all_gather(out_all, both[1], codec, step=1, **options)
        works += [(scatter, out, shares[rank].view(6, 10)), (gather, out_all, gathered)]
        assert state_dict(mesh) == {"step": 2 * step + 2}
    for work, out, wanted in reversed(works):
        assert work.wait() is out and work.is_completed()
        first_difference(out, wanted, "in flight")
    assert bool((wide[:, :5] == 7).all()) and bool((wide_all[:, 1::2] == 7).all())


def not_finite(rank: int, ranks: int, local: int) -> None:
    """On any rank, in any part: NaN on all ranks; a sum that a node cannot hold, too."""
    group, n = levels(ranks, local), 701
    with chunks_of(1000):
        for codec in (QSGD(4, 32), Sign(None), Raw(), Ternary(), QSGD(2, 64, entropy="elias")):
            for who in range(ranks):
                x = torch.ones(n * ranks)
                if rank == who:
                    x[(who + 1) % ranks * n + 600] = float("inf") if who % 2 else float("nan")
                out, everything = torch.ones(n), torch.ones(ranks, n * ranks)
                pydist.reduce_scatter(out, x, codec, group=group)
                pydist.all_gather(everything, x, codec, group=group)
                assert bool(out.isnan().all()) and bool(everything.isnan().all()), f"{codec} {who}"
            pydist.reduce_scatter(out, torch.ones(n * ranks), codec, group=group)
            pydist.all_gather(everything, torch.ones(n * ranks), codec, group=group)
            assert bool(out.isfinite().all() and everything.isfinite().all()), f"{codec}"
    overflows(rank, ranks, local, group)


def overflows(rank: int, ranks: int, local: int, group: Any) -> None:
    """Finite values that become infinite: as simulated, and as on one level."""
    x = torch.ones(64 * ranks)
    x[70] = 3e38  # of rank 1's part, which a node of two cannot sum
    out = torch.ones(64)
    wanted = simulate.reduce_scatter([x] * ranks, QSGD(4), nodes=ranks // local)
    pydist.reduce_scatter(out, x, QSGD(4), group=group)
    first_difference(out, wanted[rank], "a node's sum")
    assert bool(out.isnan().all()) == (local > 1)
    halves = torch.zeros(2, ranks, 64, dtype=torch.float16)
    y = torch.full((64,), 1e5 if rank == ranks - 1 else 1.0)
    for i, where in enumerate((group, None)):
        pydist.all_gather(halves[i], y, QSGD(8), group=where, step=1)
    first_difference(halves[0], halves[1], "beyond float16")
    assert bool(halves[0][-1].isinf().all()) and bool(halves[0][0].isfinite().all())


def traffic(rank: int, ranks: int, local: int, n: int) -> list[dict[str, dict[str, int]]]:
    """Bytes that this rank sent across and inside, by phase: a scatter, a gather."""
    group, codec, found = levels(ranks, local), BlockInt(8, block=64), []
    where = hierarchy.grid(group)
    x, part = torch.ones(n * ranks), torch.ones(n)
    for call in (
        lambda: pydist.reduce_scatter(part, x, codec, group=group),
        lambda: pydist.all_gather(x, part, codec, group=group),
    ):
        before = where.traffic()
        call()
        after = where.traffic()
        found.append({level: dict(after[level] - before[level]) for level in after})
    return found


# --------------------------------------------------------------------------- errors


def differs(rank: int, ranks: int, kind: str, who: list[int], change: dict[str, Any]) -> Any:
    """Some ranks ask for something else; all raise, and the grid is as good as before."""
    group = levels(ranks, 2)
    options: dict[str, Any] = {"kind": kind, "codec": QSGD(4), "n": 64, "step": 1}
    if rank in who:
        options |= change
    n, call = options.pop("n"), options.pop("kind")
    large, small = torch.ones(n * ranks), torch.ones(n)
    pair = (large, small) if call == "all_gather" else (small, large)
    if call == "all_reduce":
        pair = (small,)
    result = raised_by(lambda: getattr(pydist, call)(*pair, group=group, **options))
    assert bool((large == 1).all()) and bool((small == 1).all()), "something was written"
    pydist.all_gather(torch.empty(4 * ranks), torch.ones(4), BlockInt(8), group=group)
    pydist.reduce_scatter(torch.empty(4), torch.ones(4 * ranks), BlockInt(8), group=group)
    pydist.all_reduce(torch.ones(4), BlockInt(8), group=group)
    return result
