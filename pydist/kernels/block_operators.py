"""The registration of the operators of block formats; see :mod:`pydist.kernels.operators`.

A codec travels through a schema as the fields of its format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydist.formats import blocks
from pydist.formats.blocks import BlockFormat
from pydist.kernels import block_kernels, checks
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.operators import (
    check_apart,
    contiguous,
    dense_of,
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

_FORMAT = "str scheme, int bits, int block, str norm, bool stochastic"
_ENCODE = (
    "int zero_bit=1, int seed=0, int rank=0, int phase=0, int step=0, "
    "Tensor? step_tensor=None, Tensor(a!)? flags=None"
)
_SEGMENTS = "Tensor? segments=None"
_QUANTIZE = f"Tensor x, *, {_FORMAT}, {_ENCODE}, {_SEGMENTS}"
_FEEDBACK = f"Tensor x, Tensor(b!) residual, *, {_FORMAT}, {_ENCODE}, {_SEGMENTS}"
_REDUCE = f"Tensor payloads, SymInt n, *, {_FORMAT}, bool mean=False, {_ENCODE}, {_SEGMENTS}"
_SUM = f"Tensor payloads, SymInt n, *, {_FORMAT}, bool mean=False, {_SEGMENTS}"


class _Call:
    """What all four operators do with the fields of a format and the scalars of an encoder."""

    FORMAT = ("scheme", "bits", "block", "norm", "stochastic")

    def __init__(self, options: dict[str, Any]) -> None:
        self.form = BlockFormat(*(options.pop(name) for name in self.FORMAT))
        self.flags = optional_view("flags", options.pop("flags", None))
        self.step = optional_view("step", options.pop("step_tensor", None))
        self.encode = EncodeOptions(**options)

    def result(
        self, out: Tensor, segments: Tensor | None, n: int, name: str, *inputs: checks.View
    ) -> tuple[checks.View, Any]:
        """Memory for a payload, its gaps zeroed, and the checked table."""
        table = block_kernels.check_table(table_of(segments), n, name, self.form)
        return result_view(out, blocks.has_gaps(table, self.form), *inputs), table


def _size(n: int, segments: Tensor | None, options: dict[str, Any], name: str) -> int:
    form = BlockFormat(*(options[field] for field in _Call.FORMAT))
    table = block_kernels.check_table(table_of(segments), n, name, form)
    return blocks.table_bytes(table, form)


# --------------------------------------------------------------------------- implementations


def _quantize(x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    size = _size(x.numel(), segments, options, "x")
    out = x.new_empty(size, dtype=torch.uint8)
    _quantize_out(x, segments=segments, out=out, **options)
    return out


def _quantize_out(
    x: Tensor, *, segments: Tensor | None = None, out: Tensor, **options: Any
) -> None:
    call = _Call(options)
    x = contiguous(x)
    view = view_of("x", x)
    out_view, table = call.result(out, segments, view.size, "x", view)
    with on_device_of(x):
        block_kernels.quantize(
            target_of(x), view, out_view, call.form, call.encode,
            flags=call.flags, segments=table, step=call.step,
        )  # fmt: skip
    written(out, out)


def _quantize_feedback(
    x: Tensor, residual: Tensor, *, segments: Tensor | None = None, **options: Any
) -> Tensor:
    size = _size(x.numel(), segments, options, "x")
    out = x.new_empty(size, dtype=torch.uint8)
    _quantize_feedback_out(x, residual, segments=segments, out=out, **options)
    return out


def _quantize_feedback_out(
    x: Tensor, residual: Tensor, *, segments: Tensor | None = None, out: Tensor, **options: Any
) -> None:
    call = _Call(options)
    check_apart("out", out, "residual", residual)
    dense = dense_of("residual", residual)
    x = contiguous(x)
    x_view, kept = view_of("x", x), view_of("residual", dense)
    out_view, table = call.result(out, segments, x_view.size, "x", x_view, kept)
    with on_device_of(x):
        block_kernels.quantize_feedback(
            target_of(x), x_view, kept, kept, out_view, call.form, call.encode,
            flags=call.flags, segments=table, step=call.step,
        )  # fmt: skip
    written(residual, dense)
    written(out, out)


def _reduce_quantized(
    payloads: Tensor, n: int, *, segments: Tensor | None = None, **options: Any
) -> Tensor:
    _, size = checks.check_payloads(view_of("payloads", payloads))
    out = payloads.new_empty(size)
    _reduce_quantized_out(payloads, n, segments=segments, out=out, **options)
    return out


def _reduce_quantized_out(
    payloads: Tensor,
    n: int,
    *,
    mean: bool = False,
    segments: Tensor | None = None,
    out: Tensor,
    **options: Any,
) -> None:
    call = _Call(options)
    payloads = contiguous(payloads)
    view = view_of("payloads", payloads)
    out_view, table = call.result(out, segments, n, "n", view)
    with on_device_of(payloads):
        block_kernels.reduce_quantized(
            target_of(payloads), view, n, out_view, call.form, call.encode,
            mean=mean, flags=call.flags, segments=table, step=call.step,
        )  # fmt: skip
    written(out, out)


def _sum_quantized(
    payloads: Tensor, n: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    checks.check_n(n)
    dtype = dtype or torch.float32
    if str(dtype)[6:] not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    out = payloads.new_empty(n, dtype=dtype)
    _sum_quantized_out(payloads, n, out=out, **options)
    return out


def _sum_quantized_out(
    payloads: Tensor,
    n: int,
    *,
    mean: bool = False,
    segments: Tensor | None = None,
    out: Tensor,
    **options: Any,
) -> None:
    checks.check_n(n)
    call = _Call(options)
    payloads = contiguous(payloads)
    view = result_view(out)
    checks.check_size(view, n, "n")
    with on_device_of(payloads):
        block_kernels.dequantize(
            target_of(payloads), view_of("payloads", payloads), view, call.form,
            mean=mean, segments=table_of(segments),
        )  # fmt: skip
    written(out, out)


# --------------------------------------------------------------------------- fake kernels


def _payload_fake(x, *args, segments=None, **options):  # type: ignore[no-untyped-def]
    if segments is not None:  # the length depends on the table's values
        size = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(size, dtype=torch.uint8)
    form = BlockFormat(*(options[field] for field in _Call.FORMAT))
    return x.new_empty(form.payload_bytes(x.numel()), dtype=torch.uint8)


def _reduce_quantized_fake(payloads, n, **options):  # type: ignore[no-untyped-def]
    return payloads.new_empty(payloads.shape[1])


def _sum_quantized_fake(payloads, n, *, dtype=None, **options):  # type: ignore[no-untyped-def]
    return payloads.new_empty(n, dtype=dtype or torch.float32)


register(f"quantize({_QUANTIZE}) -> Tensor", _quantize, _payload_fake)
register(f"quantize_out({_QUANTIZE}, Tensor(c!) out) -> ()", _quantize_out, writes_only_fake)
register(f"quantize_feedback_({_FEEDBACK}) -> Tensor", _quantize_feedback, _payload_fake)
register(
    f"quantize_feedback_out_({_FEEDBACK}, Tensor(c!) out) -> ()",
    _quantize_feedback_out,
    writes_only_fake,
)
register(f"reduce_quantized({_REDUCE}) -> Tensor", _reduce_quantized, _reduce_quantized_fake)
register(
    f"reduce_quantized_out({_REDUCE}, Tensor(c!) out) -> ()",
    _reduce_quantized_out,
    writes_only_fake,
)
register(
    f"sum_quantized({_SUM}, ScalarType? dtype=None) -> Tensor",
    _sum_quantized,
    _sum_quantized_fake,
)
register(f"sum_quantized_out({_SUM}, Tensor(a!) out) -> ()", _sum_quantized_out, writes_only_fake)
