"""Ternary values: zero, plus or minus a scale that all ranks share."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydist import _C
from pydist.formats import ternary, wire
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.block_formats import check_stride
from pydist.kernels.call import Call
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ITEMSIZE,
    ArrayInfo,
    check_device,
    check_disjoint,
    check_dtype,
    check_n,
    check_payloads,
    check_rank,
    check_seed,
    check_size,
)
from pydist.kernels.launch import LaunchTarget, Rows, as_table, launch
from pydist.kernels.register import CodecFields, Shape, kernel
from pydist.kernels.signs import DType, Segments

if TYPE_CHECKING:
    from pydist.kernels.register import A

WARP_UNITS = 16
"""Units that a warp takes at a time; kWarpUnits of csrc/cuda/kernels/ternary.cuh."""


class TernaryCodec(Protocol):
    """A codec whose scalers are those of :class:`pydist.Ternary`."""

    @property
    def clip(self) -> float | None:
        """Deviations that magnitudes are held to."""


@dataclass(frozen=True)
class Clip:
    """What kernels are told of a ternary codec."""

    clip: float | None


def clip_of(codec: TernaryCodec) -> Clip:
    """The codec's clip, checked; raises TypeError where there is none."""
    if not hasattr(codec, "clip"):
        raise TypeError(f"codec must be a Ternary, got {shown(codec)}")
    ternary.check_clip(codec.clip)
    return Clip(codec.clip)


def check_table(table: IntArray | None, n: int, name: str) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    if table is None:
        return wire.one_segment(n)
    ternary.check_segments(table)
    total = int(table[:, 1].sum())
    if total != n:
        raise ValueError(f"segments cover {total} elements, {name} has {n}")
    return table


def check_ranks(ranks: int) -> None:
    """Raises unless ``ranks`` is a number of ranks."""
    if not 1 <= wire.as_int("ranks", ranks) <= wire.MAX_RANKS:
        raise ValueError(f"ranks must be in [1, {wire.MAX_RANKS}], got {ranks}")


def _check_scalers(scalers: ArrayInfo, rows: int, like: ArrayInfo) -> None:
    check_dtype(scalers, ("float32",))
    check_size(scalers, rows, "one per segment")
    check_device(like, scalers)


# --------------------------------------------------------------------------- the compiled module


PAYLOADS = f"payloads have a byte above {ternary.LARGEST_BYTE}, which no five trits are"
SUMS = "sums have one that is beyond ± ranks"


def launch_reading(
    target: LaunchTarget, kernel: str, rows: Rows, *args: object, flags: int, what: str
) -> None:
    """Launches a kernel that reads what others have sent.

    Args:
        target: Where it runs.
        kernel: Its name.
        rows: Its rows.
        *args: What goes between rows and flags.
        flags: Address of a word that it raises; 0 for none.
        what: What is read, for the message.

    Raises:
        ValueError: Something is malformed; on the CPU, once the kernel has run. A CUDA kernel
            raises ``wire.FLAG_MALFORMED`` instead, and goes on with zeros.
    """
    if target.stream is not None:
        launch(target, kernel, rows, *args, flags, unit=WARP_UNITS * ternary.UNIT)
        return
    raised = ctypes.c_uint32(0)
    launch(target, kernel, rows, *args, ctypes.addressof(raised))
    if flags:
        ctypes.c_uint32.from_address(flags).value |= raised.value
    if raised.value & wire.FLAG_MALFORMED:
        raise ValueError(f"{what}: malformed")


def scale_args(clip: float | None, scratch: int) -> _C.TernaryScaleArgs:
    """Arguments of ``ternary_scale`` of the compiled module: the clip, and memory for sums."""
    return _C.TernaryScaleArgs(clip or 0.0, scratch)


def pack_args(
    payload: int, size: int, *, seed: int, rank: int, step: int, step_at: int = 0
) -> _C.TernaryPackArgs:
    """Arguments of ``ternary_pack`` of the compiled module, checked.

    Args:
        payload: Address of the payload.
        size: Its bytes.
        seed: Seed of the draws.
        rank: Rank that draws.
        step: Step of the draws.
        step_at: Where a device is to read the step instead; 0 for nowhere.
    """
    check_seed(seed)
    check_rank(rank)
    return _C.TernaryPackArgs(payload, size, seed, rank << 2, step % 2**32, step_at)


def source_args(data: int, size: int, stride: int, ranks: int, divisor: int) -> _C.TernarySource:
    """What decoders of the compiled module read.

    Args:
        data: Address of the first rank's payload, or of sums.
        size: Bytes of a payload.
        stride: Bytes from one rank's payload to the next.
        ranks: How many ranks there are, or are in the sums.
        divisor: What sums are divided by.
    """
    return _C.TernarySource(data, size, stride, ranks, divisor)


# --------------------------------------------------------------------------- kernels


def _scalers(given: Mapping[str, Any]) -> tuple[Shape, str]:
    segments = given["segments"]
    return (1 if segments is None else segments.shape[0],), "float32"


def _trits(given: Mapping[str, Any]) -> tuple[Shape, str]:
    if given["segments"] is not None:
        return (None,), "uint8"
    import torch  # whose symbols know no min()

    n = given["x"].numel()
    whole, rest = n // ternary.UNIT, n % ternary.UNIT
    last = torch.sym_min((rest + 3) // 4 * 4, ternary.UNIT_BYTES)
    return (whole * ternary.UNIT_BYTES + last,), "uint8"


def _sums(given: Mapping[str, Any]) -> tuple[Shape, str]:
    ranks = given["payloads"].shape[0]
    if given["segments"] is not None or not isinstance(ranks, int):
        return (None,), "uint8"
    units = (given["n"] + ternary.UNIT - 1) // ternary.UNIT
    return (units * ternary.sum_unit_bytes(ranks),), "uint8"


def _of_n(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["n"],), "float32"


@kernel(result=_scalers, writes=("flags",), codec=CodecFields(Clip, clip_of))
def ternary_scale(
    x: A,
    codec: TernaryCodec,
    *,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The scaler of every segment: its largest magnitude, after clipping.

    ``clip`` deviations is the limit, the deviation being the root of the mean square of the
    segment. A segment with a NaN or an infinity has the scaler NaN; scalers below 2**-110 are 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``Ternary``.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with ``block=160``);
            default one segment.
        out: float32 [k]; receives the scalers, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        float32 [k], one per segment. What all ranks share is the largest over ranks.

    Raises:
        TypeError: A dtype is not supported, or the codec is not ternary.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    clip = clip_of(codec).clip
    call = Call("x", x, threads)
    values = call.input("x", x)
    check_dtype(values, FLOAT_NAMES)
    table = check_table(as_table(segments), values.size, "x")
    scalers = call.result(out, "float32", (len(table),), values)
    _, raised = call.flags(flags, values, scalers)
    rows = ternary.rows_of(table)
    wire.dense_addresses(rows, wire.X, values.address, ITEMSIZE[values.dtype])
    ternary.place_scalers(rows, scalers.address, 0)
    rows = ternary.scale_rows(rows)
    scratch = call.result(None, "uint8", (ternary.scratch_bytes(rows),))
    args = scale_args(clip, scratch.address)
    call.launch("ternary_scale", rows, FLOATS[values.dtype], args, raised, unit=ternary.SUM_SEGMENT)
    return scalers.array


@kernel(result=_trits, writes=("flags",))
def ternary_pack(
    x: A,
    scalers: A,
    *,
    shared: A | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Rounds values at random to 0 or ± the shared scaler, and packs five into a byte.

    An element is ± the scaler with probability ``min(|x|, own) / shared`` (to 2**-16), where own
    is this rank's scaler. The draw is a function of (seed, rank, step, parameter, element). What
    is not finite becomes 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        scalers: float32 [k], this rank's own (:func:`ternary_scale`); magnitudes are held to them.
        shared: float32 [k], the largest over all ranks; default ``scalers``.
        seed: Seed of the draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws, or int64[1] on the device of ``x`` that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with ``block=160``);
            default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload: 32 bytes for every 160 elements.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    call = Call("x", x, threads)
    values, own = call.input("x", x), call.input("scalers", scalers)
    check_dtype(values, FLOAT_NAMES)
    table = check_table(as_table(segments), values.size, "x")
    common = own if shared is None else call.input("shared", shared)
    for info in (own, common):
        _check_scalers(info, len(table), values)
    payload = call.result(
        out, "uint8", (ternary.table_bytes(table),), values, own, common,
        gaps=ternary.has_gaps(table),
    )  # fmt: skip
    _, raised = call.flags(flags, values, payload)
    rows = ternary.rows_of(table)
    wire.dense_addresses(rows, wire.X, values.address, ITEMSIZE[values.dtype])
    ternary.place_scalers(rows, own.address, common.address)
    known, step_at = call.step(step, payload)
    args = pack_args(
        payload.address, payload.size, seed=seed, rank=rank, step=known, step_at=step_at
    )
    call.launch(
        "ternary_pack", rows, FLOATS[values.dtype], args, raised, unit=WARP_UNITS * ternary.UNIT
    )
    return payload.array


def _payload_table(payloads: ArrayInfo, n: int, segments: Segments) -> IntArray:
    """The segment table of payloads of ``n`` elements, checked against their length."""
    check_n(n)
    table = check_table(as_table(segments), n, "n")
    check_stride(payloads, ternary.table_bytes(table), n)
    return table


@kernel(result=_sums, writes=("flags",))
def ternary_sum(
    payloads: A | Sequence[A],
    n: int,
    *,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The exact sums of all ranks' trits, ``ceil(log2(2 * ranks + 1))`` bits each.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], packed with one shared scaler.
        n: Elements.
        flags: int32[1]; on CUDA 4 is OR-ed in where a byte is malformed.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: Receives the sums, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 bit planes of whole units of 160 elements.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: The payloads do not fit ``n``, or, on the CPU, a byte of them is above 242.
    """
    call = Call("payloads", payloads, threads)
    source = call.input("payloads", payloads)
    ranks, size = check_payloads(source)
    table = _payload_table(source, n, segments)
    sums = call.result(
        out, "uint8", (ternary.table_units(table) * ternary.sum_unit_bytes(ranks),), source,
        gaps=ternary.has_gaps(table),
    )  # fmt: skip
    _, raised = call.flags(flags, source, sums)
    args = source_args(source.address, size, size, ranks, 1)
    _read(
        call, "ternary_sum", ternary.rows_of(table), args, sums.address, flags=raised,
        what=PAYLOADS,
    )  # fmt: skip
    return sums.array


def _read(call: Call, name: str, rows: IntArray, *args: object, flags: int, what: str) -> None:
    """:func:`launch_reading` of a call."""
    with call.on_device():
        launch_reading(call.target, name, rows, *args, flags=flags, what=what)
    call.end_writes()


def _value_rows(table: IntArray, scalers: ArrayInfo, out: ArrayInfo, source: ArrayInfo) -> IntArray:
    _check_scalers(scalers, len(table), source)
    check_disjoint(out, scalers)
    rows = ternary.rows_of(table)
    wire.dense_addresses(rows, wire.X, out.address, ITEMSIZE[out.dtype])
    ternary.place_scalers(rows, 0, scalers.address)
    return rows


@kernel(result=_of_n, writes=("flags",))
def ternary_unpack(
    payloads: A | Sequence[A],
    scalers: A,
    n: int,
    *,
    mean: bool = False,
    dtype: DType = None,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The values of a payload, or the sum of those of all ranks.

    An element is ``scaler * (sum / divisor)``, where the divisor is the number of ranks for a mean
    and 1 otherwise.

    Args:
        payloads: uint8 [bytes]; or packed with one shared scaler [ranks, bytes], or a sequence.
        scalers: float32 [k], the shared ones.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite in float32, and on CUDA 4 where a
            byte is malformed.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The payloads or ``out`` do not fit ``n``, or, on the CPU, a byte of them is
            above 242.
    """
    call, given = Call("payloads", payloads, threads), cast(Any, payloads)
    source = call.input("payloads", given[None] if len(given.shape) == 1 else given)
    own = call.input("scalers", scalers)
    ranks, size = check_payloads(source)
    table = _payload_table(source, n, segments)
    values = call.values(out, dtype, n, source)
    _, raised = call.flags(flags, source, values)
    rows = _value_rows(table, own, values, source)
    args = source_args(source.address, size, size, ranks, ranks if mean else 1)
    _read(call, "ternary_unpack", rows, FLOATS[values.dtype], args, flags=raised, what=PAYLOADS)
    return values.array


@kernel(result=_of_n, writes=("flags",))
def ternary_unpack_sums(
    sums: A,
    scalers: A,
    n: int,
    *,
    ranks: int,
    mean: bool = False,
    dtype: DType = None,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The values of sums, as :func:`ternary_unpack` has them of the payloads.

    Args:
        sums: uint8, as of :func:`ternary_sum`.
        scalers: float32 [k], the shared ones.
        n: Elements.
        ranks: How many ranks were summed.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where a value is not finite in float32, and on CUDA 4 where a
            sum is malformed.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: The sums or ``out`` do not fit ``n``, or, on the CPU, one is beyond ± ``ranks``.
    """
    call = Call("sums", sums, threads)
    source, own = call.input("sums", sums), call.input("scalers", scalers)
    check_dtype(source, ("uint8",))
    check_ranks(ranks)
    check_n(n)
    table = check_table(as_table(segments), n, "n")
    size = ternary.table_units(table) * ternary.sum_unit_bytes(ranks)
    check_size(source, size, f"sums of {ranks} ranks for n={n}")
    values = call.values(out, dtype, n, source)
    _, raised = call.flags(flags, source, values)
    rows = _value_rows(table, own, values, source)
    args = source_args(source.address, size, size, ranks, ranks if mean else 1)
    _read(call, "ternary_unpack_sums", rows, FLOATS[values.dtype], args, flags=raised, what=SUMS)
    return values.array
