"""Results in memory that the caller gives: ``out=`` of both doors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from wrong import BETAS, Arrays

from pydist import QSGD, BlockInt, Ternary, TopK
from pydist.formats import ternary, wire

RUBBISH = 0xA5
N = 1001
GAPS = np.array([[32, 5, 0, 0], [128, N - 5, 1, 7]])  # words 0, 2 and 3 belong to no segment
GAPS_OF_UNITS = np.array([[160, 5, 0, 0], [640, N - 5, 1, 7]])
GAPS_OF_BLOCKS = np.array([[32, 5, 0, 0], [128, N - 5, 1, 32]])
DENSE = wire.segments([5, N - 5])


def values(a: Arrays, dtype: str = "float32", n: int = N) -> Any:
    return a.door.native(np.random.default_rng(n).standard_normal(n).astype(dtype))


def votes(a: Arrays, ranks: int, size: int = wire.payload_bytes(N)) -> Any:
    rng = np.random.default_rng(ranks)
    return a.door.native(rng.integers(0, 256, (ranks, size), dtype=np.uint8))


def trits(a: Arrays, ranks: int) -> Any:
    rng, size = np.random.default_rng(ranks), ternary.payload_bytes(N)
    return a.door.native(rng.integers(0, 243, (ranks, size), dtype=np.uint8))


def rows(a: Arrays, table: Any) -> dict[str, Any]:
    return {"segments": a.door.native(table)}


# name: the call, given where its result goes (or nothing)
CALLS: dict[str, Any] = {
    "pack_signs": lambda a, **out: a.pack_signs(values(a), **out),
    "pack_signs empty": lambda a, **out: a.pack_signs(values(a, n=0), **out),
    "pack_signs segments": lambda a, **out: a.pack_signs(values(a), **rows(a, DENSE), **out),
    "pack_signs gaps": lambda a, **out: a.pack_signs(values(a), **rows(a, GAPS), **out),
    "unpack_votes": lambda a, **out: a.unpack_votes(votes(a, 2), N, **out),
    "unpack_votes mean": lambda a, **out: a.unpack_votes(
        votes(a, 3), N, ranks=5, mean=True, **out
    ),
    "unpack_signs": lambda a, **out: a.unpack_signs(votes(a, 1)[0], N, **out),
    "count_votes": lambda a, **out: a.count_votes(votes(a, 5), **out),
    "majority_vote": lambda a, **out: a.majority_vote(votes(a, 4), seed=3, step=5, **out),
    "majority_vote zero": lambda a, **out: a.majority_vote(votes(a, 4), ties="zero", n=N, **out),
    "majority_vote short": lambda a, **out: a.majority_vote(votes(a, 4), n=40, **out),
    "majority_vote gaps": lambda a, **out: a.majority_vote(
        votes(a, 4, 160), **rows(a, GAPS), **out
    ),
    "sum_values": lambda a, **out: a.sum_values(values(a).reshape(1, N), **out),
    "quantize": lambda a, **out: a.quantize(values(a), QSGD(3, 64), step=7, **out),
    "quantize gaps": lambda a, **out: a.quantize(
        values(a), BlockInt(5, 32), **rows(a, GAPS_OF_BLOCKS), **out
    ),
    "quantize_feedback_": lambda a, **out: a.quantize_feedback_(
        values(a), values(a, n=N), BlockInt(8, 64), **out
    ),
    "dequantize": lambda a, **out: a.dequantize(
        a.quantize(values(a), BlockInt(7, 64)), BlockInt(7, 64), N, **out
    ),
    "reduce_quantized": lambda a, **out: a.reduce_quantized(
        a.quantize(values(a), BlockInt(7, 64))[None], BlockInt(7, 64), N, **out
    ),
    "ternary_scale": lambda a, **out: a.ternary_scale(values(a), Ternary(), **out),
    "ternary_pack": lambda a, **out: a.ternary_pack(values(a), a.f(1), step=7, **out),
    "ternary_pack gaps": lambda a, **out: a.ternary_pack(
        values(a), a.f(2), **rows(a, GAPS_OF_UNITS), **out
    ),
    "ternary_sum": lambda a, **out: a.ternary_sum(trits(a, 3), N, **out),
    "ternary_unpack": lambda a, **out: a.ternary_unpack(trits(a, 3), a.f(1), N, **out),
    "ternary_unpack_sums": lambda a, **out: a.ternary_unpack_sums(
        a.ternary_sum(trits(a, 3), N), a.f(1), N, ranks=3, mean=True, **out
    ),
    "topk_select": lambda a, **out: a.topk_select(values(a), TopK(0.1, 64), step=7, **out),
    "topk_select gaps": lambda a, **out: a.topk_select(
        values(a), TopK(0.2, 32), **rows(a, GAPS_OF_BLOCKS), **out
    ),
    "topk_feedback_": lambda a, **out: a.topk_feedback_(
        values(a), values(a, n=N), TopK(0.1, 64), **out
    ),
    "topk_scatter": lambda a, **out: a.topk_scatter(
        a.topk_select(values(a), TopK(0.1, 64))[None], TopK(0.1, 64), N, **out
    ),
    "topk_reduce": lambda a, **out: a.topk_reduce(
        a.topk_select(values(a), TopK(0.1, 64))[None], TopK(0.1, 64), N, **out
    ),
    "lion_pack_": lambda a, **out: a.lion_pack_(values(a), values(a, n=N), **BETAS, **out),
    "lion_pack_ gaps": lambda a, **out: a.lion_pack_(
        values(a, "float16"), a.f(N), **BETAS, binarization_range=1.0, **rows(a, GAPS), **out
    ),
}  # fmt: skip


def raw(x: Any) -> Any:
    return np.ascontiguousarray(x).view(np.uint8).ravel()


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_in_memory_that_is_there(a: Arrays, call: str) -> None:
    expected = CALLS[call](a)
    bits = np.asarray(expected)
    memory = np.full(bits.nbytes + 32, RUBBISH, dtype=np.uint8)
    room = memory[16 : 16 + bits.nbytes].view(bits.dtype).reshape(bits.shape)
    out = a.door.native(room)
    assert CALLS[call](a, out=out) is out
    assert np.array_equal(raw(room), raw(bits))
    assert (memory[:16] == RUBBISH).all() and (memory[len(memory) - 16 :] == RUBBISH).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_take_the_type_and_shape_of_out(a: Arrays, dtype: str) -> None:
    out = a.f(7, 143, dtype=dtype)
    assert a.unpack_votes(votes(a, 1), N, out=out) is out
    expected = a.unpack_votes(votes(a, 1), N, dtype=a.door._dtype(dtype))
    assert np.array_equal(raw(out), raw(expected))


def overlapping(a: Arrays, what: str) -> Any:
    memory = a.u(64)
    numbers = memory.view(torch.float32 if a.kind == "torch" else np.float32)
    table = rows(a, np.array([[32, 16, 0, 0]]))
    return {
        "x": lambda: a.pack_signs(numbers, out=memory[:4]),
        "x gaps": lambda: a.pack_signs(numbers, out=memory[:8], **table),
        "residual": lambda: a.quantize_feedback_(
            a.f(16), numbers, BlockInt(4, 32), out=memory[4:16]
        ),
        "residual strided": lambda: a.quantize_feedback_(
            a.f(8), numbers[::2], BlockInt(4, 32), out=memory[52:60]
        ),
        "quantized x": lambda: a.quantize(numbers, BlockInt(4, 32), out=memory[:12]),
        "quantized payloads": lambda: a.reduce_quantized(
            memory[:12][None], BlockInt(4, 32), 16, out=memory[8:20]
        ),
        "values of payloads": lambda: a.dequantize(
            memory[:12], BlockInt(4, 32), 16, out=numbers
        ),
        "summed values": lambda: a.sum_values(numbers.reshape(4, 4), out=numbers[:4]),
        "planes": lambda: a.unpack_votes(memory[:4].reshape(1, 4), 16, out=numbers),
        "payloads": lambda: a.count_votes(memory[:8].reshape(2, 4), out=memory[4:12].reshape(2, 4)),
        "momentum": lambda: a.lion_pack_(a.f(16), numbers, **BETAS, out=memory[60:]),
        "momentum strided": lambda: a.lion_pack_(a.f(8), numbers[::2], **BETAS, out=memory[52:56]),
        "momentum_out": lambda: a.lion_pack_(
            a.f(16), a.f(16), **BETAS, momentum_out=numbers, out=memory[60:]
        ),
        "flags": lambda: a.pack_signs(
            a.f(32), flags=numbers[:1].view(torch.int32 if a.kind == "torch" else np.int32),
            out=memory[:4],
        ),
    }[what], memory  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        "residual",
        "residual strided",
        "quantized x",
        "quantized payloads",
        "values of payloads",
        "summed values",
        "x",
        "x gaps",
        "planes",
        "payloads",
        "momentum",
        "momentum strided",
        "momentum_out",
        "flags",
    ],
)
def test_memory_of_its_own(a: Arrays, what: str) -> None:
    call, memory = overlapping(a, what)
    name = what.removeprefix("quantized ").removeprefix("values of ")
    name = name.removeprefix("summed ").split()[0]
    memory[:] = 7
    with pytest.raises(ValueError, match=rf"out.*{name}|{name}.*out"):
        call()
    assert (memory == 7).all(), "something was written"


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (lambda a: a.pack_signs(a.f(4), out=a.f(1)), TypeError, "out must be uint8, got fl"),
    "length": (lambda a: a.pack_signs(a.f(4), out=a.u(8)), ValueError, r"out.*\[4\], got \[8\]"),
    "lion length": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, out=a.u(0)),
        ValueError, r"out.*\[4\], got \[0\]",
    ),
    "values": (lambda a: a.unpack_votes(a.u(1, 4), 5, out=a.f(4)), ValueError, "out.* 5 .*got 4"),
    "values dtype": (
        lambda a: a.unpack_votes(a.u(1, 4), 4, out=a.u(4)), TypeError, "out must be float32",
    ),
    "values of two dtypes": (
        lambda a: a.unpack_signs(a.u(4), 4, out=a.f(4), dtype=a.door._dtype("float16")),
        TypeError, "out must be .*float16, got .*float32",
    ),
    "planes": (
        lambda a: a.count_votes(a.u(4, 8), out=a.u(2, 8)),
        ValueError, r"out.*\[3, 8\], got \[2, 8\]",
    ),
    "zero": (
        lambda a: a.majority_vote(a.u(4, 8), ties="zero", out=a.u(1, 8)),
        ValueError, r"out.*\[2, 8\], got \[1, 8\]",
    ),
    "strided": (
        lambda a: a.majority_vote(a.u(4, 8), out=a.u(1, 16)[:, ::2]), ValueError, "out.*contiguous",
    ),
    "strided payload": (
        lambda a: a.pack_signs(a.f(32), out=a.u(8)[::2]), ValueError, "out.*contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_out(a: Arrays, case: str) -> None:
    call, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        call(a)


def test_out_that_may_not_be_written() -> None:
    from pydist import arrays

    out = np.zeros(4, dtype=np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        arrays.pack_signs(np.ones(3, dtype=np.float32), out=out)
    with pytest.raises(TypeError, match="out must be a tensor, or a NumPy or CuPy array, got list"):
        arrays.pack_signs(np.ones(3, dtype=np.float32), out=[0] * 4)


def test_autograd_sees_that_out_changed() -> None:
    from pydist import ops

    weight = torch.ones(32, requires_grad=True)
    values = torch.full((32,), 2.0)
    loss = (weight * values).sum()
    ops.unpack_signs(torch.zeros(4, dtype=torch.uint8), 32, out=values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
