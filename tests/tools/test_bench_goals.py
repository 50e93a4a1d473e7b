"""What the kernels are held against: shares of a copy, and the model that says which."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from pydist.bench import options, timing
from pydist.bench.case import Maker
from pydist.bench.cases import cases

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="not a source tree")
H100 = {"cuda_device": "H100", "cuda_multiprocessors": 132, "cuda_clock_hz": 1.98e9}
BIG = 64 << 20


@pytest.fixture(scope="module")
def goals() -> Any:
    names = ("kernel_model", "kernel_goals")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("kernel_goals")
        for name in names:
            del sys.modules[name]


@pytest.fixture
def model(goals: Any) -> Any:
    return sys.modules["kernel_model"]


def row(seconds: float, numel: int = BIG, bytes_: float = 1e9, **other: Any) -> dict[str, Any]:
    """A row of a device that copies 3 TB/s."""
    found = {"bytes": bytes_, "samples": [seconds] * 3, "seconds": timing.spread([seconds] * 3)}
    copy = {"bytes": 3e12, "samples": [1.0] * 3, "seconds": timing.spread([1.0])}
    share = timing.ratio(found, copy)
    return {
        "kernel": "pack_signs", "variant": "", "dtype": "float32", "numel": numel, "threads": 0,
        **found, "copy": copy, "of_copy": share, "of_read": share, **other,
    }  # fmt: skip


def test_goals_on_cuda(goals: Any) -> None:
    copied = 1e9 / 3e12
    fast, slow = goals.verdicts([row(copied / 0.92), row(copied / 0.88)], H100)
    assert (fast["met"], slow["met"]) == ("yes", "no")
    assert fast["ratio"] == pytest.approx(0.92) and fast["model"] == pytest.approx(0.97)
    assert fast["least"] == pytest.approx(0.902, abs=1e-3)
    small = [row(4e-6, 1 << 16, 3e5), row(6e-6, 1 << 16, 3e5)]
    assert [verdict["met"] for verdict in goals.verdicts(small, H100)] == ["yes", "no"]
    assert goals.verdicts([row(1.0, 1 << 20, 1e8)], H100) == []  # neither small nor large
    codes = row(1.0, kernel="elias_encode", variant="QSGD(4), blocks of 512", dtype="bits")
    assert goals.verdicts([codes], H100) == []


def test_every_kernel_has_a_model_or_says_why_not(model: Any) -> None:
    made = list(cases(Maker(1 << 20, "cpu", options.DTYPES), options.KERNELS))
    without = {
        case.kernel
        for case in made
        if model.counted({"kernel": case.kernel, "variant": case.variant, "dtype": case.dtype})
        is None
    }
    assert without == set(model.NO_SHARE)


MODELLED = [
    (kernel, f"BlockInt({bits}), blocks of {block}", dtype, 0.9)
    for kernel in ("quantize", "dequantize")
    for bits in (4, 8)
    for block in (128, 512)
    for dtype in ("float32", "bfloat16")
] + [
    ("ternary_sum", "8 payloads", "bits", 0.7),
]


@pytest.mark.parametrize("goal", MODELLED, ids=lambda goal: ", ".join(goal[:3]))
def test_what_the_machine_code_should_reach(model: Any, goal: Any) -> None:
    """Shares of a copy on an H100, by the counts that are committed."""
    *row, least = goal
    counts = model.table()[tuple(row)]
    assert model.share(counts, model.COPIES["h100"]) >= least


# Kernel, least bytes for an element; TB/s that its busiest pipe allows, bytes moved in times the
# least, KB in flight per SM and the share that is read, as a review counted them by hand; what it
# expected on an H100 (3.0) and an H200 (4.3 TB/s), which the formula meets within 15 points.
REVIEWED = [
    ("pack_signs", 4.125, 11.5, 1, None, 1, 97, 97),
    ("unpack_signs, bfloat16", 2.125, 2.96, 1, None, 1, 74, 52),
    ("quantize BlockInt(4)", 4.51, 3.27, 1, None, 1, 82, 57),
    ("quantize BlockInt(3)", 4.41, 1.32, 1, None, 1, 33, 23),
    ("dequantize BlockInt(4), bfloat16", 2.51, 1.7, 1, None, 1, 42, 29),
    ("quantize_feedback_ BlockInt(4)", 12.5, 9.0, 1, 10, 0.68, 80, 65),
    ("quantize_feedback_ BlockInt(8)", 13.0, 4.5, 1, 6.4, 0.62, 65, 50),
    ("reduce_quantized of 8", 4.57, 0.45, 1, None, 1, 11, 8),
    ("ternary_sum", 2.23, 0.48, 1, None, 1, 12, 8),
    ("topk_select", 4.005, 2.2, 4, None, 1, 20, 17),
    ("sum_values", 12.0, 25.0, 1, 6.9, 2 / 3, 65, 47),
    ("sum_values, bfloat16", 6.0, 12.0, 1, 10, 2 / 3, 90, 65),
]


def launch(model: Any, least: float, pipe: float, moved: float = 1, **other: Any) -> dict[str, Any]:
    """Counts of a launch whose ALU allows ``pipe`` TB/s."""
    clocks = least * model.SMS * model.HERTZ / (1e12 * pipe)
    return {
        "pipes": {"alu": clocks * model.WARP * model.RATES["alu"]}, "moved": least * moved,
        "waits": 0.0, "warps": 1, "waves": 100.0, "serial": False, **other,
    }  # fmt: skip


@pytest.mark.parametrize("reviewed", REVIEWED, ids=lambda r: r[0])
def test_the_formula_gives_the_numbers_of_the_review(model: Any, reviewed: Any) -> None:
    _, least, pipe, moved, flight, read, *expected = reviewed
    waits = least * read / (1e3 * flight) if flight else 0.0
    counts = {"least": least, "launches": [launch(model, least, pipe, moved, waits=waits)]}
    for copy, percent in zip((3.0e12, 4.3e12), expected, strict=True):
        assert 100 * model.share(counts, copy) == pytest.approx(percent, abs=15)


def test_a_part_that_runs_alone_and_a_last_wave(model: Any) -> None:
    """A scale that one warp ends; blocks that fill 2.6 waves of a card."""
    alone = launch(model, 4.0, 15.0, serial=True, waits=180e-6 / BIG / model.LATENCY)
    counts = {"least": 4.0, "launches": [launch(model, 4.0, 15.0, 2.0), alone]}
    assert 100 * model.share(counts, 3.0e12) == pytest.approx(25, abs=15)
    assert 100 * model.share(counts, 4.3e12) == pytest.approx(20, abs=15)
    counts = {"least": 4.005, "launches": [launch(model, 4.005, 30.0, waves=2.6)]}
    assert 100 * model.share(counts, 3.0e12) == pytest.approx(78, abs=15)


def test_the_model_follows_the_card(model: Any) -> None:
    bound = {"kernel": "quantize", "variant": "QSGD(4), blocks of 512", "dtype": "bfloat16"}
    found = row(1.0, bytes_=(2.5 + 4 / 512) * BIG, **bound)  # by instructions, not by bytes
    half = {"cuda_multiprocessors": 66, "cuda_clock_hz": 1.98e9}
    whole = model.share_of_copy(found, H100)
    assert model.share_of_copy(found, half) == pytest.approx(whole / 2)
    assert model.share_of_copy(found, {}) == whole, "an unknown card counts as the model's own"
    twice = row(1.0, 2 * BIG, 8 * BIG, kernel="ternary_scale")
    once = row(1.0, BIG, 4 * BIG, kernel="ternary_scale")
    assert model.share_of_copy(twice, H100) == pytest.approx(model.share_of_copy(once, H100))
