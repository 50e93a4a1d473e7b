"""What ranks do in test_ternary_collectives.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ranks_codecs import first_difference, inputs
from ranks_collectives import bits
from ranks_faults import raised_by

import pydist
from pydist import Ternary, ops
from pydist.transport.communicator import communicator


def exact_sums(rank: int, ranks: int, sizes: list[int]) -> list[bytes]:
    """Sums are integers times the scaler: those of the trits that the ranks drew."""
    results = []
    for n in sizes:
        codec, step = Ternary(None if n % 2 else 2.5), n
        tensors = inputs(ranks, n, torch.float32, seed=n)
        own = torch.stack([ops.ternary_scale(x, codec) for x in tensors])
        shared = own.amax(0)
        trits = torch.zeros(n)
        for r, x in enumerate(tensors):
            payload = ops.ternary_pack(x, own[r], shared=shared, seed=5, rank=r, step=step)
            trits += ops.ternary_unpack(payload, torch.ones(1), n)
        for op in ("sum", "mean"):
            share = trits / ranks if op == "mean" else trits
            for algorithm in ("two_phase", "all_gather", "auto"):
                x = tensors[rank].clone()
                pydist.all_reduce(x, codec, op=op, algorithm=algorithm, seed=5, step=step)
                first_difference(x, shared * share, f"{algorithm} {op} of {n}")
                results.append(bits(x))
    return results


def traffic(rank: int, ranks: int, n: int) -> dict[str, int]:
    """Bytes of one call of each kind, by phase; n is a number of elements for each rank."""
    comm = communicator()
    before = comm.traffic.bytes_sent.copy()
    x = torch.ones(n * ranks)
    pydist.all_reduce(x, Ternary(), algorithm="two_phase")
    pydist.reduce_scatter(x[:n].clone(), x, Ternary())
    pydist.all_gather(x, x[:n].clone(), Ternary())
    return dict(comm.traffic.bytes_sent - before)


def overflow(rank: int, ranks: int) -> None:
    """A sum that float32 cannot hold makes everything NaN; its mean is fine."""
    x = torch.ones(5000)
    x[4000] = 3e38
    for algorithm in ("two_phase", "all_gather"):
        y = x.clone()
        pydist.all_reduce(y, Ternary(None), op="sum", algorithm=algorithm)
        assert bool(y.isnan().all())
        y = x.clone()
        pydist.all_reduce(y, Ternary(None), op="mean", algorithm=algorithm)
        assert float(y[4000]) == float(x[4000])


def refused(rank: int, ranks: int) -> Any:
    """A disagreement leaves data and group as they were; no scaler has been exchanged."""
    comm = communicator()
    x = torch.full((200,), float(rank))
    before = comm.traffic.bytes_sent["scales"]
    result = raised_by(lambda: pydist.all_reduce(x, Ternary(2.5 if rank else None), step=1))
    assert comm.traffic.bytes_sent["scales"] == before
    assert bool((x == rank).all())
    pydist.all_reduce(x, Ternary(None))
    assert np.isfinite(x.numpy()).all()
    return result
