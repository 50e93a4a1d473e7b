"""The CUDA path of the hook without CUDA: its bits, its operations, and what it waits for."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import ranks_ddp
import ranks_stand_in as cases
import torch
from ranks import Worlds
from test_gpu_hooks import DTYPES

from pydist import QSGD, BlockInt, Sign, TopK

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(240), *emulated.MARKS]

EXTRAS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"algorithm": "two_phase"}, 700),
    ({"residual_dtype": torch.bfloat16}, None),
    ({"exact_skip": True, "algorithm": "all_gather"}, 700),
    ({"momentum": 0.9}, None),
    ({"op": "sum", "clip_norm": 5.0, "error_every": 2}, None),
    ({"momentum": 0.5, "clip_norm": 9.0, "exact_skip": True}, None),
    ({"error_feedback": "worker", "algorithm": "two_phase"}, None),
]


def every_codec(turn: int) -> list[tuple[Any, ...]]:
    """Every codec, each with other options, and with others in another turn."""
    found = []
    for i, codec in enumerate(ranks_ddp.CODECS):
        options, chunk = EXTRAS[(i + 3 * turn) % len(EXTRAS)]
        if codec in ("votes", "qsgd2", "qsgd4_l2", "ternary", "trits", "coded"):
            options = {k: v for k, v in options.items() if k != "error_feedback"}
        found.append((codec, DTYPES[(i + turn) % 3], options, chunk))
    return found


# Operations of a step of three buckets: with messages on the device, and over gloo. Four or five of
# them are the step's; with residuals a bucket has 17, and 3 more where parameters travel raw beside
# compressed ones. Nothing waits in the calling thread; over gloo each bucket's messages are waited
# for in a thread of pydist's own.
COUNTED: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    "Sign": (Sign(None), {}, 50, 33),
    "QSGD(4)": (QSGD(4), {}, 62, 39),
    "BlockInt(8)": (BlockInt(8), {}, 62, 39),
    "TopK": (TopK(0.01), {}, 56, 39),
    "momentum": (BlockInt(8), {"momentum": 0.9}, 136, 113),
    "clipping": (BlockInt(8), {"clip_norm": 1.0}, 145, 122),
}
BUCKETS = 3


@pytest.mark.parametrize("device_side", [True, False], ids=["nccl", "gloo"])
def test_equals_cpu(worlds: Worlds, device_side: bool) -> None:
    turn = int(device_side)
    results = worlds(2).run(cases.equals_cpu, device_side, every_codec(turn)[turn::5], timeout=200)
    assert all(result == results[0] for result in results), "ranks differ"


@pytest.mark.parametrize(
    "device_side", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["nccl", "gloo"]
)
def test_levels_equal_cpu(worlds: Worlds, device_side: bool) -> None:
    listed = [case for case in every_codec(int(device_side)) if case[0] in ("qsgd4", "mixed")]
    listed.append(("int8", "float32", {"momentum": 0.9}, None))
    results = worlds(4).run(cases.levels_equal_cpu, 2, device_side, listed, timeout=200)
    assert all(result == results[0] for result in results), "ranks differ"


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("device_side", [True, False], ids=["nccl", "gloo"])
@pytest.mark.parametrize("turn", range(len(EXTRAS)))
def test_everything_equals_cpu(worlds: Worlds, device_side: bool, turn: int) -> None:
    worlds(3).run(cases.equals_cpu, device_side, every_codec(turn), timeout=800)


@pytest.mark.parametrize("device_side", [True, False], ids=["nccl", "gloo"])
def test_operations_and_waits(worlds: Worlds, device_side: bool) -> None:
    asked = [
        (name, codec, options | {"algorithm": "two_phase"})
        for name, (codec, options, *_) in COUNTED.items()
    ]
    (found, _) = worlds(2).run(cases.counted, device_side, asked, timeout=200)
    for name, (buckets, operations, waits, lines) in found.items():
        # Momenta are new tensors in each step, and tables hold their addresses.
        tables = operations.pop("table", 0)
        assert tables <= (2 * BUCKETS if name == "momentum" else 0), name
        total = sum(operations.values())
        assert buckets == BUCKETS, name
        assert waits == ({} if device_side else {"worker": BUCKETS}), f"{name} waits: {lines}"
        assert total == COUNTED[name][2 if device_side else 3], f"{name}: {operations}"


@pytest.mark.parametrize("device_side", [True, False], ids=["nccl", "gloo"])
def test_collectives(worlds: Worlds, device_side: bool) -> None:
    names = [name for name, codec in ranks_ddp.CODECS.items() if not isinstance(codec, dict)]
    args = (device_side, names[int(device_side) :: 3], list(DTYPES))
    worlds(3).run(cases.collectives, *args, timeout=200)


@pytest.mark.parametrize(
    "device_side", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["nccl", "gloo"]
)
def test_collectives_on_levels(worlds: Worlds, device_side: bool) -> None:
    names = [name for name, codec in ranks_ddp.CODECS.items() if not isinstance(codec, dict)]
    args = (device_side, names[int(device_side) :: 6], list(DTYPES), 2)
    worlds(4).run(cases.collectives, *args, timeout=200)
