"""Top-k: of every block the entries of largest magnitude, and where they are."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pydist import _C
from pydist.formats import wire
from pydist.formats.topk import VALUES, TopKFormat, malformed, table_bytes
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.block_formats import Placed, check_stride
from pydist.kernels.call import Call
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ArrayInfo,
    check_device,
    check_disjoint,
    check_dtype,
    check_n,
    check_one_payload,
    check_payloads,
    check_seed,
    check_state,
)
from pydist.kernels.launch import DeviceRows, LaunchTarget, Rows, launch
from pydist.kernels.register import CodecFields, Shape, kernel
from pydist.kernels.signs import DType, Segments

if TYPE_CHECKING:
    from pydist.kernels.register import A

SLOT_FLOATS = 2**22
"""CUDA: sums of several ranks are made in 16 MiB of scratch, a block in each slot of it."""


class TopKCodec(Protocol):
    """A codec that sends the largest entries: ``TopK``."""

    @property
    def topk_format(self) -> TopKFormat:
        """What the kernels are told."""


def format_of(codec: TopKCodec | TopKFormat) -> TopKFormat:
    """The format of a codec; raises TypeError where it is none."""
    form = codec if isinstance(codec, TopKFormat) else getattr(codec, "topk_format", None)
    if isinstance(form, TopKFormat):
        return form
    raise TypeError(f"codec must be a TopK, got {shown(codec)}")


@functools.lru_cache(maxsize=256)
def native_format(form: TopKFormat) -> _C.TopKFormat:
    """The format as the compiled module takes it."""
    return _C.TopKFormat(form.block, form.low_bits, VALUES[form.values], form.share)


@dataclass(frozen=True)
class Payloads:
    """Where the payloads of all ranks are: those of rank r are r · stride bytes further on.

    Attributes:
        address: First byte of rank 0's.
        stride: Bytes from one rank's to the next.
        ranks: How many.
        form: Their format.
        table: Which elements they hold.
        message: Bytes from the first message to that of each row of the table; ``None``: there is
            one message.
    """

    address: int
    stride: int
    ranks: int
    form: TopKFormat
    table: IntArray
    message: IntArray | None = None

    def native(self, *, divisor: int = 1, clear: bool = False) -> _C.TopKDecode:
        """As the compiled module takes them."""
        return _C.TopKDecode(
            native_format(self.form), self.address, self.stride, self.ranks, divisor, clear
        )

    def malformed(self) -> str:
        """What is wrong with payloads in host memory that a kernel has refused."""
        found = None
        message = np.zeros(len(self.table)) if self.message is None else self.message
        for begin in np.unique(message):
            table = self.table[message == begin]
            size, address = table_bytes(table, self.form), self.address + int(begin)
            rows = [
                np.frombuffer(ctypes.string_at(address + r * self.stride, size), dtype=np.uint8)
                for r in range(self.ranks)
            ]
            n = int(table[:, 1].sum())
            found = found or malformed(np.stack(rows), self.form, n, segments=table)
        return str(found)


def run_decoder(
    target: LaunchTarget,
    kernel: str,
    rows: Rows,
    *args: object,
    payloads: Payloads,
    flags: int,
    sums: bool,
) -> None:
    """Calls a kernel that reads payloads.

    Args:
        target: Where it runs.
        kernel: ``topk_scatter`` or ``topk_reduce``.
        rows: What it works on.
        *args: What follows the rows, up to the flags.
        payloads: What it reads.
        flags: Address of the flags, or 0. On CUDA malformed payloads raise
            ``wire.FLAG_MALFORMED`` in them, and what they were to become is NaN.
        sums: It adds up several ranks (on CUDA in scratch).

    Raises:
        ValueError: A payload is malformed; on the CPU.
    """
    if not len(rows):
        return
    block = payloads.form.block
    if target.stream is not None:
        room, slots, _owner = 0, 0, None
        if sums:
            work = _blocks_in(rows, block)
            slots = min(max(work, 1), max(SLOT_FLOATS // block, 1))
            assert target.scratch is not None
            room, _owner = target.scratch(4 * block * slots)
        launch(target, kernel, rows, *args, flags, (room, slots), unit=block)
        return
    raised = np.zeros(1, dtype=np.int32)
    launch(target, kernel, rows, *args, raised.__array_interface__["data"][0], unit=block)
    if raised[0] & wire.FLAG_MALFORMED:
        raise ValueError(f"malformed top-k payload: {payloads.malformed()}")
    if flags:
        ctypes.c_int32.from_address(flags).value |= int(raised[0])


def _blocks_in(rows: Rows, block: int) -> int:
    """Blocks of all rows."""
    if isinstance(rows, DeviceRows):
        return rows.work
    if isinstance(rows, tuple):
        return -(-rows[wire.N] // block)
    return int(-(-rows[:, wire.N] // block).sum())


def encode_args(
    form: TopKFormat, payload: int, size: int, *, seed: int, step: int, step_at: int = 0
) -> _C.TopKEncode:
    """Where a payload goes, as the compiled module takes it; checked.

    Args:
        form: Its format.
        payload: Its address.
        size: Its bytes.
        seed: Seed of the order of ties.
        step: Its step.
        step_at: Where a device is to read the step instead; 0 for nowhere.
    """
    check_seed(seed)
    return _C.TopKEncode(native_format(form), payload, size, seed, step % 2**32, step_at)


def _payload_bytes(placed: Placed, form: TopKFormat) -> int:
    if placed.table is None:
        return form.payload_bytes(placed.n)
    return table_bytes(placed.table, form)


def _payloads(info: ArrayInfo, placed: Placed, form: TopKFormat) -> Payloads:
    """The checked payloads of as many elements as have been placed."""
    ranks, stride = check_payloads(info)
    check_stride(info, _payload_bytes(placed, form), placed.n)
    table = wire.one_segment(placed.n) if placed.table is None else placed.table
    return Payloads(info.address, stride, ranks, form, table)


def _decode(call: Call, name: str, placed: Placed, *args: object, **more: Any) -> None:
    """:func:`run_decoder` of a call."""
    with call.on_device():
        run_decoder(call.target, name, placed.rows, *args, **more)
    call.end_writes()


def _of_x(given: Mapping[str, Any]) -> tuple[Shape, str]:
    form = given["codec"]
    n = None if given["segments"] is not None else form.payload_bytes(given["x"].numel())
    return (n,), "uint8"


def _of_n(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["n"],), "float32"


def _as_one_payload(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["payloads"].shape[1],), "uint8"


_CODEC = CodecFields(TopKFormat, format_of)


@kernel(result=_of_x, writes=("flags",), codec=_CODEC)
def topk_select(
    x: A,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The entries of largest magnitude of every block of ``x``, exactly, and where they are.

    Equal magnitudes are taken from a place on that depends on (seed, step, parameter, block), so
    that no index is preferred. A block that holds a NaN or an infinity sends NaN.

    Args:
        x: float32, float16 or bfloat16, any shape.
        codec: A ``TopK``.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or int64[1] on the same device that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload: of every block the values, then the positions.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    form = format_of(codec)
    call = Call("x", x, threads)
    values = call.input("x", x)
    check_dtype(values, FLOAT_NAMES)
    placed = Placed(form, segments, values.size, "x", values)
    size = _payload_bytes(placed, form)
    payload = call.result(out, "uint8", (size,), values, gaps=placed.gaps)
    _, raised = call.flags(flags, values, payload)
    known, step_at = call.step(step, payload)
    args = encode_args(form, payload.address, size, seed=seed, step=known, step_at=step_at)
    call.launch("topk_select", placed.rows, FLOATS[values.dtype], args, raised, unit=form.block)
    return payload.array


@kernel(result=_of_x, writes=("residual", "flags"), codec=_CODEC)
def topk_feedback_(
    x: A,
    residual: A,
    codec: TopKCodec,
    *,
    seed: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Error feedback: selects from ``p = x + residual`` and keeps what was not sent.

    The new residual is ``p``, and where an entry was sent ``p`` minus its value, each rounded on
    its own. A block that holds a NaN or an infinity keeps its residuals.

    Args:
        x: float32, float16 or bfloat16, any shape.
        residual: float32 or bfloat16, as many elements; updated in place.
        codec: A ``TopK``.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or int64[1] on the same device that holds it.
        flags: int32[1]; 1 is OR-ed in where ``x + residual`` is not finite.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments` with the codec's ``block``);
            default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload, as of :func:`topk_select`.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    form = format_of(codec)
    call = Call("x", x, threads)
    values = call.input("x", x)
    if out is not None:
        call.check_apart("out", out, "residual", residual)
    kept = call.update("residual", residual)
    check_state(values, kept, kept)
    placed = Placed(form, segments, values.size, "x", values, kept)
    size = _payload_bytes(placed, form)
    payload = call.result(out, "uint8", (size,), values, kept, gaps=placed.gaps)
    _, raised = call.flags(flags, values, kept, payload)
    known, step_at = call.step(step, payload)
    args = encode_args(form, payload.address, size, seed=seed, step=known, step_at=step_at)
    call.launch(
        "topk_feedback", placed.rows, FLOATS[values.dtype], FLOATS[kept.dtype], args, raised,
        unit=form.block,
    )  # fmt: skip
    return payload.array


@kernel(result=_of_n, writes=("flags",), codec=_CODEC)
def topk_scatter(
    payloads: A | Sequence[A],
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    dtype: DType = None,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The entries of all ranks' payloads, added to zeros in rank order in float32.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        codec: The ``TopK`` they were encoded with.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; on CUDA 5 is OR-ed in where a payload is malformed, whose block is NaN.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, ``out`` has another, or the codec is no ``TopK``.
        ValueError: The payloads or ``out`` do not fit ``n``; on the CPU, a payload is malformed.
    """
    form = format_of(codec)
    call = Call("payloads", payloads, threads)
    info = call.input("payloads", payloads)
    values = call.values(out, dtype, n, info)
    _, raised = call.flags(flags, info, values)
    placed = Placed(form, segments, n, "n", values)
    source = _payloads(info, placed, form)
    args = source.native(divisor=source.ranks if mean else 1)
    _decode(
        call, "topk_scatter", placed, FLOATS[values.dtype], args,
        payloads=source, flags=raised, sums=source.ranks > 1,
    )  # fmt: skip
    return values.array


@kernel(result=_as_one_payload, writes=("flags",), codec=_CODEC)
def topk_reduce(
    payloads: A | Sequence[A],
    codec: TopKCodec,
    n: int,
    *,
    mean: bool = False,
    seed: int = 0,
    step: int | A = 0,
    flags: A | None = None,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """Adds the entries of all ranks, as :func:`topk_scatter`, and selects the largest again.

    Args:
        payloads: uint8 [ranks, bytes], or a sequence of [bytes], one per rank.
        codec: The ``TopK`` they were encoded with, and the result is.
        n: Elements.
        mean: Divide the sum by the number of ranks.
        seed: Seed of the order of ties, 0 … 2**32 - 1.
        step: Step of the order of ties, or int64[1] on the same device that holds it.
        flags: int32[1]; 1 is OR-ed in where the result is not finite, on CUDA also 4 where a
            payload is malformed, whose block becomes NaN.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 [bytes] payload.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: Another argument is out of range; on the CPU, a payload is malformed.
    """
    form = format_of(codec)
    call = Call("payloads", payloads, threads)
    info = call.input("payloads", payloads)
    check_n(n)
    placed = Placed(form, segments, n, "n")
    source = _payloads(info, placed, form)
    payload = call.result(out, "uint8", (source.stride,), info, gaps=placed.gaps)
    _, raised = call.flags(flags, info, payload)
    known, step_at = call.step(step, payload)
    _decode(
        call, "topk_reduce", placed, source.native(divisor=source.ranks if mean else 1),
        encode_args(
            form, payload.address, payload.size, seed=seed, step=known, step_at=step_at
        ),
        payloads=source, flags=raised, sums=True,
    )  # fmt: skip
    return payload.array


@kernel(writes=("x", "flags"), codec=_CODEC, returns="x")
def topk_clear_(
    x: A,
    payload: A,
    codec: TopKCodec,
    *,
    flags: A | None = None,
    segments: Segments = None,
    threads: int | None = None,
) -> A:
    """Zeros in ``x`` where a payload has entries: the factor masking of deep gradient compression.

    Args:
        x: float32, float16 or bfloat16, any shape; such as a momentum. Changed in place.
        payload: uint8, as of :func:`topk_select` or :func:`topk_feedback_`.
        codec: The ``TopK`` it was encoded with.
        flags: int32[1]; on CUDA 4 is OR-ed in where the payload is malformed, whose block stays.
        segments: int64 [k, 4] in host memory; default one segment.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        ``x``.

    Raises:
        TypeError: A dtype is not supported, or the codec is no ``TopK``.
        ValueError: The payload does not fit ``x``; on the CPU, it is malformed.
    """
    form = format_of(codec)
    call = Call("x", x, threads)
    check_one_payload(tuple(payload.shape))
    values = call.update("x", x)
    info = call.input("payload", payload[None])
    check_dtype(values, FLOAT_NAMES)
    check_device(values, info)
    check_disjoint(values, info)
    _, raised = call.flags(flags, info, values)
    placed = Placed(form, segments, values.size, "n", values)
    source = _payloads(info, placed, form)
    _decode(
        call, "topk_scatter", placed, FLOATS[values.dtype], source.native(clear=True),
        payloads=source, flags=raised, sums=False,
    )  # fmt: skip
    return x
