"""The kernels on NumPy arrays and on anything with ``__cuda_array_interface__`` (CuPy).

The names and arguments are those of :mod:`pydist.ops`; the result is the same kind of array as the
input. NumPy arrays are read and written where they are, without a copy, if they are C-contiguous.
Neither torch nor CuPy is needed for NumPy; ``bfloat16`` arrays are those of ``ml_dtypes``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydist import _C
from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels import signs as kernels
from pydist.kernels.arguments import explained
from pydist.kernels.array_backends import (
    Array,
    backend_of,
    contiguous,
    flags_view,
    in_place,
    payload_of,
    result_view,
    step_of,
    values_of,
)
from pydist.kernels.block_arrays import (
    dequantize,
    quantize,
    quantize_feedback_,
    reduce_quantized,
    sum_quantized,
)
from pydist.kernels.elias_arrays import elias_decode, elias_encode
from pydist.kernels.signs import LionOptions
from pydist.kernels.ternary_arrays import (
    ternary_pack,
    ternary_scale,
    ternary_sum,
    ternary_unpack,
    ternary_unpack_sums,
)
from pydist.kernels.topk_arrays import (
    topk_clear_,
    topk_feedback_,
    topk_reduce,
    topk_scatter,
    topk_select,
)

_C.current_isa()  # a wrong PYDIST_ISA is an error here, not in the first kernel call

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
    x: Array,
    *,
    zero_bit: int = 1,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Packs signs into one bit an element; see :func:`pydist.ops.pack_signs`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        zero_bit: Bit of a zero.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    backend = backend_of(("x", x), ("flags", flags), ("out", out))
    x = contiguous(backend, x)
    view = backend.view("x", x)
    table = checks.check_table(kernels.as_table(segments), view.size, "x")
    out, out_view = payload_of(backend, out, table, view)
    kernels.pack_signs(
        backend.target(threads), view, out_view,
        zero_bit=zero_bit, flags=flags_view(backend, flags), segments=table,
    )  # fmt: skip
    return out


def unpack_votes(
    planes: Array,
    n: int,
    *,
    ranks: int | None = None,
    mean: bool = False,
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Turns the planes of a vote into values; see :func:`pydist.ops.unpack_votes`.

    Args:
        planes: uint8 [p, bytes]: sign; sign and non-zero; or counts of ``ranks`` voters.
        n: Elements.
        ranks: Voters behind count planes; ``None`` for sign planes.
        mean: Divide the sum of the votes by ``ranks``.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The planes do not fit ``n`` or ``ranks``, or ``out`` does not fit ``n``.
    """
    checks.check_n(n)
    backend = backend_of(("planes", planes), ("out", out))
    out = values_of(backend, n, dtype, out)
    planes = contiguous(backend, planes)
    view = result_view(backend, out)
    checks.check_size(view, n, "n")
    kernels.unpack_votes(
        backend.target(threads), backend.view("planes", planes), view, ranks=ranks, mean=mean
    )
    return out


def unpack_signs(
    payload: Array,
    n: int,
    *,
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Turns a payload of :func:`pack_signs` into ±1; see :func:`pydist.ops.unpack_signs`.

    Args:
        payload: uint8 of ``ceil(n / 32) * 4`` bytes.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The payload has another length, or ``out`` does not fit ``n``.
    """
    backend_of(("payload", payload), ("out", out))
    checks.check_one_payload(tuple(payload.shape))
    checks.check_payload_of(payload.size, n)
    return unpack_votes(payload[None], n, dtype=dtype, out=out, threads=threads)


def count_votes(payloads: Array, *, out: Array | None = None, threads: int | None = None) -> Array:
    """Counts how many ranks voted +1; see :func:`pydist.ops.count_votes`.

    Args:
        payloads: uint8 [ranks, bytes].
        out: Receives the planes, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 [ceil(log2(ranks + 1)), bytes] of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: There are no ranks, more than 65,535, or bytes are not a multiple of 4; or
            ``out`` has another shape.
    """
    backend = backend_of(("payloads", payloads), ("out", out))
    payloads = contiguous(backend, payloads)
    view = backend.view("payloads", payloads)
    ranks, size = checks.check_payloads(view)
    if out is None:
        out = backend.module.empty((wire.planes_for(ranks), size), dtype=np.uint8)
    kernels.count_votes(backend.target(threads), view, result_view(backend, out))
    return out


def majority_vote(
    payloads: Array,
    *,
    ties: str = "hash",
    seed: int = 0,
    step: int | Array = 0,
    n: int | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Finds the side that most ranks voted for; see :func:`pydist.ops.majority_vote`.

    Args:
        payloads: uint8 [ranks, bytes].
        ties: ``"hash"``, ``"zero"`` or ``"positive"``.
        seed: Seed of the tie hash.
        step: Step of the tie hash, or an array int64[1] that holds it.
        n: Elements; default all bits.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: Receives the planes, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 [1, bytes], or [2, bytes] with ``ties="zero"``, of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = step_of(step)
    backend = backend_of(("payloads", payloads), ("out", out), ("step", step_at))
    payloads = contiguous(backend, payloads)
    view = backend.view("payloads", payloads)
    _, size = checks.check_payloads(view)
    table = kernels.as_table(segments)
    gaps = checks.vote_gaps(table, n, size)
    if out is None:
        out = backend.module.empty((2 if ties == "zero" else 1, size), dtype=np.uint8)
    kernels.majority_vote(
        backend.target(threads), view, result_view(backend, out, gaps, view),
        ties=ties, seed=seed, n=n, segments=table,
        step=step if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    return out


def lion_pack_(
    grad: Array,
    momentum: Array,
    *,
    beta1: float,
    beta2: float,
    zero_bit: int = 1,
    momentum_out: Array | None = None,
    flags: Array | None = None,
    binarization_range: float | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | Array = 0,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """A worker's vote and its new momentum; see :func:`pydist.ops.lion_pack_`.

    Args:
        grad: float32, float16 or bfloat16, any shape.
        momentum: float32 or bfloat16, as many elements; updated in place.
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: Vote of a direction of exactly zero.
        momentum_out: Receives the new momentum instead.
        flags: int32[1]; 1 is OR-ed in where something is not finite.
        binarization_range: r votes +1 with probability ``(1 + c / r) / 2`` instead of the sign.
        seed: Seed of those draws.
        rank: This rank.
        step: Step of the draws, or an array int64[1] that holds it.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = step_of(step)
    backend = backend_of(
        ("grad", grad), ("momentum", momentum), ("momentum_out", momentum_out), ("flags", flags),
        ("out", out), ("step", step_at),
    )  # fmt: skip
    grad = contiguous(backend, grad)
    name, target = (
        ("momentum", momentum) if momentum_out is None else ("momentum_out", momentum_out)
    )
    if momentum_out is not None and np.may_share_memory(momentum, momentum_out):
        both_dense = momentum.flags.c_contiguous and momentum_out.flags.c_contiguous
        if not both_dense:  # otherwise checks.check_disjoint sees it
            raise ValueError("momentum and momentum_out overlap in memory")
    dense, write_back = in_place(backend, name, target)
    old = dense if target is momentum else contiguous(backend, momentum)
    if out is not None and dense is not target and np.may_share_memory(out, target):
        raise ValueError(f"out and {name} overlap in memory")
    g, m = backend.view("grad", grad), backend.view("momentum", old)
    new = backend.view("momentum_out", dense)
    table = checks.check_table(kernels.as_table(segments), g.size, "grad")
    out, out_view = payload_of(backend, out, table, g, m, new)
    kernels.lion_pack(
        backend.target(threads), g, m, new, out_view,
        LionOptions(beta1, beta2, zero_bit, binarization_range, seed, rank, step),
        flags=flags_view(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    write_back()
    return out


def lion_apply_(
    param: Array,
    planes: Array,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
    skip: Array | None = None,
    segments: Any = None,
    threads: int | None = None,
) -> None:
    """Weight decay and the voted update, in place; see :func:`pydist.ops.lion_apply_`.

    Args:
        param: float32, float16 or bfloat16, any shape; updated.
        planes: uint8 [p, bytes] of a vote.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        ranks: Voters behind count planes; ``None`` for sign planes.
        skip: int32[1]; where it is not 0, nothing is changed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        threads: CPU threads; default all cores.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    backend = backend_of(("param", param), ("planes", planes), ("skip", skip))
    dense, write_back = in_place(backend, "param", param)
    planes = contiguous(backend, planes)
    kernels.lion_apply(
        backend.target(threads), backend.view("param", dense), backend.view("planes", planes),
        lr=lr, weight_decay=weight_decay, ranks=ranks,
        skip=None if skip is None else backend.view("skip", skip),
        segments=kernels.as_table(segments),
    )  # fmt: skip
    write_back()


def sum_values(
    values: Array,
    *,
    mean: bool = False,
    dtype: Any = None,
    flags: Array | None = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The sum of all ranks' values in rank order; see :func:`pydist.ops.sum_values`.

    Args:
        values: float32, float16 or bfloat16 [ranks, n].
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where the result holds a NaN or an infinity.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: ``values`` is no matrix, or ``out`` or ``flags`` does not fit it.
    """
    backend = backend_of(("values", values), ("flags", flags), ("out", out))
    values = contiguous(backend, values)
    view = backend.view("values", values)
    _, n = checks.check_rows(view)
    out = values_of(backend, n, dtype, out)
    kernels.sum_values(
        backend.target(threads), view, result_view(backend, out),
        mean=mean, flags=flags_view(backend, flags),
    )  # fmt: skip
    return out


for _name in __all__:
    globals()[_name] = explained(globals()[_name])
