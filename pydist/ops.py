"""The kernels on tensors.

Inputs are float32, float16 or bfloat16 tensors of any shape and length, on CPU or CUDA; arithmetic
is float32 inside. A payload is uint8, its length a multiple of 4: element i is bit ``i % 8`` of
byte ``i // 8`` (``numpy.packbits(..., bitorder="little")``). What every bit means is in
``docs/wire_format.md``; :mod:`pydist.reference` executes it.

Each function is an operator too, ``torch.ops.pydist.*``: ``torch.compile``, fake tensors and the
profiler see that. Arguments are checked; a message names the argument and the value. NumPy and
CuPy arrays are taken as well (:mod:`pydist.arrays`).
"""

from __future__ import annotations

from pydist.kernels import operators as _operators  # noqa: F401  (registers torch.ops.pydist)
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
