"""The kernels as torch operators, ``torch.ops.pydist.*``.

Inputs are float32, float16 or bfloat16 tensors of any shape and length, on CPU or CUDA; arithmetic
is float32 inside. A payload is uint8, its length a multiple of 4: element i is bit ``i % 8`` of
byte ``i // 8`` (``numpy.packbits(..., bitorder="little")``). What every bit means is in
``docs/wire_format.md``; :mod:`pydist.reference` executes it.

``torch.compile`` sees through the operators. Arguments are checked; a message names the argument
and the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.kernels import checks
from pydist.kernels import operators as _operators  # noqa: F401  (registers torch.ops.pydist)
from pydist.kernels import raw_operators as _raw_operators  # noqa: F401  (registers its own)
from pydist.kernels.arguments import explained
from pydist.kernels.block_ops import (
    dequantize,
    quantize,
    quantize_feedback_,
    reduce_quantized,
    step_options,
    sum_quantized,
)
from pydist.kernels.elias_ops import elias_decode, elias_encode
from pydist.kernels.ternary_ops import (
    ternary_pack,
    ternary_scale,
    ternary_sum,
    ternary_unpack,
    ternary_unpack_sums,
)
from pydist.kernels.topk_ops import (
    topk_clear_,
    topk_feedback_,
    topk_reduce,
    topk_scatter,
    topk_select,
)

__all__ = [
    "count_votes",
    "dequantize",
    "elias_decode",
    "elias_encode",
    "lion_apply_",
    "lion_pack_",
    "majority_vote",
    "pack_signs",
    "quantize",
    "quantize_feedback_",
    "reduce_quantized",
    "sum_quantized",
    "sum_values",
    "ternary_pack",
    "ternary_scale",
    "ternary_sum",
    "ternary_unpack",
    "ternary_unpack_sums",
    "topk_clear_",
    "topk_feedback_",
    "topk_reduce",
    "topk_scatter",
    "topk_select",
    "unpack_signs",
    "unpack_votes",
]


def pack_signs(
    x: Tensor,
    *,
    zero_bit: int = 1,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Packs signs into one bit an element: 1 for positive, ``zero_bit`` for ±0, 0 for NaN.

    Args:
        x: float32, float16 or bfloat16, any shape.
        zero_bit: Bit of a zero.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload, ``ceil(n / 32) * 4`` bytes (each segment padded so).

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {"zero_bit": zero_bit, "flags": flags, "segments": segments}
    if out is None:
        return torch.ops.pydist.pack_signs(x, **options)
    torch.ops.pydist.pack_signs_out(x, **options, out=out)
    return out


def unpack_votes(
    planes: Tensor,
    n: int,
    *,
    ranks: int | None = None,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Turns the planes of a vote into values.

    Args:
        planes: uint8 [p, bytes]: sign; sign and non-zero; or counts of ``ranks`` voters.
        n: Elements.
        ranks: Voters behind count planes; ``None`` for sign planes.
        mean: Divide the sum of the votes by ``ranks``.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values: ±1 (0 where a tie is zero), or ``2 * count - ranks``, or that over ``ranks``.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The planes do not fit ``n`` or ``ranks``, or ``out`` does not fit ``n``.
    """
    if out is None:
        return torch.ops.pydist.unpack_votes(planes, n, ranks=ranks, mean=mean, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.unpack_votes_out(planes, n, ranks=ranks, mean=mean, out=out)
    return out


def unpack_signs(
    payload: Tensor, n: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Turns a payload of :func:`pack_signs` into ±1.

    Args:
        payload: uint8 of ``ceil(n / 32) * 4`` bytes.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values of +1 and -1.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The payload has another length, or ``out`` does not fit ``n``.
    """
    checks.check_one_payload(tuple(payload.shape))
    checks.check_payload_of(payload.numel(), n)
    return unpack_votes(payload.unsqueeze(0), n, dtype=dtype, out=out)


def count_votes(payloads: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Counts how many ranks voted +1, bit-sliced.

    Args:
        payloads: uint8 [ranks, bytes].
        out: Receives the planes, and is returned.

    Returns:
        uint8 [ceil(log2(ranks + 1)), bytes]; plane j holds bit j of every count.

    Raises:
        TypeError: ``payloads`` is not uint8.
        ValueError: There are no ranks, more than 65,535, or bytes are not a multiple of 4; or
            ``out`` has another shape.
    """
    if out is None:
        return torch.ops.pydist.count_votes(payloads)
    torch.ops.pydist.count_votes_out(payloads, out=out)
    return out


def majority_vote(
    payloads: Tensor,
    *,
    ties: str = "hash",
    seed: int = 0,
    step: int | Tensor = 0,
    n: int | None = None,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Finds the side that most ranks voted for.

    Args:
        payloads: uint8 [ranks, bytes].
        ties: ``"hash"``: a fair bit of (seed, step, parameter, element), flipped every second step;
            ``"zero"``: no update, as the paper's sign(0), at the price of a second plane;
            ``"positive"``: +1.
        seed: Seed of the tie hash, 0 … 2**32 - 1.
        step: Step of the tie hash; or int64[1] on the device of ``payloads``. A CUDA kernel reads
            it there: nothing waits for it, and a captured graph sees a new value in each replay.
        n: Elements; default all bits. Padding bits of the result are 0.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments`); default one segment of ``n``.
        out: Receives the planes, and is returned.

    Returns:
        uint8 [1, bytes] (sign), or [2, bytes] (sign, non-zero) with ``ties="zero"``.

    Raises:
        TypeError: ``payloads`` is not uint8.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {"ties": ties, "seed": seed, **step_options(step), "n": n, "segments": segments}
    if out is None:
        return torch.ops.pydist.majority_vote(payloads, **options)
    torch.ops.pydist.majority_vote_out(payloads, **options, out=out)
    return out


def lion_pack_(
    grad: Tensor,
    momentum: Tensor,
    *,
    beta1: float,
    beta2: float,
    zero_bit: int = 1,
    momentum_out: Tensor | None = None,
    flags: Tensor | None = None,
    binarization_range: float | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | Tensor = 0,
    segments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A worker's vote and its new momentum, in one pass.

    Votes the sign of ``beta1 * m + (1 - beta1) * g`` and then sets
    ``m = beta2 * m + (1 - beta2) * g`` (Distributed Lion, arXiv 2404.00438, Algorithm 1). An
    element whose gradient or new momentum is not finite keeps its old momentum.

    Args:
        grad: float32, float16 or bfloat16, any shape.
        momentum: float32 or bfloat16, as many elements; updated in place.
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: Vote of a direction of exactly zero.
        momentum_out: Receives the new momentum instead; ``momentum`` then stays as it was.
        flags: int32[1]; 1 is OR-ed in where something is not finite.
        binarization_range: r votes +1 with probability ``(1 + c / r) / 2`` instead of the sign.
        seed: Seed of those draws.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws; or int64[1] on the device of ``grad``, as in :func:`majority_vote`.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.

    Returns:
        uint8 payload, ``ceil(n / 32) * 4`` bytes (each segment padded so).

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    options = {
        "beta1": beta1, "beta2": beta2, "zero_bit": zero_bit, "momentum_out": momentum_out,
        "flags": flags, "binarization_range": binarization_range, "seed": seed, "rank": rank,
        **step_options(step), "segments": segments,
    }  # fmt: skip
    if out is None:
        return torch.ops.pydist.lion_pack_(grad, momentum, **options)
    torch.ops.pydist.lion_pack_out_(grad, momentum, **options, out=out)
    return out


def lion_apply_(
    param: Tensor,
    planes: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
    skip: Tensor | None = None,
    segments: Tensor | None = None,
) -> None:
    """Weight decay and the voted update, in place and in one pass.

    ``x = x * (1 - lr * weight_decay) - lr * delta``, where delta is the majority (sign planes) or
    the mean vote (count planes of ``ranks`` voters).

    Args:
        param: float32, float16 or bfloat16, any shape; updated.
        planes: uint8 [p, bytes] from :func:`majority_vote` or :func:`count_votes`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        ranks: Voters behind count planes; ``None`` for sign planes.
        skip: int32[1]; where it is not 0, nothing is changed.
        segments: int64 [k, 4] on the CPU (:func:`pydist.segments`); default one segment.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    if (
        not torch.compiler.is_compiling() and param.is_neg()
    ):  # a lazily negated view: its memory holds other values
        dense = param.resolve_neg()
        lion_apply_(
            dense, planes, lr=lr, weight_decay=weight_decay, ranks=ranks, skip=skip,
            segments=segments,
        )  # fmt: skip
        param.copy_(dense)
        return
    torch.ops.pydist.lion_apply_(
        param, planes, lr=lr, weight_decay=weight_decay, ranks=ranks, skip=skip, segments=segments
    )


def sum_values(
    values: Tensor,
    *,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    flags: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of all ranks' values, in float32 and in rank order, rounded once.

    Args:
        values: float32, float16 or bfloat16 [ranks, n].
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where the result holds a NaN or an infinity.
        out: n elements of any shape; receives the values, and is returned.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: ``values`` is no matrix, or ``out`` or ``flags`` does not fit it.
    """
    if out is None:
        return torch.ops.pydist.sum_values(values, mean=mean, flags=flags, dtype=dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.pydist.sum_values_out(values, mean=mean, flags=flags, out=out)
    return out


for _name in __all__:
    globals()[_name] = explained(globals()[_name])
