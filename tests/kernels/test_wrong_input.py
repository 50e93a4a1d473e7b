"""What a caller can get wrong with the kernels: the message names the argument and the value."""

from __future__ import annotations

import re
from typing import Any

import pytest
from wrong import BETAS, Arrays

from pydist import BlockInt, Sign, TopK

FOUR = BlockInt(4, 32)
TENTH = TopK(0.1, 64)

# name: (call, exception, words of the message)
WRONG: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    # dtypes
    "x double": (lambda a: a.pack_signs(a.f(4, dtype="float64")), TypeError, ("x", "float64")),
    "x int": (lambda a: a.pack_signs(a.f(4, dtype="int32")), TypeError, ("x", "int32")),
    "flags int64": (
        lambda a: a.pack_signs(a.f(4), flags=a.u(1, dtype="int64")),
        TypeError, ("flags", "int32", "int64"),
    ),
    "planes float": (lambda a: a.unpack_votes(a.f(1, 4), 3), TypeError, ("planes", "float32")),
    "payloads int8": (
        lambda a: a.count_votes(a.u(2, 4, dtype="int8")), TypeError, ("payloads", "int8"),
    ),
    "payloads float": (lambda a: a.majority_vote(a.f(2, 4)), TypeError, ("payloads", "float32")),
    "momentum half": (
        lambda a: a.lion_pack_(a.f(4), a.f(4, dtype="float16"), **BETAS),
        TypeError, ("momentum", "bfloat16", "float16"),
    ),
    "momentum_out double": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, momentum_out=a.f(4, dtype="float64")),
        TypeError, ("momentum_out", "float32", "float64"),
    ),
    "param int": (
        lambda a: a.lion_apply_(a.u(4), a.u(1, 4), lr=0.1), TypeError, ("param", "uint8"),
    ),
    # lengths and shapes
    "momentum short": (
        lambda a: a.lion_pack_(a.f(4), a.f(3), **BETAS), ValueError, ("momentum", "4", "3"),
    ),
    "momentum_out long": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, momentum_out=a.f(5)),
        ValueError, ("momentum_out", "4", "5"),
    ),
    "two flags": (
        lambda a: a.pack_signs(a.f(4), flags=a.u(2, dtype="int32")), ValueError, ("flags", "2"),
    ),
    "no skip": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=0.1, skip=a.u(0, dtype="int32")),
        ValueError, ("skip", "1", "0"),
    ),
    "payload truncated": (
        lambda a: a.unpack_signs(a.u(4), 33), ValueError, ("8 bytes", "n=33", "4"),
    ),
    "payload too long": (
        lambda a: a.unpack_signs(a.u(12), 33), ValueError, ("8 bytes", "n=33", "12"),
    ),
    "payload of 3 bytes": (
        lambda a: a.unpack_signs(a.u(3), 3), ValueError, ("payload", "4 bytes", "got 3"),
    ),
    "payload of two dimensions": (
        lambda a: a.unpack_signs(a.u(1, 4), 3), ValueError, ("payload", "[1, 4]"),
    ),
    "planes of one dimension": (lambda a: a.unpack_votes(a.u(4), 3), ValueError, ("planes", "[4]")),
    "payloads of one dimension": (lambda a: a.count_votes(a.u(4)), ValueError, ("payloads", "[4]")),
    "payloads of 6 bytes": (
        lambda a: a.majority_vote(a.u(2, 6)), ValueError, ("payloads", "multiple of 4", "6"),
    ),
    "planes truncated": (
        lambda a: a.lion_apply_(a.f(33), a.u(1, 4), lr=0.1), ValueError, ("planes", "8", "4"),
    ),
    "n beyond payloads": (
        lambda a: a.majority_vote(a.u(2, 4), n=33), ValueError, ("n", "[0, 32]", "33"),
    ),
    "n negative": (lambda a: a.majority_vote(a.u(2, 4), n=-1), ValueError, ("n", "-1")),
    "unpack n negative": (lambda a: a.unpack_votes(a.u(1, 0), -1), ValueError, ("n", "-1")),
    # ranks
    "zero ranks": (lambda a: a.count_votes(a.u(0, 4)), ValueError, ("payloads", "ranks", "0")),
    "zero ranks vote": (lambda a: a.majority_vote(a.u(0, 4)), ValueError, ("ranks", "0")),
    "too many ranks": (
        lambda a: a.count_votes(a.u(65536, 4)), ValueError, ("ranks", "65535", "65536"),
    ),
    "apply ranks zero": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=0.1, ranks=0), ValueError, ("ranks", "0"),
    ),
    "unpack ranks negative": (
        lambda a: a.unpack_votes(a.u(1, 4), 3, ranks=-2), ValueError, ("ranks", "-2"),
    ),
    "planes do not fit ranks": (
        lambda a: a.unpack_votes(a.u(2, 4), 3, ranks=4),
        ValueError, ("3 count planes", "ranks=4", "2"),
    ),
    "three sign planes": (
        lambda a: a.unpack_votes(a.u(3, 4), 3), ValueError, ("planes", "3", "ranks"),
    ),
    "no planes": (
        lambda a: a.lion_apply_(a.f(4), a.u(0, 4), lr=0.1), ValueError, ("planes", "0"),
    ),
    # scalars
    "zero_bit": (lambda a: a.pack_signs(a.f(4), zero_bit=2), ValueError, ("zero_bit", "2")),
    "lion zero_bit": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, zero_bit=-1),
        ValueError, ("zero_bit", "-1"),
    ),
    "ties": (
        lambda a: a.majority_vote(a.u(2, 4), ties="coin"),
        ValueError, ("ties", "'coin'", "hash"),
    ),
    "seed negative": (lambda a: a.majority_vote(a.u(2, 4), seed=-1), ValueError, ("seed", "-1")),
    "seed large": (
        lambda a: a.majority_vote(a.u(2, 4), seed=2**32), ValueError, ("seed", str(2**32)),
    ),
    "lion seed": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, seed=2**32),
        ValueError, ("seed", str(2**32)),
    ),
    "lion rank": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, rank=65535), ValueError, ("rank", "65535"),
    ),
    "beta1": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), beta1=1.5, beta2=0.9), ValueError, ("beta1", "1.5"),
    ),
    "beta2": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), beta1=0.9, beta2=float("nan")),
        ValueError, ("beta2", "nan"),
    ),
    "range zero": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, binarization_range=0.0),
        ValueError, ("binarization_range", "0.0"),
    ),
    "range infinite": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, binarization_range=float("inf")),
        ValueError, ("binarization_range", "inf"),
    ),
    "lr negative": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=-0.1), ValueError, ("lr", "-0.1"),
    ),
    "lr nan": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=float("nan")), ValueError, ("lr", "nan"),
    ),
    "weight_decay": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=0.1, weight_decay=float("inf")),
        ValueError, ("weight_decay", "inf"),
    ),
    # segments
    "segments int32": (
        lambda a: a.pack_signs(a.f(4), segments=a.table((0, 4, 0, 0), dtype="int32")),
        ValueError, ("segments", "int64", "int32"),
    ),
    "segments of three columns": (
        lambda a: a.pack_signs(a.f(4), segments=a.u(1, 3, dtype="int64")),
        ValueError, ("segments", "[1, 3]"),
    ),
    "segments too short": (
        lambda a: a.pack_signs(a.f(4), segments=a.table((0, 3, 0, 0))),
        ValueError, ("segments", "x", "3", "4"),
    ),
    "no segments": (
        lambda a: a.lion_pack_(a.f(4), a.f(4), **BETAS, segments=a.table()),
        ValueError, ("segments", "grad", "0", "4"),
    ),
    "segments not aligned": (
        lambda a: a.pack_signs(a.f(4), segments=a.table((8, 4, 0, 0))),
        ValueError, ("segments", "offset 8", "row 0", "32"),
    ),
    "segments overlap": (
        lambda a: a.pack_signs(a.f(35), segments=a.table((0, 33, 0, 0), (32, 2, 1, 0))),
        ValueError, ("segments", "row 1", "32", "64"),
    ),
    "segments negative": (
        lambda a: a.pack_signs(a.f(4), segments=a.table((0, 4, -7, 0))),
        ValueError, ("segments", "-7"),
    ),
    "segments beyond payloads": (
        lambda a: a.majority_vote(a.u(2, 4), segments=a.table((32, 1, 0, 0))),
        ValueError, ("segments", "8", "4"),
    ),
    "segments of another parameter": (
        lambda a: a.lion_apply_(a.f(4), a.u(1, 4), lr=0.1, segments=a.table((0, 5, 0, 0))),
        ValueError, ("segments", "param", "5", "4"),
    ),
    # block formats
    "quantize double": (
        lambda a: a.quantize(a.f(4, dtype="float64"), FOUR), TypeError, ("x", "float64"),
    ),
    "bare sign": (
        lambda a: a.quantize(a.f(4), Sign(None)),
        TypeError, ("codec", "Sign(scale=None, block=512)"),
    ),
    "no codec": (lambda a: a.quantize(a.f(4), 4), TypeError, ("codec", "4")),
    "quantize flags": (
        lambda a: a.quantize(a.f(4), FOUR, flags=a.u(2, dtype="int32")), ValueError, ("flags", "2"),
    ),
    "quantize zero_bit": (
        lambda a: a.quantize(a.f(4), FOUR, zero_bit=2), ValueError, ("zero_bit", "2"),
    ),
    "quantize seed": (
        lambda a: a.quantize(a.f(4), FOUR, seed=2**32), ValueError, ("seed", str(2**32)),
    ),
    "quantize rank": (
        lambda a: a.quantize(a.f(4), FOUR, rank=65535), ValueError, ("rank", "65535"),
    ),
    "quantize phase": (lambda a: a.quantize(a.f(4), FOUR, phase=4), ValueError, ("phase", "4")),
    "quantize step": (lambda a: a.quantize(a.f(4), FOUR, step=-1), ValueError, ("step", "-1")),
    "residual short": (
        lambda a: a.quantize_feedback_(a.f(4), a.f(3), FOUR), ValueError, ("residual", "4", "3"),
    ),
    "residual half": (
        lambda a: a.quantize_feedback_(a.f(4), a.f(4, dtype="float16"), FOUR),
        TypeError, ("residual", "bfloat16", "float16"),
    ),
    "quantized truncated": (
        lambda a: a.dequantize(a.u(20), FOUR, 33), ValueError, ("28 bytes", "n=33", "20"),
    ),
    "quantized of two dimensions": (
        lambda a: a.dequantize(a.u(1, 8), FOUR, 3), ValueError, ("payload", "[1, 8]"),
    ),
    "quantized too long": (
        lambda a: a.sum_quantized(a.u(2, 32), FOUR, 33), ValueError, ("28 bytes", "n=33", "32"),
    ),
    "quantized n negative": (
        lambda a: a.sum_quantized(a.u(1, 0), FOUR, -1), ValueError, ("n", "-1"),
    ),
    "quantized float": (
        lambda a: a.sum_quantized(a.f(1, 8), FOUR, 3), TypeError, ("payloads", "float32"),
    ),
    "quantized of no ranks": (
        lambda a: a.reduce_quantized(a.u(0, 8), FOUR, 3), ValueError, ("payloads", "ranks", "0"),
    ),
    "reduced too short": (
        lambda a: a.reduce_quantized(a.u(2, 8), FOUR, 33), ValueError, ("28 bytes", "n=33", "8"),
    ),
    "quantize out": (
        lambda a: a.quantize(a.f(33), FOUR, out=a.u(20)), ValueError, ("out", "[28]", "[20]"),
    ),
    "values of ranks int": (
        lambda a: a.sum_values(a.u(2, 4, dtype="int32")), TypeError, ("values", "int32"),
    ),
    "values of one dimension": (lambda a: a.sum_values(a.f(4)), ValueError, ("values", "[4]")),
    "values of no ranks": (
        lambda a: a.sum_values(a.f(0, 4)), ValueError, ("values", "ranks", "0"),
    ),
    "sum out": (lambda a: a.sum_values(a.f(2, 4), out=a.f(3)), ValueError, ("out", "4", "3")),
    "sum flags": (
        lambda a: a.sum_values(a.f(2, 4), flags=a.u(2, dtype="int32")), ValueError, ("flags", "2"),
    ),
    "dequantize out": (
        lambda a: a.dequantize(a.u(28), FOUR, 33, out=a.f(32)), ValueError, ("out", "33", "32"),
    ),
    "block segments": (
        lambda a: a.quantize(
            a.f(8), BlockInt(4, 64), segments=a.table((0, 4, 0, 0), (32, 4, 1, 0))
        ),
        ValueError, ("segments", "offset 32", "row 1", "64"),
    ),
    "block first": (
        lambda a: a.quantize(a.f(4), BlockInt(4, 64), segments=a.table((0, 4, 0, 32))),
        ValueError, ("segments", "first element 32", "row 0", "64"),
    ),
    # top-k
    "select double": (
        lambda a: a.topk_select(a.f(4, dtype="float64"), TENTH), TypeError, ("x", "float64"),
    ),
    "no top-k": (
        lambda a: a.topk_select(a.f(4), FOUR), TypeError, ("codec", "BlockInt(bits=4, block=32"),
    ),
    "select seed": (
        lambda a: a.topk_select(a.f(4), TENTH, seed=-1), ValueError, ("seed", "-1"),
    ),
    "select step": (
        lambda a: a.topk_select(a.f(4), TENTH, step=-1), ValueError, ("step", "-1"),
    ),
    "select flags": (
        lambda a: a.topk_select(a.f(4), TENTH, flags=a.u(2, dtype="int32")),
        ValueError, ("flags", "2"),
    ),
    "select out": (
        lambda a: a.topk_select(a.f(4), TENTH, out=a.u(8)), ValueError, ("out", "[12]", "[8]"),
    ),
    "select segments": (
        lambda a: a.topk_select(a.f(8), TENTH, segments=a.table((0, 4, 0, 0), (32, 4, 1, 0))),
        ValueError, ("segments", "offset 32", "row 1", "64"),
    ),
    "top-k residual short": (
        lambda a: a.topk_feedback_(a.f(4), a.f(3), TENTH), ValueError, ("residual", "4", "3"),
    ),
    "top-k residual half": (
        lambda a: a.topk_feedback_(a.f(4), a.f(4, dtype="float16"), TENTH),
        TypeError, ("residual", "bfloat16", "float16"),
    ),
    "scatter truncated": (
        lambda a: a.topk_scatter(a.u(1, 8), TENTH, 4), ValueError, ("12 bytes", "n=4", "8"),
    ),
    "scatter n negative": (
        lambda a: a.topk_scatter(a.u(1, 0), TENTH, -1), ValueError, ("n", "-1"),
    ),
    "scatter malformed": (
        lambda a: a.topk_scatter(a.u(2, 12), TENTH, 4),
        ValueError, ("malformed", "row 0", "block 0", "0 positions", "expected 1"),
    ),
    "reduce of no ranks": (
        lambda a: a.topk_reduce(a.u(0, 12), TENTH, 4), ValueError, ("payloads", "ranks", "0"),
    ),
    "clear of two payloads": (
        lambda a: a.topk_clear_(a.f(4), a.u(2, 12), TENTH), ValueError, ("payload", "[2, 12]"),
    ),
    "clear int": (
        lambda a: a.topk_clear_(a.u(4), a.u(12), TENTH), TypeError, ("x", "uint8"),
    ),
    "block segments of another length": (
        lambda a: a.quantize(a.f(4), FOUR, segments=a.table((0, 5, 0, 0))),
        ValueError, ("segments", "5", "x", "4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(a: Arrays, case: str) -> None:
    call, exception, parts = WRONG[case]
    with pytest.raises(exception) as raised:
        call(a)
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", str(raised.value)), raised.value
