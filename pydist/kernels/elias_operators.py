"""The operators of Elias-coded payloads are registered here (:mod:`pydist.kernels.operators`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydist.formats import blocks, elias
from pydist.formats.blocks import BlockFormat
from pydist.kernels import elias_kernels
from pydist.kernels.operators import (
    contiguous,
    on_device_of,
    register,
    result_view,
    table_of,
    target_of,
    view_of,
)

_ARGUMENTS = "Tensor payload, SymInt n, *, int bits, int block, Tensor? segments=None"


def _form(bits: int, block: int) -> BlockFormat:
    return BlockFormat("levels", bits, block, "max")  # of which only bits and block matter here


def _elias_encode(
    payload: Tensor, n: int, *, bits: int, block: int, segments: Tensor | None = None
) -> Tensor:
    form = _form(bits, block)
    table = elias_kernels.table_of(table_of(segments), n, form)
    payload = contiguous(payload)
    room = payload.new_empty(elias.longest_bytes(table, form), dtype=torch.uint8)
    result = payload.new_zeros(1, dtype=torch.int64)
    with on_device_of(payload):
        elias_kernels.encode(
            target_of(payload), view_of("payload", payload), view_of("out", room),
            view_of("result", result), form, table,
        )  # fmt: skip
        size = elias.payload_bytes(table, form, int(result.item()))  # waits for the device
    return room[:size].clone()


def _elias_decode(
    payload: Tensor, n: int, *, bits: int, block: int, segments: Tensor | None = None
) -> Tensor:
    form = _form(bits, block)
    table = elias_kernels.table_of(table_of(segments), n, form)
    payload = contiguous(payload)
    out = payload.new_empty(blocks.table_bytes(table, form), dtype=torch.uint8)
    result = payload.new_full((1,), elias.NO_FAULT, dtype=torch.int64)
    with on_device_of(payload):
        elias_kernels.decode(
            target_of(payload), view_of("payload", payload),
            result_view(out, blocks.has_gaps(table, form)), view_of("result", result), form, table,
        )  # fmt: skip
        elias.check_fault(int(result.item()))  # waits for the device
    return out


def _encode_fake(payload, n, *, bits, block, segments=None):  # type: ignore[no-untyped-def]
    return payload.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _decode_fake(payload, n, *, bits, block, segments=None):  # type: ignore[no-untyped-def]
    if segments is not None:  # the length depends on the table's values
        return _encode_fake(payload, n, bits=bits, block=block)
    return payload.new_empty(_form(bits, block).payload_bytes(n), dtype=torch.uint8)


register(f"elias_encode({_ARGUMENTS}) -> Tensor", _elias_encode, _encode_fake)
register(f"elias_decode({_ARGUMENTS}) -> Tensor", _elias_decode, _decode_fake)
