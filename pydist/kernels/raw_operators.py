"""The registration of the operator of plain values; see :mod:`pydist.kernels.operators`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydist.kernels import checks
from pydist.kernels import signs as kernels
from pydist.kernels.operators import (
    contiguous,
    on_device_of,
    optional_view,
    register,
    result_view,
    target_of,
    view_of,
    writes_only_fake,
    written,
)

_SUM = "Tensor values, *, bool mean=False, Tensor(a!)? flags=None"


def _sum_values(values: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    dtype = dtype or torch.float32
    if str(dtype)[6:] not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    _, n = checks.check_rows(view_of("values", values))
    out = values.new_empty(n, dtype=dtype)
    _sum_values_out(values, out=out, **options)
    return out


def _sum_values_out(
    values: Tensor, *, mean: bool = False, flags: Tensor | None = None, out: Tensor
) -> None:
    values = contiguous(values)
    with on_device_of(values):
        kernels.sum_values(
            target_of(values), view_of("values", values), result_view(out),
            mean=mean, flags=optional_view("flags", flags),
        )  # fmt: skip
    written(out, out)


def _sum_values_fake(values, *, mean=False, flags=None, dtype=None):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape[1], dtype=dtype or torch.float32)


register(f"sum_values({_SUM}, ScalarType? dtype=None) -> Tensor", _sum_values, _sum_values_fake)
register(f"sum_values_out({_SUM}, Tensor(b!) out) -> ()", _sum_values_out, writes_only_fake)
