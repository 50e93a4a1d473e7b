"""Every function of the codecs, through either front end, on whatever arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pydist import QSGD, BlockFloat, BlockInt, Sign, Ternary, TopK
from pydist.formats import wire

N = 1001
BLOCKS = [BlockInt(4), BlockInt(3, block=32), QSGD(4), QSGD(2, norm="l2"), Sign("l1"), BlockFloat()]
RANKS = 3


def values(seed: int, rows: int = 1) -> Any:
    """float32 [rows * N], zeros among them."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(rows * N, dtype=np.float32)
    x[::7] = 0
    return x


def codec_calls(door: Any, put: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Names and results, of ``pydist.ops`` or ``pydist.arrays``.

    Args:
        door: The front end.
        put: Makes one of its arrays from a NumPy array.
    """
    for codec in BLOCKS:
        yield from _blocks(door, put, codec)
    for dtype in ("float32", "float16"):
        x = put(values(1).astype(dtype))
        yield from _topk(door, put, x, dtype)
        yield from _ternary(door, put, x, dtype)
        rows = put(values(2, RANKS).astype(dtype).reshape(RANKS, N))
        flags = put(np.zeros(1, dtype=np.int32))
        yield f"sum_values {dtype}", door.sum_values(rows, mean=True, flags=flags)
    yield from _elias(door, put)


def _stack(put: Any, made: Callable[[int], Any]) -> Any:
    """What the ranks have packed, uint8 [ranks, bytes]."""
    packed = [made(rank) for rank in range(RANKS)]
    return put(np.stack([on_host(x) for x in packed]))


def on_host(x: Any) -> Any:
    """A NumPy array of the same bits, of an array or tensor of any kind."""
    if hasattr(x, "get"):
        return x.get()
    return x.cpu().numpy() if hasattr(x, "cpu") else np.asarray(x)


def _blocks(door: Any, put: Any, codec: Any) -> Iterator[tuple[str, Any]]:
    options = {"seed": 3, "step": put(np.full(1, 5, dtype=np.int64))}
    payloads = _stack(put, lambda r: door.quantize(put(values(r)), codec, rank=r, **options))
    yield f"quantize {codec}", payloads
    yield f"dequantize {codec}", door.dequantize(payloads[0], codec, N)
    yield f"sum_quantized {codec}", door.sum_quantized(payloads, codec, N, mean=True)
    yield f"reduce_quantized {codec}", door.reduce_quantized(payloads, codec, N, **options)
    residual = put(values(9))
    yield (
        f"quantize_feedback_ {codec}",
        door.quantize_feedback_(put(values(4)), residual, codec, **options),
    )
    yield f"residual {codec}", residual
    table = wire.segments([N // 3, N - N // 3], ordinals=[2, 5], block=codec.block)
    yield f"segments {codec}", door.quantize(put(values(5)), codec, segments=_table(door, table))


def _table(door: Any, table: Any) -> Any:
    if door.__name__ == "pydist.arrays":
        return table
    import torch

    return torch.from_numpy(table)


def _topk(door: Any, put: Any, x: Any, dtype: str) -> Iterator[tuple[str, Any]]:
    codec, options = TopK(0.05, block=128), {"seed": 3, "step": 5}
    payloads = _stack(put, lambda r: door.topk_select(put(values(r)), codec, **options))
    yield f"topk_select {dtype}", door.topk_select(x, codec, **options)
    residual = put(values(9))
    sent = door.topk_feedback_(x, residual, codec, **options)
    yield f"topk_feedback_ {dtype}", sent
    yield f"topk residual {dtype}", residual
    yield f"topk_scatter {dtype}", door.topk_scatter(payloads, codec, N, mean=True)
    yield f"topk_reduce {dtype}", door.topk_reduce(payloads, codec, N, **options)
    cleared = put(values(9))
    door.topk_clear_(cleared, sent, codec)
    yield f"topk_clear_ {dtype}", cleared


def _ternary(door: Any, put: Any, x: Any, dtype: str) -> Iterator[tuple[str, Any]]:
    scalers = door.ternary_scale(x, Ternary())
    yield f"ternary_scale {dtype}", scalers
    payloads = _stack(put, lambda r: door.ternary_pack(x, scalers, seed=3, rank=r))
    yield f"ternary_pack {dtype}", payloads
    yield f"ternary_unpack {dtype}", door.ternary_unpack(payloads, scalers, N, mean=True)
    sums = door.ternary_sum(payloads, N)
    yield f"ternary_sum {dtype}", sums
    yield (
        f"ternary_unpack_sums {dtype}",
        door.ternary_unpack_sums(sums, scalers, N, ranks=RANKS, mean=True),
    )


def _elias(door: Any, put: Any) -> Iterator[tuple[str, Any]]:
    for codec in (QSGD(4), BlockInt(8, block=64)):
        payload = door.quantize(put(values(6)), codec)
        coded = door.elias_encode(payload, codec, N)
        yield f"elias_encode {codec}", coded
        yield f"elias_decode {codec}", door.elias_decode(coded, codec, N)
