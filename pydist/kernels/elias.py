"""Elias-coded payloads: levels in fewer bytes, of a length that depends on them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydist import _C
from pydist.formats import blocks, elias
from pydist.formats.blocks import BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.block_formats import BlockCodec, check_table, format_of, native_format
from pydist.kernels.call import Call
from pydist.kernels.checks import ArrayInfo, check_disjoint, check_dtype, check_n
from pydist.kernels.launch import as_table
from pydist.kernels.register import CodecFields, Shape, kernel
from pydist.kernels.signs import Segments

if TYPE_CHECKING:
    from pydist.kernels.register import A

F = TypeVar("F", bound=Callable[..., Any])


def entropy_of(codec: object) -> str | None:
    """``"elias"``, or ``None`` for payloads of fixed length."""
    return getattr(codec, "entropy", None)


def without_entropy(codec: Any) -> Any:
    """The codec whose payloads have a fixed length, before entropy coding."""
    return replace(codec, entropy=None) if entropy_of(codec) else codec


def fixed_format_of(codec: BlockCodec) -> BlockFormat:
    """The format of a codec whose payloads have one length; raises where it is none."""
    if entropy_of(codec):
        raise ValueError(
            f"codec must have entropy=None, got {codec}: payloads of variable length do not "
            "stack; elias_decode each of them first"
        )
    return format_of(codec)


def levels_of(codec: BlockCodec) -> BlockFormat:
    """The format of a codec of levels; raises TypeError where it is none."""
    form = format_of(codec)
    if form.scheme != "levels":
        raise TypeError(f"codec must be a QSGD or a BlockInt, got {shown(codec)}")
    return form


def entropy_coded(encoder: F) -> F:
    """A kernel that encodes, for codecs with entropy coding too: makes the payload shorter."""
    names = list(inspect.signature(encoder).parameters)
    at = names.index("codec")

    @functools.wraps(encoder)
    def call(*args: Any, **options: Any) -> Any:
        codec: Any = args[at] if len(args) > at else options.get("codec")
        if getattr(codec, "entropy", None) is None:
            return encoder(*args, **options)
        given = dict(zip(names[: len(args)], args, strict=True)) | options
        if given.get("out") is not None:
            raise ValueError(f"out must be None with {codec}: the length is not known beforehand")
        payload = encoder(**given | {"codec": without_entropy(codec)})
        shape = given[names[0]].shape
        n = shape.numel() if hasattr(shape, "numel") else functools.reduce(int.__mul__, shape, 1)
        return elias_encode(
            payload, codec, n, segments=given.get("segments"), threads=given.get("threads")
        )

    return call  # type: ignore[return-value]


def native_args(
    form: BlockFormat, fixed: tuple[int, int], payload: int, size: int, count: int, result: int
) -> _C.EliasArgs:
    """Arguments of both kernels.

    Args:
        form: The format.
        fixed: Address of the fixed payload's codes, and their bytes; the scales follow.
        payload: Address of the variable payload.
        size: Its bytes.
        count: Blocks.
        result: Address of int64[1].
    """
    codes, code_bytes = fixed
    streams = payload + (elias.END_BYTES + blocks.SCALE_BYTES) * count
    return _C.EliasArgs(
        native_format(form), codes, codes + code_bytes, code_bytes, payload,
        payload + elias.END_BYTES * count, streams, size - (streams - payload), result,
    )  # fmt: skip


def _check_bytes(info: ArrayInfo, size: int, *, least: bool = False) -> None:
    check_dtype(info, ("uint8",))
    got = info.shape[0] if len(info.shape) == 1 else -1
    if got != size and not (least and got > size):
        raise ValueError(
            f"{info.name} must have {'at least ' if least else ''}{size} bytes, "
            f"got shape {list(info.shape)}"
        )


def _check_coded(payload: ArrayInfo, form: BlockFormat, table: IntArray) -> None:
    """Raises ValueError unless a payload has a length that one of these segments can have."""
    least, most = elias.head_bytes(table, form), elias.longest_bytes(table, form)
    _check_bytes(payload, least, least=True)
    size = payload.shape[0]
    if size > most or size % 4:
        raise ValueError(
            f"{payload.name} must have {least} to {most} bytes, a multiple of 4, got {size}"
        )


def _launch(
    call: Call,
    name: str,
    fixed: ArrayInfo,
    payload: ArrayInfo,
    form: BlockFormat,
    table: IntArray,
    initial: int,
) -> int:
    """Runs a kernel and waits for its result, a number that begins as ``initial``."""
    check_disjoint(payload, fixed)
    result = call.library.empty(fixed.array, (1,), "int64")
    result[...] = initial
    count = elias.count_blocks(table, form)
    args = native_args(
        form, (fixed.address, blocks.table_code_bytes(table, form)), payload.address,
        payload.shape[0], count, call.library.info("result", result).address,
    )  # fmt: skip
    if count:
        call.launch(name, blocks.rows_of(table, form), args, unit=form.block)
    return int(result[0])


def _unknown(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (None,), "uint8"


def _fixed(given: Mapping[str, Any]) -> tuple[Shape, str]:
    n = None if given["segments"] is not None else given["codec"].payload_bytes(given["n"])
    return (n,), "uint8"


_LEVELS = CodecFields(BlockFormat, levels_of)


def _checked_table(segments: Segments, n: int, form: BlockFormat) -> IntArray:
    check_n(n)
    return check_table(as_table(segments), n, "n", form)


@kernel(result=_unknown, codec=_LEVELS)
def elias_encode(
    payload: A,
    codec: BlockCodec,
    n: int,
    *,
    segments: Segments = None,
    threads: int | None = None,
) -> A:
    """Makes a payload of levels shorter, and loses nothing: the paper's Elias coding.

    Each block becomes the shortest of three streams (QSGD, arXiv 1610.02132, section 3): gaps and
    levels of what is not zero, all levels, or the codes as they are. On CUDA this waits for the
    device once, to learn the length.

    Args:
        payload: uint8, as of :func:`pydist.ops.quantize` without entropy.
        codec: What it was encoded with: a ``QSGD`` or a ``BlockInt``.
        n: Elements.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload of variable length, a multiple of 4.

    Raises:
        TypeError: ``payload`` is not uint8, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or ``n`` is too large for 32-bit places.
    """
    form = levels_of(codec)
    call = Call("payload", payload, threads)
    table = _checked_table(segments, n, form)
    fixed = call.input("payload", payload)
    _check_bytes(fixed, blocks.table_bytes(table, form))
    coded = call.result(None, "uint8", (elias.longest_bytes(table, form),))
    used = _launch(call, "elias_encode", fixed, coded, form, table, 0)
    size = elias.payload_bytes(table, form, used)
    shorter = call.library.empty(coded.array, (size,), "uint8")
    shorter[...] = coded.array[:size]
    return shorter


@kernel(result=_fixed, codec=_LEVELS)
def elias_decode(
    payload: A,
    codec: BlockCodec,
    n: int,
    *,
    segments: Segments = None,
    threads: int | None = None,
) -> A:
    """The inverse of :func:`elias_encode`.

    On CUDA this waits for the device once, to learn whether the payload is well-formed.

    Args:
        payload: uint8, as of :func:`elias_encode`; any bytes.
        codec: What it was encoded with.
        n: Elements.
        segments: int64 [k, 4] in host memory; default one segment of ``n``.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload, as of :func:`pydist.ops.quantize` without entropy.

    Raises:
        TypeError: ``payload`` is not uint8, or the codec has no levels.
        ValueError: The payload does not fit ``n``, or is malformed; names block and reason.
    """
    form = levels_of(codec)
    call = Call("payload", payload, threads)
    table = _checked_table(segments, n, form)
    coded = call.input("payload", payload)
    _check_coded(coded, form, table)
    gaps = blocks.has_gaps(table, form)
    fixed = call.result(None, "uint8", (blocks.table_bytes(table, form),), gaps=gaps)
    elias.check_fault(_launch(call, "elias_decode", fixed, coded, form, table, elias.NO_FAULT))
    return fixed.array
