"""The report of `make ptxas` on lines that ptxas printed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import ptxas

# CUDA 13.0: a kernel, one that spills, and one with a stack frame that calls a function.
HASH = "40_GLOBAL__N__f83f06a5_8_spill_cu_302841e1"
GOOD = f"_ZN6pydist4cuda{HASH}17pack_signs_kernelINS_4HalfELb1EEEvNS0_4RowsEPhPj"
SPILLS = f"_ZN6pydist4cuda{HASH}15spilling_kernelILNS1_4VoteE1ENS_6BFloatEEEvPfi"
STACK = f"_ZN6pydist4cuda{HASH}12stack_kernelIfEEvPfi"
CALLED = "_ZN38_INTERNAL_f83f06a5_8_spill_cu_302841e16pydist4cuda6calledEfi"
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{GOOD}' for 'sm_90'
ptxas info    : Function properties for {GOOD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compile time = 32.405 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{STACK}' for 'sm_80'
ptxas info    : Function properties for {STACK}
    128 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 128 bytes cumulative stack size, \
364 bytes cmem[0]
ptxas info    : Compile time = 4.250 ms
ptxas info    : Function properties for {CALLED}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '{SPILLS}' for 'sm_80'
ptxas info    : Function properties for {SPILLS}
    280 bytes stack frame, 476 bytes spill stores, 484 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 280 bytes cumulative stack size, \
400 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 63.653 ms
"""


def test_every_function_of_a_report() -> None:
    assert ptxas.parse(REPORT) == [
        ptxas.Usage(GOOD, 90, registers=32),
        ptxas.Usage(STACK, 80, registers=28, stack=128),
        ptxas.Usage(CALLED, 80),
        ptxas.Usage(
            SPILLS, 80, registers=32, stack=280, spill_stores=476, spill_loads=484, shared=400
        ),
    ]


def test_a_spill_fails_and_is_named() -> None:
    status, text = ptxas.verdict(ptxas.parse(REPORT))
    assert status == 1
    assert text.splitlines() == [
        f"FAILED {STACK} on sm_80: 128 bytes stack frame, 0 bytes spill stores, "
        "0 bytes spill loads",
        f"FAILED {SPILLS} on sm_80: 280 bytes stack frame, 476 bytes spill stores, "
        "484 bytes spill loads",
    ]


def test_no_spill_passes_and_no_kernel_fails() -> None:
    status, text = ptxas.verdict(ptxas.parse(REPORT)[:1])
    assert status == 0
    assert "1 kernels on 1 architectures: at most 32 registers" in text
    assert ptxas.verdict([])[0] == 1


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_names_are_short() -> None:
    names = {usage.name for usage in ptxas.readable(ptxas.parse(REPORT))}
    assert {"pack_signs<f16, true>", "spilling<zero_is_plus, bf16>", "stack<f32>"} < names


def test_values_of_enums() -> None:
    source = "enum class Kind : int { kOne = 0,  // k2\n kTwoThree, };\nenum class Way { kUp };"
    known = ptxas.enums([source])
    assert known == {"Kind": ["one", "two_three"], "Way": ["up"]}
    assert ptxas.shorten("void pydist::f_kernel<(pydist::Kind)1, 16>(int*)", known) == (
        "f<two_three, 16>"
    )
    assert ptxas.shorten("void f_kernel<(Kind)7>(int)", known) == "f<Kind 7>"


@pytest.mark.parametrize(
    ("registers", "shared", "arch", "blocks"),
    [
        (32, 0, 90, 8),  # 64 warps
        (33, 0, 90, 6),  # 1,280 registers a warp
        (126, 0, 80, 2),
        (255, 0, 100, 1),
        (32, 0, 75, 4),  # 32 warps
        (32, 50 * 1024, 80, 3),
        (32, 0, 999, None),
    ],
)
def test_blocks_that_fit(registers: int, shared: int, arch: int, blocks: int | None) -> None:
    usage = ptxas.Usage("f", arch, registers=registers, shared=shared)
    assert usage.blocks_per_sm(256) == blocks


@pytest.mark.parametrize(("arch", "blocks"), [(75, 16), (80, 32), (86, 16), (89, 24), (120, 24)])
def test_small_blocks_are_limited_in_number(arch: int, blocks: int) -> None:
    assert ptxas.Usage("f", arch, registers=16).blocks_per_sm(32) == blocks
