"""What ranks do in test_codecs.py: block codecs and votes in messages."""

from __future__ import annotations

import random
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
import ternary_oracle
import torch
from ranks_collectives import bits
from ranks_faults import raised_by, short_group, still_works
from torch import Tensor

import pydist
from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK, simulate
from pydist.formats import wire
from pydist.reference import blocks as rb
from pydist.reference import raw as reference_raw
from pydist.reference import topk as rt
from pydist.reference.signs import round_to
from pydist.transport import exchange
from pydist.transport.communicator import communicator
from pydist.transport.variable import VariableMessages

DTYPES = ["float32", "float16", "bfloat16"]

CODECS = [
    Sign("l1", block=64), Sign("l2"), QSGD(2, block=32), QSGD(3, block=96, norm="l2"), QSGD(4),
    QSGD(8, block=128), QSGD(4, norm="l2", entropy="elias"), QSGD(2, block=64, entropy="elias"),
    BlockInt(2), BlockInt(5, block=32), BlockInt(4, rounding="stochastic"),
    BlockInt(8), BlockFloat(block=32), BlockFloat("e5m2"), Raw(), Raw("float32"), Raw("float16"),
    Raw("bfloat16"), Ternary(), Ternary(None), TopK(0.1, block=64),
    TopK(0.5, block=32, values="bfloat16"),
]  # fmt: skip
Codec = Any


def inputs(ranks: int, n: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Every rank's tensor, known to all ranks: values of many magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(ranks):
        x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()
        x[torch.rand(n, generator=generator) < 0.1] = 0
        tensors.append(x.to(dtype))
    return tensors


def first_difference(got: Tensor, wanted: Tensor, what: str) -> None:
    """Raises AssertionError where two tensors are not bit-identical."""
    if bits(got) != bits(wanted):
        got, wanted = got.reshape(-1), wanted.reshape(-1)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
        places = [i for i in range(got.numel()) if bits(got[i : i + 1]) != bits(wanted[i : i + 1])]
        i = places[0]
        raise AssertionError(
            f"{what}: {len(places)} differ, element {i} is {got[i]}, expected {wanted[i]}"
        )


class Reference:
    """A codec by its specification.

    Args:
        codec: The codec.
        seed: Seed of the call.
        step: Step of the call.
    """

    def __init__(self, codec: Codec, seed: int, step: int) -> None:
        self.topk = isinstance(codec, TopK)
        self.form = codec.topk_format if self.topk else codec.block_format
        self.seed, self.step = seed, step

    def payloads(self, tensors: list[Tensor], table: wire.IntArray | None = None) -> Any:
        """What the ranks encode."""
        return np.stack([self._payload(x.float().numpy(), r, table) for r, x in enumerate(tensors)])

    def _payload(self, x: Any, rank: int, table: wire.IntArray | None) -> Any:
        if self.topk:
            return rt.select(x, self.form, seed=self.seed, step=self.step, segments=table)[0]
        return rb.quantize(
            x, self.form, zero_bit=(rank + self.step) % 2,
            draws=rb.Draws(self.seed, rank, 0, self.step), segments=table,
        )[0]  # fmt: skip

    def sum(self, payloads: Any, n: int, *, mean: bool = False, table: Any = None) -> Any:
        """What they decode to, added up."""
        add = rt.scatter if self.topk else rb.sum_quantized
        return add(payloads, self.form, n, mean=mean, segments=table)

    def reduce(self, payloads: Any, n: int, *, mean: bool) -> Any:
        """What an owner makes of them."""
        if self.topk:
            options = {"seed": self.seed, "step": self.step}
            return rt.reduce(payloads, self.form, n, mean=mean, **options)[0]
        return rb.reduce_quantized(
            payloads, self.form, n, mean=mean, zero_bit=self.step % 2,
            draws=rb.Draws(self.seed, 0, 1, self.step),
        )[0]  # fmt: skip


def _stored(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(round_to(values, str(dtype)[6:])).to(dtype)


def _raw_sum(tensors: list[Tensor], codec: Raw, op: str, to: Any = None) -> Tensor:
    """What the ranks' plain values add up to, rounded to ``to``, default the wire's dtype."""
    dtype: Any = codec.dtype or str(tensors[0].dtype)[6:]
    sent = np.stack([round_to(x.float().numpy(), dtype) for x in tensors])
    total, _ = reference_raw.sum_values(sent, to or dtype, mean=op == "mean")
    return _stored(total, tensors[0].dtype)


def expected_all_reduce(
    tensors: list[Tensor], codec: Codec, *, op: str, seed: int, step: int
) -> Tensor:
    """The result by the specification."""
    if isinstance(codec, Raw):
        return _raw_sum(tensors, codec, op)
    if isinstance(codec, Ternary):
        total = ternary_oracle.all_reduce(
            tensors, codec.clip, mean=op == "mean", seed=seed, step=step
        )
        return _stored(total, tensors[0].dtype)
    reference, n = Reference(codec, seed, step), tensors[0].numel()
    reduced = reference.reduce(reference.payloads(tensors), n, mean=op == "mean")
    return _stored(reference.sum(reduced[None], n), tensors[0].dtype)


def expected_reduce_scatter(
    tensors: list[Tensor], codec: Codec, *, op: str, seed: int, step: int
) -> Tensor:
    """All ranks' shares by the specification, one behind the other."""
    if isinstance(codec, Raw):
        return _raw_sum(tensors, codec, op, str(tensors[0].dtype)[6:])
    if isinstance(codec, Ternary):
        shares = ternary_oracle.reduce_scatter(
            tensors, codec.clip, mean=op == "mean", seed=seed, step=step
        )
        return _stored(shares, tensors[0].dtype)
    reference, n, ranks = Reference(codec, seed, step), tensors[0].numel(), len(tensors)
    table = wire.segments([n // ranks] * ranks, block=reference.form.block)
    payloads = reference.payloads(tensors, table)
    total = reference.sum(payloads, n, mean=op == "mean", table=table)
    return _stored(total, tensors[0].dtype)


def expected_all_gather(tensors: list[Tensor], codec: Codec, *, seed: int, step: int) -> Tensor:
    """All ranks' tensors by the specification, one behind the other."""
    if isinstance(codec, Raw):
        return torch.cat([_raw_sum([x], codec, "sum") for x in tensors])
    if isinstance(codec, Ternary):
        values = ternary_oracle.all_gather(tensors, codec.clip, seed=seed, step=step)
        return _stored(values, tensors[0].dtype)
    reference = Reference(codec, seed, step)
    values = [reference.sum(p[None], tensors[0].numel()) for p in reference.payloads(tensors)]
    return _stored(np.concatenate(values), tensors[0].dtype)


# --------------------------------------------------------------------------- values


def equals_reference(
    rank: int, ranks: int, codecs: list[Codec], sizes: list[int], every_dtype: bool
) -> list[bytes]:
    """Every collective; rank 0 compares with the specification, the test the ranks.

    Sizes take the dtypes in turn, each codec from another one on; or every one.
    """
    results = []
    for number, codec in enumerate(codecs):
        for i, n in enumerate(sizes):
            for name in DTYPES if every_dtype else [DTYPES[(number + i) % len(DTYPES)]]:
                dtype, options = getattr(torch, name), {"seed": 11, "step": 5 + number}
                what = f"{codec}, {n} {name}"
                for op in ("mean", "sum"):
                    tensors = inputs(ranks, n, dtype, seed=n + number)
                    wanted = simulate.all_reduce(tensors, codec, op=op, **options)
                    if rank == 0:
                        by_hand = expected_all_reduce(tensors, codec, op=op, **options)
                        first_difference(wanted, by_hand, f"simulated {op} of {what}")
                    for algorithm in ("auto", "two_phase", "all_gather"):
                        x = tensors[rank].clone()
                        out = pydist.all_reduce(x, codec, op=op, algorithm=algorithm, **options)
                        assert out is x
                        first_difference(x, wanted, f"{algorithm} {op} of {what}")
                        results.append(bits(x))
                    tensors = inputs(ranks, n * ranks, dtype, seed=n + number)
                    shares = simulate.reduce_scatter(tensors, codec, op=op, **options)
                    if rank == 0:
                        by_hand = expected_reduce_scatter(tensors, codec, op=op, **options)
                        first_difference(torch.cat(shares), by_hand, f"simulated scatter {what}")
                    out = torch.empty(n, dtype=dtype)
                    got = pydist.reduce_scatter(out, tensors[rank], codec, op=op, **options)
                    assert got is out
                    first_difference(out, shares[rank], f"reduce_scatter {op} of {what}")
                tensors = inputs(ranks, n, dtype, seed=n + number)
                wanted = simulate.all_gather(tensors, codec, **options)
                if rank == 0:
                    by_hand = expected_all_gather(tensors, codec, **options)
                    first_difference(wanted, by_hand, f"simulated gather {what}")
                out = torch.empty(n * ranks, dtype=dtype)
                assert pydist.all_gather(out, tensors[rank], codec, **options) is out
                first_difference(out, wanted, f"all_gather of {what}")
                results.append(bits(out))
    return results


def equals_simulation(
    rank: int, ranks: int, codecs: list[Codec], n: int, chunk: int | None,
    dtype: str = "float32", device: str = "cpu", group: Any = None,
) -> list[bytes]:  # fmt: skip
    """Large tensors, or many small chunks: real ranks against simulated ones in one chunk."""
    results, like = [], {"dtype": getattr(torch, dtype), "device": device}
    for number, codec in enumerate(codecs):
        tensors = inputs(ranks, n * ranks, like["dtype"], seed=number)
        mine = tensors[rank].to(device)
        options = {"seed": 3, "step": number}
        whole = exchange.CHUNK_BYTES
        exchange.CHUNK_BYTES = 1 << 40
        wanted = simulate.all_reduce(tensors, codec, **options)
        share = simulate.reduce_scatter(tensors, codec, **options)[rank]
        gathered = simulate.all_gather([x[:n] for x in tensors], codec, **options)
        exchange.CHUNK_BYTES = chunk or whole
        try:
            for algorithm in ("two_phase", "all_gather"):
                x = mine.clone()
                pydist.all_reduce(x, codec, algorithm=algorithm, group=group, **options)
                first_difference(x, wanted, f"{algorithm} {codec}")
                results.append(bits(x))
            out = torch.empty(n, **like)
            pydist.reduce_scatter(out, mine, codec, group=group, **options)
            first_difference(out, share, f"reduce_scatter {codec}")
            out = torch.empty(ranks, n, **like)
            pydist.all_gather(out, mine[:n], codec, group=group, **options)
            first_difference(out, gathered, f"all_gather {codec}")
            results.append(bits(out))
            simulated = simulate.all_reduce(tensors, codec, **options)
            first_difference(simulated, wanted, f"simulated in chunks {codec}")
        finally:
            exchange.CHUNK_BYTES = whole
    return results


def votes(
    rank: int, ranks: int, sizes: list[int], chunk: int | None,
    device: str = "cpu", group: Any = None,
) -> None:  # fmt: skip
    """Simulated votes, and those of shares and gathered signs."""
    codec, whole = Sign(scale=None), exchange.CHUNK_BYTES
    exchange.CHUNK_BYTES = chunk or whole
    try:
        for n in sizes:
            tensors = inputs(ranks, n, torch.float32, seed=n)
            options = {"seed": 7, "step": n}
            mine = {"group": group, **options}
            for op, ties in (("vote", "hash"), ("vote", "zero"), ("mean", "hash"), ("sum", "hash")):
                x = tensors[rank].clone().to(device)
                pydist.all_reduce(x, codec, op=op, ties=ties, algorithm="two_phase", **mine)
                wanted = simulate.all_reduce(tensors, codec, op=op, ties=ties, **options)
                first_difference(x, wanted, f"{op} {ties} of {n}")
            signs = torch.stack(
                [torch.where(x == 0, 2.0 * ((r + n) % 2) - 1, x.sign()) for r, x in
                 enumerate(tensors)]
            )  # fmt: skip
            out = torch.empty(ranks, n, device=device)
            pydist.all_gather(out, tensors[rank].to(device), codec, **mine)
            first_difference(out, signs, f"signs of {n}")
            first_difference(out, simulate.all_gather(tensors, codec, **options), f"{n}")
            for op in ("mean", "sum", "vote"):
                every = [torch.cat([x.roll(i) for i in range(ranks)]) for x in tensors]
                shares = simulate.reduce_scatter(every, codec, op=op, **options)
                out = torch.empty(n, device=device)
                pydist.reduce_scatter(out, every[rank].to(device), codec, op=op, **mine)
                first_difference(out, shares[rank], f"share of {op} of {n}")
                if op != "vote":
                    total = signs.roll(rank, 1).sum(0)
                    first_difference(out, total / ranks if op == "mean" else total, f"{op} {n}")
    finally:
        exchange.CHUNK_BYTES = whole


def not_finite(
    rank: int, ranks: int, codecs: Any = None, device: str = "cpu", group: Any = None
) -> None:  # fmt: skip
    """On any rank, in any chunk, of any share: everything is NaN on all ranks."""
    exchange.CHUNK_BYTES, whole = 1000, exchange.CHUNK_BYTES
    n = 1501
    try:
        for codec in codecs or (*CODECS, Sign(None)):
            for who, at in ((0, 0), (ranks - 1, n * ranks - 1)):
                x = torch.ones(n * ranks, device=device)
                if rank == who:
                    x[at] = float("nan") if who else float("-inf")
                out = torch.ones(n, device=device)
                everything = torch.ones(ranks, n * ranks, device=device)
                pydist.reduce_scatter(out, x, codec, group=group)
                pydist.all_gather(everything, x, codec, group=group)
                assert bool(out.isnan().all()) and bool(everything.isnan().all()), f"{codec} {who}"
                for algorithm in ("two_phase", "all_gather"):
                    y = x.clone()
                    pydist.all_reduce(y, codec, group=group, algorithm=algorithm)
                    assert bool(y.isnan().all()), f"{codec} on rank {who}, {algorithm}"
            y = torch.ones(n, device=device)
            pydist.all_reduce(y, codec, group=group)
            assert bool(y.isfinite().all()), "the flag of one call reached the next"
    finally:
        exchange.CHUNK_BYTES = whole


def overflow(rank: int, ranks: int) -> None:
    """A sum that float32 cannot hold, in one block of one shard: NaN everywhere."""
    x = torch.ones(5000)
    x[4000] = torch.finfo(torch.float32).max
    wanted = simulate.all_reduce([x] * ranks, BlockInt(8), op="sum")
    assert bool(wanted.isnan().all()) == (ranks > 1)
    for algorithm in ("two_phase", "all_gather"):
        y = x.clone()
        pydist.all_reduce(y, BlockInt(8), op="sum", algorithm=algorithm)
        first_difference(y, wanted, algorithm)


def beyond_range(rank: int, ranks: int) -> None:
    """What float16 cannot hold, sent or summed, is as any infinity: NaN on all ranks."""
    for value, codec in ((1e5, Raw("float16")), (4e4, Raw("float16")), (4e4, Raw())):
        dtype = torch.float16 if codec.dtype is None else torch.float32
        x = torch.ones(3000).to(dtype)
        x[2999] = value
        wanted = simulate.all_reduce([x] * ranks, codec, op="sum")
        assert bool(wanted.isnan().all()), codec
        for algorithm in ("two_phase", "all_gather"):
            y = x.clone()
            pydist.all_reduce(y, codec, op="sum", algorithm=algorithm)
            first_difference(y, wanted, f"{value} as {codec}")
    y = x.clone()
    pydist.all_reduce(y, Raw("float32"), op="mean")  # the sum fits float32, the mean float16
    assert bool((y == x).all())


# --------------------------------------------------------------------------- arguments


def shapes(rank: int, ranks: int) -> None:
    """Views, other output dtypes, results in the place of the input."""
    codec, n, options = QSGD(4, block=32), 60, {"seed": 1, "step": 2}
    tensors = inputs(ranks, n * ranks, torch.float32, seed=1)
    shares = simulate.reduce_scatter(tensors, codec, **options)
    gathered = simulate.all_gather([x[:n] for x in tensors], codec, **options)
    mine = tensors[rank]

    wide = torch.full((6, 20), 7.0)
    out = wide[:, 5:15]
    assert pydist.reduce_scatter(out, mine.view(ranks, 6, 10), codec, **options) is out
    first_difference(out, shares[rank], "view")
    assert bool((wide[:, :5] == 7).all()) and bool((wide[:, 15:] == 7).all())

    half = torch.empty(n, dtype=torch.bfloat16)
    pydist.reduce_scatter(half, mine, codec, **options)
    first_difference(half, shares[rank].bfloat16(), "bfloat16 output")
    strided = torch.stack([mine, mine], 1)[:, 0]
    out = torch.empty(n)
    pydist.reduce_scatter(out, strided, codec, **options)
    first_difference(out, shares[rank], "strided input")

    whole, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, 100  # what is written is not read later
    try:
        x = mine.clone()
        pydist.reduce_scatter(x[rank * n : (rank + 1) * n], x, codec, **options)
        first_difference(x[rank * n : (rank + 1) * n], shares[rank], "share in place")
        everything = torch.zeros(ranks, n)
        everything[rank] = mine[:n]
        pydist.all_gather(everything, everything[rank], codec, **options)
        first_difference(everything, gathered, "gathered in place")
    finally:
        exchange.CHUNK_BYTES = whole


def in_flight(rank: int, ranks: int, device: str = "cpu", group: Any = None) -> None:
    """Collectives of all kinds at once, with random pauses, waited for in reverse."""
    chance = random.Random(rank)
    cases = [(codec, i) for i, codec in enumerate([*CODECS, Sign(None)])]
    works = []
    for codec, i in cases:
        n = 300 * i + 33
        tensors = inputs(ranks, n * ranks, torch.float32, seed=i)
        options = {"seed": i, "step": i}
        mine = tensors[rank].to(device)
        x, out = mine.clone(), torch.empty(n, device=device)
        everything = torch.empty(ranks, n * ranks, device=device)
        wanted = [
            simulate.all_reduce(tensors, codec, **options),
            simulate.reduce_scatter(tensors, codec, **options)[rank],
            simulate.all_gather(tensors, codec, **options),
        ]
        results = [x, out, everything]
        options |= {"async_op": True, "group": group}
        started = [
            pydist.all_reduce(x, codec, algorithm="two_phase", **options),
            pydist.reduce_scatter(out, mine, codec, **options),
            pydist.all_gather(everything, mine, codec, **options),
        ]
        works += list(zip(started, results, wanted, strict=True))
        time.sleep(chance.random() * 0.01)
    for work, result, wanted_result in reversed(works):
        assert work.wait() is result
        first_difference(result, wanted_result, "in flight")


def differs(rank: int, ranks: int, name: str, usual: Codec, other: Codec, op: Any) -> Any:
    """One rank has another codec or op; afterwards the group is as good as before."""
    codec = other if rank == ranks - 1 else usual
    options = {} if op is None or rank != ranks - 1 else {"op": op}
    x, small, large = torch.ones(64 * ranks), torch.ones(64), torch.ones(64 * ranks)
    call = {
        "all_reduce": lambda: pydist.all_reduce(x, codec, step=1, **options),
        "reduce_scatter": lambda: pydist.reduce_scatter(small, x, codec, step=1, **options),
        "all_gather": lambda: pydist.all_gather(large, small, codec, step=1),
    }[name]
    result = raised_by(call)
    assert bool((x == 1).all()) and bool((small == 1).all()) and bool((large == 1).all())
    pydist.all_reduce(x, BlockInt(8))
    assert bool((x == 1).all())
    return result


def wrong(rank: int, ranks: int) -> None:
    """Arguments that no rank can use."""
    x, out, codec = torch.ones(4 * ranks), torch.ones(4), QSGD(4)
    y = torch.ones(4 * ranks + 4)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: pydist.all_reduce(x, codec, op="vote"), ValueError,
         r"op='vote' needs codec Sign\(scale=None\), got QSGD\(bits=4"),
        (lambda: pydist.reduce_scatter(out, x, codec, op="vote"), ValueError,
         r"op='vote' needs codec Sign\(scale=None\), got QSGD\(bits=4"),
        (lambda: pydist.all_reduce(x, codec, op="max"), ValueError, "op must be one of"),
        (lambda: pydist.all_reduce(x, "qsgd"), TypeError, "codec must be a pydist codec, got str"),
        (lambda: pydist.reduce_scatter(out, x[1:], codec), ValueError,
         f"input must have {ranks} x 4 elements .* got {4 * ranks - 1}"),
        (lambda: pydist.all_gather(x[1:], out, codec), ValueError,
         f"output must have {ranks} x 4 elements .* got {4 * ranks - 1}"),
        (lambda: pydist.all_gather(x, out.long(), codec), TypeError, "input must be float32"),
        (lambda: pydist.all_gather(x, out, codec, seed=-1), ValueError, "seed must be in"),
        (lambda: pydist.reduce_scatter(out.expand(2, 4)[:, :2], x, codec), ValueError, "output"),
        (lambda: pydist.reduce_scatter(y[1:5], y[:-4], codec), ValueError,
         "output and input overlap in memory"),
        (lambda: pydist.all_gather(y[:-4], y[-6 : -2], codec), ValueError,
         "output and input overlap in memory"),
    ]  # fmt: skip
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def traffic(rank: int, ranks: int, n: int) -> dict[str, int]:
    """Bytes of one call of each kind, by phase; n is a number of elements for each rank."""
    comm = communicator()
    before = comm.traffic.bytes_sent.copy()
    x = torch.ones(n * ranks)
    pydist.all_reduce(x, QSGD(4), algorithm="two_phase")
    pydist.reduce_scatter(x[:n].clone(), x, QSGD(4))
    pydist.all_gather(x, x[:n].clone(), QSGD(4))
    return dict(comm.traffic.bytes_sent - before)


# --------------------------------------------------------------------------- variable lengths


def elias_traffic(rank: int, ranks: int, n: int) -> tuple[dict[str, int], int]:
    """Bytes of one call of each kind, by phase, and those of one payload of zeros."""
    comm = communicator()
    before = comm.traffic.bytes_sent.copy()
    codec = QSGD(4, entropy="elias")
    x = torch.zeros(n * ranks)
    pydist.all_reduce(x, codec, algorithm="two_phase")
    pydist.reduce_scatter(x[:n].clone(), x, codec)
    pydist.all_gather(x, x[:n].clone(), codec)
    payload = pydist.ops.quantize(torch.zeros(n), codec)
    return dict(comm.traffic.bytes_sent - before), payload.numel()


def damaged_parcel(
    rank: int, ranks: int, algorithm: str, phase: str, damage: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Rank 1 sends a message whose blocks, or whose length, are wrong in one phase."""
    group = short_group(ranks)
    codec = QSGD(4, 64, "l2", entropy="elias")
    send = VariableMessages.send

    def damaged(self: VariableMessages, *args: Any) -> None:
        if self.kind.label == phase:
            pack = self.entropy_coder.pack

            def wrong(rows: Tensor, units: int, spans: Any) -> list[Tensor]:
                messages = pack(rows, units, spans)
                if damage == "length":
                    return [torch.cat([m, m.new_zeros(4000)]) for m in messages]
                for message in messages:
                    message[3] = 0xFF  # the first block's place
                return messages

            with mock.patch.object(self.entropy_coder, "pack", wrong):
                send(self, *args)
        else:
            send(self, *args)

    def call() -> None:
        x = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
        pydist.all_reduce(x, codec, group=group, algorithm=algorithm)

    with mock.patch.object(VariableMessages, "send", damaged if rank == 1 else send):
        first = raised_by(call)
    second = raised_by(call)
    still_works(rank, ranks)
    return first, second
