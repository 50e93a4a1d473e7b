"""Signs and votes: one bit per element, and what most ranks voted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydist import _C
from pydist.formats import wire
from pydist.kernels.call import Call
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ITEMSIZE,
    TIES,
    ArrayInfo,
    check_bit,
    check_dtype,
    check_one_payload,
    check_payload_of,
    check_payloads,
    check_planes,
    check_seed,
    check_table,
    check_ties,
    vote_table,
)
from pydist.kernels.launch import Rows, as_table, one_row
from pydist.kernels.register import Shape, kernel

if TYPE_CHECKING:
    from pydist.kernels.register import A

Segments = Any
DType = Any


def words_of(
    x: ArrayInfo, segments: Segments, momentum: int = 0, momentum_out: int = 0, width: int = 0
) -> tuple[Rows, int, bool]:
    """Rows that pack bits of an array, bytes of their payload, and whether it has padding within.

    Args:
        x: What is packed.
        segments: int64 [k, 4], or ``None`` for one segment.
        momentum: Address of its momentum, if it has one.
        momentum_out: Where the new momentum goes.
        width: Bytes of an element of a momentum.
    """
    if segments is None:
        return one_row(x.address, x.size, momentum, momentum_out), wire.payload_bytes(x.size), False
    table = check_table(as_table(segments), x.size, x.name)
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    if width:
        wire.dense_addresses(rows, wire.MOMENTUM, momentum, width)
        wire.dense_addresses(rows, wire.MOMENTUM_OUT, momentum_out, width)
    return rows, wire.segments_words(table) * wire.WORD_BYTES, wire.has_gaps(table)


def payload_shape(n: int, segments: Segments) -> Shape:
    """Shape of a payload of one bit per element."""
    return ((n + 31) // 32 * 4 if segments is None else None,)


def _of_x(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return payload_shape(given["x"].numel(), given["segments"]), "uint8"


def _of_n(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["n"],), "float32"


def _counts(given: Mapping[str, Any]) -> tuple[Shape, str]:
    ranks, size = given["payloads"].shape
    return (wire.planes_for(ranks), size), "uint8"


def _sides(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (2 if given["ties"] == "zero" else 1, given["payloads"].shape[1]), "uint8"


@kernel(result=_of_x, writes=("flags",))
def pack_signs(
    x: A,
    *,
    zero_bit: int = 1,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Packs signs into one bit per element: 1 for positive, ``zero_bit`` for ±0, 0 for NaN.

    Args:
        x: float32, float16 or bfloat16, any shape.
        zero_bit: Bit of a zero.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload, ``ceil(n / 32) * 4`` bytes (each segment padded so).

    Raises:
        TypeError: A dtype is not supported, or arrays are of several kinds.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    call = Call("x", x, threads)
    values = call.input("x", x)
    check_dtype(values, FLOAT_NAMES)
    check_bit("zero_bit", zero_bit)
    rows, size, gaps = words_of(values, segments)
    payload = call.result(out, "uint8", (size,), values, gaps=gaps)
    _, raised = call.flags(flags, values, payload)
    call.launch("pack_signs", rows, FLOATS[values.dtype], payload.address, zero_bit, raised)
    return payload.array


@kernel(result=_of_n)
def unpack_votes(
    planes: A,
    n: int,
    *,
    ranks: int | None = None,
    mean: bool = False,
    dtype: DType = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Turns the planes of a vote into values.

    Args:
        planes: uint8 [p, bytes]: sign; sign and non-zero; or counts of ``ranks`` voters.
        n: Elements.
        ranks: Voters behind count planes; ``None`` for sign planes.
        mean: Divide the sum of the votes by ``ranks``.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values: ±1 (0 where a tie is zero), or ``2 * count - ranks``, or that over ``ranks``.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The planes do not fit ``n`` or ``ranks``, or ``out`` does not fit ``n``.
    """
    call = Call("planes", planes, threads)
    info = call.input("planes", planes)
    values = call.values(out, dtype, n, info)
    count, size = check_planes(info, ranks)
    if size != wire.payload_bytes(n):
        raise ValueError(
            f"planes must have {wire.payload_bytes(n)} bytes per plane for n={n}, got {size}"
        )
    divisor = ranks if ranks is not None and mean else 1
    args = unpack_args(info.address, size, count, ranks, divisor)
    call.launch("unpack_votes", one_row(values.address, n), FLOATS[values.dtype], args)
    return values.array


@kernel(result=_of_n)
def unpack_signs(
    payload: A,
    n: int,
    *,
    dtype: DType = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Turns a payload of :func:`pack_signs` into ±1.

    Args:
        payload: uint8 of ``ceil(n / 32) * 4`` bytes.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values of +1 and -1.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The payload has another length, or ``out`` does not fit ``n``.
    """
    call = Call("payload", payload, threads)
    info = call.input("payload", payload)
    check_dtype(info, ("uint8",))
    check_one_payload(info.shape)
    check_payload_of(info.size, n)
    values = call.values(out, dtype, n, info)
    args = unpack_args(info.address, info.size, 1, None, 1)
    call.launch("unpack_votes", one_row(values.address, n), FLOATS[values.dtype], args)
    return values.array


@kernel(result=_counts)
def count_votes(
    payloads: A | Sequence[A], *, out: A | None = None, threads: int | None = None
) -> A:
    """Counts how many ranks voted +1, bit-sliced.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        out: Receives the planes, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 [ceil(log2(ranks + 1)), bytes]; plane j holds bit j of every count.

    Raises:
        TypeError: ``payloads`` is not uint8.
        ValueError: There are no ranks, more than 65,535, or bytes are not a multiple of 4; or
            ``out`` has another shape.
    """
    call = Call("payloads", payloads, threads)
    votes = call.input("payloads", payloads)
    ranks, size = check_payloads(votes)
    planes = call.result(out, "uint8", (wire.planes_for(ranks), size), votes)
    args = vote_args(votes.address, size, ranks, planes.address, size)
    call.launch("count_votes", one_row(0, size * 8), args)
    return planes.array


@kernel(result=_sides)
def majority_vote(
    payloads: A | Sequence[A],
    *,
    ties: str = "hash",
    seed: int = 0,
    step: int | A = 0,
    n: int | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Finds the side that most ranks voted for.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        ties: ``"hash"``: a fair bit of (seed, step, parameter, element), flipped every second step;
            ``"zero"``: no update, as the paper's sign(0), at the price of a second plane;
            ``"positive"``: +1.
        seed: Seed of the tie hash, 0 … 2**32 - 1.
        step: Step of the tie hash; or int64[1] on the device of ``payloads``. A CUDA kernel reads
            it there: nothing waits for it, and a captured graph sees a new value in each replay.
        n: Elements; default all bits. Padding bits of the result are 0.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: Receives the planes, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 [1, bytes] (sign), or [2, bytes] (sign, non-zero) with ``ties="zero"``.

    Raises:
        TypeError: ``payloads`` is not uint8.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    call = Call("payloads", payloads, threads)
    votes = call.input("payloads", payloads)
    ranks, size = check_payloads(votes)
    check_ties(ties)
    check_seed(seed)
    known, step_at = call.step(step, votes)
    rows: Rows
    if segments is None and n is None:
        rows, gaps = one_row(0, size * 8), False
    else:
        table = vote_table(as_table(segments), n, size)
        rows = wire.rows_of(table)
        gaps = wire.has_gaps(table) or wire.segments_words(table) * wire.WORD_BYTES != size
    shape = (2 if ties == "zero" else 1, size)
    planes = call.result(out, "uint8", shape, votes, gaps=gaps)
    args = vote_args(
        votes.address, size, ranks, planes.address, size, TIES[ties], seed, known, step_at
    )
    call.launch("majority_vote", rows, args)
    return planes.array


def vote_args(
    payloads: int, stride: int, ranks: int, out: int, plane_bytes: int, ties: int = 0,
    seed: int = 0, step: int = 0, step_at: int = 0,
) -> _C.VoteArgs:  # fmt: skip
    """Arguments of ``count_votes`` and ``majority_vote`` of the compiled module.

    Args:
        payloads: Address of the first rank's payload.
        stride: Bytes from one rank's payload to the next.
        ranks: How many there are.
        out: Address of the first plane.
        plane_bytes: Bytes of a plane.
        ties: Number of the rule (``checks.TIES``).
        seed: Seed of the tie hash.
        step: Its step.
        step_at: Where a device is to read the step instead; 0 for nowhere.
    """
    return _C.VoteArgs(payloads, stride, ranks, out, plane_bytes, ties, seed, step, step_at)


def unpack_args(
    planes: int, plane_bytes: int, count: int, ranks: int | None, divisor: int
) -> _C.Unpack:
    """Arguments of ``unpack_votes`` of the compiled module.

    Args:
        planes: Address of the first plane.
        plane_bytes: Bytes from one plane to the next.
        count: How many there are.
        ranks: Voters behind count planes; ``None`` for sign planes.
        divisor: What sums are divided by.
    """
    return _C.Unpack(planes, plane_bytes, count, ranks or 0, divisor)
