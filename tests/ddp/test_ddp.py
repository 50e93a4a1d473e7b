"""The DDP hook over real ranks: bit-identical to the specification, in all of DDP's modes."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_ddp as cases
import torch
from ranks import Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

DTYPES = ["float32", "float16", "bfloat16"]
# What else may be asked for; each meets every mode and codec sooner or later.
EXTRAS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"algorithm": "two_phase"}, 700),
    ({"algorithm": "all_gather"}, 700),
    ({"residual_dtype": torch.bfloat16}, None),
    ({"op": "sum", "algorithm": "two_phase"}, None),
    ({"exact_skip": True}, None),
    ({"error_feedback": "worker"}, None),
    ({"error_feedback": False}, 300),
    ({"algorithm": "two_phase"}, None),
]


def cases_of(ranks: int) -> list[tuple[Any, ...]]:
    """Every codec, in another mode, with another dtype and another extra in every world."""
    result = []
    for i, codec in enumerate(cases.CODECS):
        mode = list(cases.MODES)[(i + 2 * ranks) % len(cases.MODES)]
        extra, chunk = EXTRAS[(2 * i + ranks) % len(EXTRAS)]
        if codec in ("votes", "qsgd2", "qsgd4_l2", "ternary", "trits", "coded"):
            extra = {k: v for k, v in extra.items() if k != "error_feedback"}
        result.append((codec, DTYPES[(i + ranks) % 3], mode, extra, chunk))
    return result


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_conforms(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.conforms, cases_of(ranks), timeout=120))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_conforms_everywhere(worlds: Worlds, ranks: int, mode: str) -> None:
    product = [
        (codec, dtype, mode, {"algorithm": algorithm}, chunk)
        for codec in cases.CODECS
        for dtype in DTYPES
        for algorithm, chunk in (("two_phase", 700), ("all_gather", None))
    ]
    same_on_all_ranks(worlds(ranks).run(cases.conforms, product, timeout=900))
