"""The kernels on NumPy and CuPy arrays; needs no torch.

The result is the same kind of array as the input. NumPy arrays are read and written where they are,
without a copy, if they are C-contiguous. Neither torch nor CuPy is needed for NumPy; ``bfloat16``
arrays are those of ``ml_dtypes``. The functions are those of :mod:`pydist.ops`.
"""

from __future__ import annotations

from pydist import _C
from pydist.kernels.blocks import (
    dequantize,
    quantize,
    quantize_feedback_,
    reduce_quantized,
    sum_quantized,
)
from pydist.kernels.elias import elias_decode, elias_encode
from pydist.kernels.lion import lion_apply_, lion_pack_
from pydist.kernels.raw import sum_values
from pydist.kernels.signs import (
    count_votes,
    majority_vote,
    pack_signs,
    unpack_signs,
    unpack_votes,
)
from pydist.kernels.ternary import (
    ternary_pack,
    ternary_scale,
    ternary_sum,
    ternary_unpack,
    ternary_unpack_sums,
)
from pydist.kernels.topk import (
    topk_clear_,
    topk_feedback_,
    topk_reduce,
    topk_scatter,
    topk_select,
)

_C.current_isa()  # a wrong PYDIST_ISA is an error here, not in the first kernel call

__all__ = [
    "count_votes",
    "dequantize",
    "elias_decode",
    "elias_encode",
    "lion_apply_",
    "lion_pack_",
    "majority_vote",
    "pack_signs",
    "quantize",
    "quantize_feedback_",
    "reduce_quantized",
    "sum_quantized",
    "sum_values",
    "ternary_pack",
    "ternary_scale",
    "ternary_sum",
    "ternary_unpack",
    "ternary_unpack_sums",
    "topk_clear_",
    "topk_feedback_",
    "topk_reduce",
    "topk_scatter",
    "topk_select",
    "unpack_signs",
    "unpack_votes",
]


def __dir__() -> list[str]:
    return __all__  # the kernels, and nothing of how they came here
