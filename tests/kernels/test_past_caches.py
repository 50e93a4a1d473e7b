"""What goes past the caches is the same, bit for bit: every kernel that can, everywhere it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from bitwise import assert_same_bits
from torch import Tensor

from pydist import _C, BlockFloat, BlockInt, Sign, Ternary, TopK, ops

N = 2**13 + 96 + 13  # two tiles of a block and a tail
Write = Callable[[Tensor], object]


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use."""
    before = _C.current_isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


def _writers() -> dict[str, Write]:
    """What writes N values, by name."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(2))
    x[1000] = float("nan")  # its block decodes to NaN, of one bit pattern
    payload = ops.pack_signs(x)
    votes = torch.stack([payload, ops.pack_signs(-x), ops.pack_signs(x.roll(1))])
    zeros = ops.majority_vote(votes[:2], ties="zero")
    counts = ops.count_votes(votes)
    found: dict[str, Write] = {
        "signs": lambda out: ops.unpack_signs(payload, N, out=out),
        "signs and zeros": lambda out: ops.unpack_votes(zeros, N, out=out),
        "counts": lambda out: ops.unpack_votes(counts, N, ranks=3, out=out),
        "mean": lambda out: ops.unpack_votes(counts, N, ranks=3, mean=True, out=out),
    }
    for codec in (Sign("l1", block=96), BlockInt(3), BlockInt(8), BlockFloat("e5m2")):
        found[str(codec)] = _dequantizer(ops.quantize(x, codec), codec)
    clean = x.nan_to_num()
    sparse, topk = ops.topk_select(clean, TopK(0.01)), TopK(0.01)
    found["top-k"] = lambda out: ops.topk_scatter(sparse[None], topk, N, out=out)
    scalers = ops.ternary_scale(clean, Ternary())
    codes = ops.ternary_pack(clean, scalers)
    found["ternary"] = lambda out: ops.ternary_unpack(codes, scalers, N, out=out)
    sums = ops.ternary_sum(torch.stack([codes, codes]), N)
    found["sums"] = lambda out: ops.ternary_unpack_sums(sums, scalers, N, ranks=2, out=out)
    return found


def _dequantizer(payload: Tensor, codec: Sign | BlockInt | BlockFloat) -> Write:
    return lambda out: ops.dequantize(payload, codec, N, out=out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "offset", [0, 1, 8]
)  # whole vectors are only stored where they are aligned
def test_what_goes_past_the_caches_is_the_same(isa: str, dtype: torch.dtype, offset: int) -> None:
    for name, write in _writers().items():
        kept, past = (_written(write, dtype, offset, limit) for limit in (1 << 40, 0))
        assert_same_bits(past, kept, f"{name} on {isa}")


def _written(write: Write, dtype: torch.dtype, offset: int, limit: int) -> object:
    """What is written, and its neighbours, where so many bytes stay in the caches."""
    room = torch.full((N + 256,), 7.0, dtype=dtype)
    start = 64 - room.data_ptr() // room.itemsize % 64 + offset + 64
    before = _C.stream_above(limit)
    try:
        write(room[start : start + N])
    finally:
        _C.stream_above(before)
    return room[start - 64 : start + N + 64].view(torch.uint8).numpy()
