"""Plain values: the sum of all ranks' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydist import _C
from pydist.kernels.call import Call
from pydist.kernels.checks import FLOATS, ITEMSIZE, check_rows
from pydist.kernels.launch import one_row
from pydist.kernels.register import Shape, kernel
from pydist.kernels.signs import DType

if TYPE_CHECKING:
    from pydist.kernels.register import A


def _of_a_row(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return (given["values"].shape[1],), "float32"


@kernel(result=_of_a_row, writes=("flags",))
def sum_values(
    values: A | Sequence[A],
    *,
    mean: bool = False,
    dtype: DType = None,
    flags: A | None = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """The sum of all ranks' values, in float32 and in rank order, rounded once.

    Args:
        values: float32, float16 or bfloat16 [ranks, n], or a sequence of [n].
        mean: Divide the sum by the number of ranks.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        flags: int32[1]; 1 is OR-ed in where the result holds a NaN or an infinity.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        [n] values.

    Raises:
        TypeError: A dtype is not supported, or ``out`` has another.
        ValueError: ``values`` is no matrix, or ``out`` or ``flags`` does not fit it.
    """
    call = Call("values", values, threads)
    source = call.input("values", values)
    ranks, n = check_rows(source)
    total = call.values(out, dtype, n, source)
    _, raised = call.flags(flags, source, total)
    args = sum_args(source.address, n * ITEMSIZE[source.dtype], ranks, ranks if mean else 1)
    call.launch(
        "sum_values", one_row(total.address, n), FLOATS[source.dtype], FLOATS[total.dtype], args,
        raised,
    )  # fmt: skip
    return total.array


def sum_args(
    values: int, stride: int = 0, ranks: int = 1, divisor: int = 1, out: int = 0
) -> _C.SumArgs:
    """Arguments of ``sum_values`` of the compiled module.

    Args:
        values: Address of the first rank's values; 0 for the rows' own elements.
        stride: Bytes from one rank's to the next.
        ranks: How many there are.
        divisor: What sums are divided by.
        out: Address of the payload that is written; 0 for the rows' own elements.
    """
    return _C.SumArgs(values, stride, ranks, divisor, out)
