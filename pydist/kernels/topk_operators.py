"""The registration of the operators of top-k blocks; see :mod:`pydist.kernels.operators`.

A codec travels through a schema as the fields of its format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydist.formats import blocks
from pydist.formats.topk import TopKFormat, table_bytes
from pydist.kernels import block_kernels, checks, topk_kernels
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

_FORMAT = "float density, int block, str values"
_TIES = "int seed=0, int step=0, Tensor? step_tensor=None"
_COMMON = "Tensor(a!)? flags=None, Tensor? segments=None"
_SELECT = f"Tensor x, *, {_FORMAT}, {_TIES}, {_COMMON}"
_FEEDBACK = f"Tensor x, Tensor(b!) residual, *, {_FORMAT}, {_TIES}, {_COMMON}"
_REDUCE = f"Tensor payloads, SymInt n, *, {_FORMAT}, bool mean=False, {_TIES}, {_COMMON}"
_SCATTER = f"Tensor payloads, SymInt n, *, {_FORMAT}, bool mean=False, {_COMMON}"
_CLEAR = f"Tensor(b!) x, Tensor payload, *, {_FORMAT}, {_COMMON}"


class _Call:
    """What all operators do with the fields of a format and their options."""

    FORMAT = ("density", "block", "values")

    def __init__(self, options: dict[str, Any]) -> None:
        self.form = TopKFormat(*(options[name] for name in self.FORMAT))
        step = optional_view("step", options.get("step_tensor"))
        known = options.get("step", 0) if step is None else step
        self.ties: dict[str, Any] = {"seed": options.get("seed", 0), "step": known}
        self.segments = table_of(options.get("segments"))
        self.common: dict[str, Any] = {
            "flags": optional_view("flags", options.get("flags")), "segments": self.segments,
        }  # fmt: skip

    def size(self, n: int, name: str) -> int:
        """Bytes of a payload of ``n`` elements."""
        return table_bytes(self.table(n, name), self.form)

    def table(self, n: int, name: str) -> Any:
        """The checked table."""
        return block_kernels.check_table(self.segments, n, name, self.form)

    def result(self, out: Tensor, n: int, name: str, *inputs: checks.View) -> checks.View:
        """Memory for a payload, its gaps zeroed."""
        return result_view(out, blocks.has_gaps(self.table(n, name), self.form), *inputs)


# --------------------------------------------------------------------------- implementations


def _select(x: Tensor, **options: Any) -> Tensor:
    out = x.new_empty(_Call(options).size(x.numel(), "x"), dtype=torch.uint8)
    _select_out(x, out=out, **options)
    return out


def _select_out(x: Tensor, *, out: Tensor, **options: Any) -> None:
    call = _Call(options)
    x = contiguous(x)
    view = view_of("x", x)
    out_view = call.result(out, view.size, "x", view)
    with on_device_of(x):
        topk_kernels.select(target_of(x), view, out_view, call.form, **call.ties, **call.common)
    written(out, out)


def _feedback(x: Tensor, residual: Tensor, **options: Any) -> Tensor:
    out = x.new_empty(_Call(options).size(x.numel(), "x"), dtype=torch.uint8)
    _feedback_out(x, residual, out=out, **options)
    return out


def _feedback_out(x: Tensor, residual: Tensor, *, out: Tensor, **options: Any) -> None:
    call = _Call(options)
    check_apart("out", out, "residual", residual)
    dense = dense_of("residual", residual)
    x = contiguous(x)
    x_view, kept = view_of("x", x), view_of("residual", dense)
    out_view = call.result(out, x_view.size, "x", x_view, kept)
    with on_device_of(x):
        topk_kernels.feedback(
            target_of(x), x_view, kept, kept, out_view, call.form, **call.ties, **call.common
        )
    written(residual, dense)
    written(out, out)


def _reduce(payloads: Tensor, n: int, **options: Any) -> Tensor:
    _, size = checks.check_payloads(view_of("payloads", payloads))
    out = payloads.new_empty(size)
    _reduce_out(payloads, n, out=out, **options)
    return out


def _reduce_out(
    payloads: Tensor, n: int, *, mean: bool = False, out: Tensor, **options: Any
) -> None:
    call = _Call(options)
    checks.check_n(n)
    payloads = contiguous(payloads)
    view = view_of("payloads", payloads)
    out_view = call.result(out, n, "n", view)
    with on_device_of(payloads):
        topk_kernels.reduce(
            target_of(payloads), view, n, out_view, call.form, mean=mean, **call.ties, **call.common
        )
    written(out, out)


def _scatter(
    payloads: Tensor, n: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    checks.check_n(n)
    dtype = dtype or torch.float32
    if str(dtype)[6:] not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    out = payloads.new_empty(n, dtype=dtype)
    _scatter_out(payloads, n, out=out, **options)
    return out


def _scatter_out(
    payloads: Tensor, n: int, *, mean: bool = False, out: Tensor, **options: Any
) -> None:
    checks.check_n(n)
    call = _Call(options)
    payloads = contiguous(payloads)
    view = result_view(out)
    checks.check_size(view, n, "n")
    with on_device_of(payloads):
        topk_kernels.scatter(
            target_of(payloads), view_of("payloads", payloads), view, call.form, mean=mean,
            **call.common,
        )  # fmt: skip
    written(out, out)


def _clear(x: Tensor, payload: Tensor, **options: Any) -> None:
    call = _Call(options)
    checks.check_one_payload(tuple(payload.shape))
    dense = dense_of("x", x)
    payloads = contiguous(payload).unsqueeze(0)
    with on_device_of(x):
        topk_kernels.clear(
            target_of(x), view_of("x", dense), view_of("payload", payloads), call.form,
            **call.common,
        )  # fmt: skip
    written(x, dense)


# --------------------------------------------------------------------------- fake kernels


def _payload_fake(x, *args, segments=None, **options):  # type: ignore[no-untyped-def]
    if segments is not None:  # the length depends on the table's values
        size = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(size, dtype=torch.uint8)
    form = TopKFormat(*(options[field] for field in _Call.FORMAT))
    return x.new_empty(form.payload_bytes(x.numel()), dtype=torch.uint8)


def _reduce_fake(payloads, n, **options):  # type: ignore[no-untyped-def]
    return payloads.new_empty(payloads.shape[1])


def _scatter_fake(payloads, n, *, dtype=None, **options):  # type: ignore[no-untyped-def]
    return payloads.new_empty(n, dtype=dtype or torch.float32)


_OUT = "Tensor(c!) out) -> ()"
register(f"topk_select({_SELECT}) -> Tensor", _select, _payload_fake)
register(f"topk_select_out({_SELECT}, {_OUT}", _select_out, writes_only_fake)
register(f"topk_feedback_({_FEEDBACK}) -> Tensor", _feedback, _payload_fake)
register(f"topk_feedback_out_({_FEEDBACK}, {_OUT}", _feedback_out, writes_only_fake)
register(f"topk_reduce({_REDUCE}) -> Tensor", _reduce, _reduce_fake)
register(f"topk_reduce_out({_REDUCE}, {_OUT}", _reduce_out, writes_only_fake)
register(f"topk_scatter({_SCATTER}, ScalarType? dtype=None) -> Tensor", _scatter, _scatter_fake)
register(f"topk_scatter_out({_SCATTER}, {_OUT}", _scatter_out, writes_only_fake)
register(f"topk_clear_({_CLEAR}) -> ()", _clear, writes_only_fake)
