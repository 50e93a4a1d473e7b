"""The kernels of Elias-coded payloads behind both doors: checks, then the call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydist import _C
from pydist.formats import blocks, elias
from pydist.formats.blocks import BlockFormat
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.block_kernels import BlockCodec, check_table, format_of, native_format
from pydist.kernels.checks import View, check_device, check_disjoint, check_dtype, check_n
from pydist.kernels.signs import Target, launch


def entropy_of(codec: object) -> str | None:
    """``"elias"``, or ``None`` for payloads of fixed length."""
    return getattr(codec, "entropy", None)


def without_entropy(codec: Any) -> Any:
    """The codec whose payloads have a fixed length, before entropy coding."""
    return replace(codec, entropy=None) if entropy_of(codec) else codec


def check_fixed(codec: BlockCodec) -> None:
    """Raises ValueError where payloads of a codec have no common length."""
    if entropy_of(codec):
        raise ValueError(
            f"codec must have entropy=None, got {codec}: payloads of variable length do not "
            "stack; elias_decode each of them first"
        )


def check_no_out(codec: BlockCodec, out: object) -> None:
    """Raises ValueError where ``out`` is to receive a payload of unknown length."""
    if entropy_of(codec) and out is not None:
        raise ValueError(f"out must be None with {codec}: the length is not known beforehand")


def levels_of(codec: BlockCodec) -> BlockFormat:
    """The format of a codec of levels; raises TypeError where it is none."""
    form = format_of(codec)
    if form.scheme != "levels":
        raise TypeError(f"codec must be a QSGD or a BlockInt, got {shown(codec)}")
    return form


def table_of(segments: IntArray | None, n: int, form: BlockFormat) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    check_n(n)
    return check_table(segments, n, "n", form)


def _check_bytes(view: View, size: int, least: bool = False) -> None:
    check_dtype(view, ("uint8",))
    got = view.shape[0] if len(view.shape) == 1 else -1
    if got != size and not (least and got > size):
        raise ValueError(
            f"{view.name} must have {'at least ' if least else ''}{size} bytes, "
            f"got shape {list(view.shape)}"
        )


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


def _launch(
    target: Target,
    kernel: str,
    fixed: View,
    payload: View,
    result: View,
    form: BlockFormat,
    table: IntArray,
) -> None:
    check_device(payload, fixed, result)
    check_disjoint(payload, fixed)
    codes = fixed.address, blocks.table_code_bytes(table, form)
    count = elias.count_blocks(table, form)
    size = payload.shape[0]
    args = native_args(form, codes, payload.address, size, count, result.address)
    if count:
        launch(target, kernel, blocks.rows_of(table, form), args, unit=form.block)


def encode(
    target: Target, payload: View, out: View, result: View, form: BlockFormat, table: IntArray
) -> None:
    """Writes a fixed payload into ``out``, of ``elias.longest_bytes``.

    The bytes of its streams go to ``result``, int64[1] that holds 0.
    """
    _check_bytes(payload, blocks.table_bytes(table, form))
    _check_bytes(out, elias.longest_bytes(table, form))
    _launch(target, "elias_encode", payload, out, result, form, table)


def decode(
    target: Target, payload: View, out: View, result: View, form: BlockFormat, table: IntArray
) -> None:
    """Writes the fixed payload into ``out``, where gaps are zero already.

    A fault goes to ``result``, int64[1] that holds ``elias.NO_FAULT``.
    """
    check_payload(payload, form, table)
    _check_bytes(out, blocks.table_bytes(table, form))
    _launch(target, "elias_decode", out, payload, result, form, table)


def check_payload(payload: View, form: BlockFormat, table: IntArray) -> None:
    """Raises ValueError unless a payload has a length that one of these segments can have."""
    least, most = elias.head_bytes(table, form), elias.longest_bytes(table, form)
    _check_bytes(payload, least, least=True)
    size = payload.shape[0]
    if size > most or size % 4:
        raise ValueError(
            f"{payload.name} must have {least} to {most} bytes, a multiple of 4, got {size}"
        )
