"""DDP's and FSDP's hooks on a CUDA device, all ranks on device 0: the bits of those on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_ddp
import ranks_gpu_hooks as cases
import torch
from devices import with_messages
from ranks import Worlds

from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK

# The first call of a rank loads torch's CUDA libraries, several ranks at once.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(240)]
SLOW_START = 200
DTYPES = ("float32", "bfloat16", "float16")
EXTRAS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"algorithm": "two_phase"}, 700),
    ({"residual_dtype": torch.bfloat16}, None),
    ({"exact_skip": True, "algorithm": "all_gather"}, 700),
    ({"momentum": 0.9}, None),
    ({"op": "sum", "clip_norm": 5.0}, None),
    ({"momentum": 0.5, "clip_norm": 9.0, "exact_skip": True}, None),
]


def every_codec(turn: int) -> list[tuple[Any, ...]]:
    """Every codec, each with other options, and with others in another turn."""
    return [
        (codec, DTYPES[(i + turn) % 3], *EXTRAS[(i + 3 * turn) % len(EXTRAS)])
        for i, codec in enumerate(ranks_ddp.CODECS)
    ]


@with_messages
def test_ddp(worlds: Worlds, device: str, on_device: bool) -> None:
    for ranks, turn in ((2, 0),) if device == "cpu" else ((2, 0), (3, 1)):
        args = (device, on_device, every_codec(turn))
        results = worlds(ranks).run(cases.ddp_equals_cpu, *args, timeout=SLOW_START)
        assert all(result == results[0] for result in results), "ranks differ"


FSDP = [
    (QSGD(4, block=64), BlockInt(8, block=96), False),
    (Sign("l1", block=64), BlockFloat(block=32), True),
    (TopK(0.1, block=96), QSGD(8, block=64), True),
    (QSGD(4, block=64, entropy="elias"), BlockInt(5, block=64), False),
    (Ternary(), BlockInt(4, block=32, rounding="stochastic"), False),
    (Raw("bfloat16"), Raw("float16"), False),
]


@with_messages
def test_fsdp(worlds: Worlds, device: str, on_device: bool) -> None:
    for ranks in (2,) if device == "cpu" else (2, 3):
        worlds(ranks).run(cases.fsdp_equals_cpu, device, on_device, FSDP, timeout=SLOW_START)
