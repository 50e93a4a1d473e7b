"""The registration of the ternary operators; see :mod:`pydist.kernels.operators`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydist.formats import ternary
from pydist.kernels import checks, ternary_kernels
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.operators import (
    contiguous,
    on_device_of,
    optional_view,
    register,
    result_view,
    table_of,
    target_of,
    view_of,
    writes_only_fake,
    written,
)

_LAST = "Tensor(a!)? flags=None, Tensor? segments=None"
_SCALE = f"Tensor x, *, float clip, {_LAST}"
_PACK = (
    "Tensor x, Tensor scalers, *, Tensor? shared=None, int seed=0, int rank=0, int step=0, "
    f"Tensor? step_tensor=None, {_LAST}"
)
_SUM = f"Tensor payloads, SymInt n, *, {_LAST}"
_UNPACK = f"Tensor payloads, Tensor scalers, SymInt n, *, bool mean=False, {_LAST}"
_UNPACK_SUMS = f"Tensor sums, Tensor scalers, SymInt n, *, SymInt ranks, bool mean=False, {_LAST}"


# --------------------------------------------------------------------------- implementations


def _scale(x: Tensor, *, clip: float, segments: Tensor | None = None, **more: Any) -> Tensor:
    count = 1 if segments is None else len(segments)
    out = x.new_empty(count, dtype=torch.float32)
    _scale_out(x, clip=clip, segments=segments, out=out, **more)
    return out


def _scale_out(
    x: Tensor,
    *,
    clip: float,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
) -> None:
    x = contiguous(x)
    view = view_of("x", x)
    table = ternary_kernels.check_table(table_of(segments), view.size, "x")
    scratch = x.new_empty(ternary.scratch_bytes(ternary.rows_of(table)), dtype=torch.uint8)
    with on_device_of(x):
        ternary_kernels.scale(
            target_of(x), view, result_view(out), view_of("scratch", scratch), clip,
            flags=optional_view("flags", flags), segments=table,
        )  # fmt: skip
    written(out, out)


def _pack(x: Tensor, scalers: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    table = ternary_kernels.check_table(table_of(segments), x.numel(), "x")
    out = x.new_empty(ternary.table_bytes(table), dtype=torch.uint8)
    _pack_out(x, scalers, segments=segments, out=out, **options)
    return out


def _pack_out(
    x: Tensor,
    scalers: Tensor,
    *,
    shared: Tensor | None = None,
    step_tensor: Tensor | None = None,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
    **options: Any,
) -> None:
    x, scalers = contiguous(x), contiguous(scalers)
    shared = None if shared is None else contiguous(shared)
    view = view_of("x", x)
    table = ternary_kernels.check_table(table_of(segments), view.size, "x")
    with on_device_of(x):
        ternary_kernels.pack(
            target_of(x), view, view_of("scalers", scalers), optional_view("shared", shared),
            result_view(out, ternary.has_gaps(table), view), EncodeOptions(**options),
            flags=optional_view("flags", flags), segments=table,
            step=optional_view("step", step_tensor),
        )  # fmt: skip
    written(out, out)


def _sum(
    payloads: Tensor, n: int, *, segments: Tensor | None = None, flags: Tensor | None = None
) -> Tensor:
    ranks, _ = checks.check_payloads(view_of("payloads", payloads))
    checks.check_n(n)
    table = ternary_kernels.check_table(table_of(segments), n, "n")
    out = payloads.new_empty(ternary.table_units(table) * ternary.sum_unit_bytes(ranks))
    _sum_out(payloads, n, segments=segments, flags=flags, out=out)
    return out


def _sum_out(
    payloads: Tensor,
    n: int,
    *,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
) -> None:
    checks.check_n(n)
    payloads = contiguous(payloads)
    view = view_of("payloads", payloads)
    table = ternary_kernels.check_table(table_of(segments), n, "n")
    with on_device_of(payloads):
        ternary_kernels.sum_payloads(
            target_of(payloads), view, n, result_view(out, ternary.has_gaps(table), view),
            flags=optional_view("flags", flags), segments=table,
        )  # fmt: skip
    written(out, out)


def _values(like: Tensor, n: int, dtype: torch.dtype | None) -> Tensor:
    checks.check_n(n)
    dtype = dtype or torch.float32
    if str(dtype)[6:] not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return like.new_empty(n, dtype=dtype)


def _unpack(
    payloads: Tensor, scalers: Tensor, n: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    out = _values(payloads, n, dtype)
    _unpack_out(payloads, scalers, n, out=out, **options)
    return out


def _decode_out(
    kernel: Callable[..., None],
    name: str,
    data: Tensor,
    scalers: Tensor,
    n: int,
    *,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
    **options: Any,
) -> None:
    """What both decoders do with payloads, or sums."""
    checks.check_n(n)
    data, scalers = contiguous(data), contiguous(scalers)
    view = result_view(out)
    checks.check_size(view, n, "n")
    with on_device_of(data):
        kernel(
            target_of(data), view_of(name, data), view_of("scalers", scalers), view,
            flags=optional_view("flags", flags), segments=table_of(segments), **options,
        )  # fmt: skip
    written(out, out)


def _unpack_out(
    payloads: Tensor, scalers: Tensor, n: int, *, mean: bool = False, **options: Any
) -> None:
    kernel = ternary_kernels.unpack
    _decode_out(kernel, "payloads", payloads, scalers, n, mean=mean, **options)


def _unpack_sums(
    sums: Tensor, scalers: Tensor, n: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    out = _values(sums, n, dtype)
    _unpack_sums_out(sums, scalers, n, out=out, **options)
    return out


def _unpack_sums_out(
    sums: Tensor, scalers: Tensor, n: int, *, ranks: int, mean: bool = False, **options: Any
) -> None:
    kernel = ternary_kernels.unpack_sums
    _decode_out(kernel, "sums", sums, scalers, n, ranks=ranks, mean=mean, **options)


# --------------------------------------------------------------------------- fake kernels


def _scale_fake(x, *, segments=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(1 if segments is None else segments.shape[0], dtype=torch.float32)


def _unknown(x):  # type: ignore[no-untyped-def]
    """A payload whose length depends on the values of a segment table."""
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _pack_fake(x, scalers, *, segments=None, **options):  # type: ignore[no-untyped-def]
    if segments is not None:
        return _unknown(x)
    whole, rest = x.numel() // ternary.UNIT, x.numel() % ternary.UNIT
    last = torch.sym_min((rest + 3) // 4 * 4, ternary.UNIT_BYTES)
    return x.new_empty(whole * ternary.UNIT_BYTES + last, dtype=torch.uint8)


def _sum_fake(payloads, n, *, segments=None, **options):  # type: ignore[no-untyped-def]
    if segments is not None or not isinstance(payloads.shape[0], int):
        return _unknown(payloads)
    size = (n + ternary.UNIT - 1) // ternary.UNIT * ternary.sum_unit_bytes(payloads.shape[0])
    return payloads.new_empty(size)


def _values_fake(x, scalers, n, *, dtype=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(n, dtype=dtype or torch.float32)


_OUT = "Tensor(b!) out) -> ()"
register(f"ternary_scale({_SCALE}) -> Tensor", _scale, _scale_fake)
register(f"ternary_scale_out({_SCALE}, {_OUT}", _scale_out, writes_only_fake)
register(f"ternary_pack({_PACK}) -> Tensor", _pack, _pack_fake)
register(f"ternary_pack_out({_PACK}, {_OUT}", _pack_out, writes_only_fake)
register(f"ternary_sum({_SUM}) -> Tensor", _sum, _sum_fake)
register(f"ternary_sum_out({_SUM}, {_OUT}", _sum_out, writes_only_fake)
register(f"ternary_unpack({_UNPACK}, ScalarType? dtype=None) -> Tensor", _unpack, _values_fake)
register(f"ternary_unpack_out({_UNPACK}, {_OUT}", _unpack_out, writes_only_fake)
register(
    f"ternary_unpack_sums({_UNPACK_SUMS}, ScalarType? dtype=None) -> Tensor",
    _unpack_sums,
    _values_fake,
)
register(f"ternary_unpack_sums_out({_UNPACK_SUMS}, {_OUT}", _unpack_sums_out, writes_only_fake)
