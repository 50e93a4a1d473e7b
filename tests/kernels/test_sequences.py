"""Payloads of several ranks as a sequence: what one array of them gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pydist import QSGD, Ternary, TopK, arrays, ops
from pydist.kernels.register import KERNELS

N, RANKS = 1001, 3
GENERATOR = torch.Generator().manual_seed(0)
VALUES = [torch.randn(N, generator=GENERATOR) for _ in range(RANKS)]
SCALERS = torch.stack([ops.ternary_scale(x, Ternary()) for x in VALUES]).amax(0)
CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "count_votes": (ops.pack_signs, {}),
    "majority_vote": (ops.pack_signs, {}),
    "sum_quantized": (lambda x: ops.quantize(x, QSGD(4)), {"codec": QSGD(4), "n": N}),
    "reduce_quantized": (lambda x: ops.quantize(x, QSGD(4)), {"codec": QSGD(4), "n": N}),
    "ternary_sum": (lambda x: ops.ternary_pack(x, SCALERS), {"n": N}),
    "ternary_unpack": (lambda x: ops.ternary_pack(x, SCALERS), {"scalers": SCALERS, "n": N}),
    "topk_reduce": (lambda x: ops.topk_select(x, TopK(0.01)), {"codec": TopK(0.01), "n": N}),
    "topk_scatter": (lambda x: ops.topk_select(x, TopK(0.01)), {"codec": TopK(0.01), "n": N}),
    "sum_values": (lambda x: x, {}),
}


def test_every_kernel_that_takes_them_is_here() -> None:
    taking = {
        name
        for name, kernel in KERNELS.items()
        if any("Sequence" in str(p.annotation)
               for p in inspect.signature(kernel.function).parameters.values())
    }  # fmt: skip
    assert taking == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_array(name: str) -> None:
    pack, options = CASES[name]
    payloads = [pack(x) for x in VALUES]
    wanted = getattr(ops, name)(torch.stack(payloads), **options)
    for given in (payloads, tuple(payloads)):
        got = getattr(ops, name)(given, **options)
        np.testing.assert_array_equal(got.numpy(), wanted.numpy())
        by_name = {KERNELS[name].parameters[0]: given}
        np.testing.assert_array_equal(getattr(ops, name)(**by_name, **options), wanted)
    options = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = getattr(arrays, name)([x.numpy() for x in payloads], **options)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, wanted.numpy())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, r"payloads must be an array, or a sequence of at least one, got \[\]"),
        (
            [torch.zeros(4, dtype=torch.uint8), np.zeros(4, dtype=np.uint8)], TypeError,
            "payloads must have one library, got torch and, at 1, numpy",
        ),
        (
            (torch.zeros(4, dtype=torch.uint8), torch.zeros(4)), TypeError,
            "payloads must have one dtype, got torch.uint8 and, at 1, torch.float32",
        ),
        (
            [torch.zeros(4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)], ValueError,
            r"payloads must have one shape, got \[4\] and, at 1, \[8\]",
        ),
        (["a"], TypeError, r"payloads\[0\] must be a tensor or an array, got str"),
    ],
)  # fmt: skip
def test_wrong_sequences(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.majority_vote(given)


def test_compiled() -> None:
    payloads = [ops.pack_signs(x) for x in VALUES]
    compiled = torch.compile(lambda a, b, c: ops.majority_vote([a, b, c]), backend="eager")
    assert torch.equal(compiled(*payloads), ops.majority_vote(payloads))
