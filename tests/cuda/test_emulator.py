"""The emulator itself: its stand-ins against plain loops, and planted bugs that it must find."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import emulated
import numpy as np
import planting
import pytest
from guarded import guarded

pytestmark = list(emulated.MARKS)

N, WARPS = 256, 8  # what the launches of kernels/intrinsics.cu have: 4 blocks of 64
U32 = np.uint32


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = emulated.Emulator(emulated.FOLDER / "libpydist_emulator_tests.so")
    return library


@pytest.fixture(params=range(6))
def seed(request: pytest.FixtureRequest, kernels: Any) -> int:
    kernels.restart()
    kernels.configure(request.param)
    return request.param


def call(kernels: Any, function: str, *args: Any) -> str:
    """What a function of the test kernels answers; arrays are passed by address."""
    f = getattr(kernels.library, function)
    f.restype = ctypes.c_char_p
    return f(
        *[
            ctypes.c_void_p(a.__array_interface__["data"][0]) if isinstance(a, np.ndarray) else a
            for a in args
        ]
    ).decode()


def run(kernels: Any, kernel: str, x: Any, rows: int) -> Any:
    out = guarded(np.zeros((rows, N), dtype=U32), at_end=True)
    assert call(kernels, f"run_{kernel}", guarded(x, at_end=True), out, N) == "no error"
    return out


def values(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, N, dtype=U32)
    x[::5] = rng.integers(0, 8, x[::5].size)  # small ones, equal ones, 0
    x[64:96] = 3
    return x


def signed(x: int) -> int:
    return int(x) - 2**32 if x >= 2**31 else int(x)


# --------------------------------------------------------------------------- stand-ins


def test_warp_functions(kernels: Any, seed: int) -> None:
    x = values(seed)
    got = run(kernels, "lanes", x, 28)
    for i in range(N):
        lane, block = i % 32, i // 64
        warp = [int(v) for v in x[i - lane : i - lane + 32]]
        half = range(lane & 16, (lane & 16) + 16)
        ballot = sum((v & 1) << k for k, v in enumerate(warp))
        half_ballot = sum((warp[k] & 1) << k for k in half)
        section = lane & ~7

        def within(source: int, width: int) -> int:
            begin = lane & ~(width - 1)  # noqa: B023
            inside = begin <= source < begin + width
            return warp[source] if inside else warp[lane]  # noqa: B023

        tops = {v >> 3 for v in warp}
        pairs = warp[lane ^ 1] * 0x100000001 >> 32
        expected = [
            ballot, half_ballot, 3 in warp, 3 not in warp,
            warp[5], warp[section + 5],
            within(lane - 3, 32), within(lane - 3, 16),
            within(lane + 3, 32), within(lane + 3, 16),
            warp[lane ^ 9], warp[lane ^ 9], pairs & 0xFFFFFFFF, warp[lane ^ 1],
            sum(((v ^ warp[lane]) & 7 == 0) << k for k, v in enumerate(warp)),
            0xFFFFFFFF if len(tops) == 1 else 0, len(tops) == 1, 0xFFFFFFFF, 1,
            sum(warp) % 2**32, min(warp), max(warp),
            min(map(signed, warp)) % 2**32, max(map(signed, warp)) % 2**32,
            np.bitwise_and.reduce(warp), np.bitwise_or.reduce([warp[k] for k in half]),
            np.bitwise_xor.reduce(warp), 1,
        ]  # fmt: skip
        assert got[:, i].tolist() == [int(v) for v in expected], f"thread {i} of block {block}"


def test_bit_functions(kernels: Any) -> None:
    kernels.configure(0)
    x = values(1)
    got = run(kernels, "bits", x, 18)
    for i in range(N):
        a, b = int(x[i]), int(x[(i + 1) % N])
        wide, shift = b << 32 | a, b & 63
        bytes_of = wide.to_bytes(8, "little")

        def picked(k: int) -> int:
            choice = (a ^ b) >> 4 * k & 15  # noqa: B023
            byte = bytes_of[choice & 7]  # noqa: B023
            return (255 if byte & 128 else 0) if choice & 8 else byte

        def bytes_signed(v: int) -> list[int]:
            return [s - 256 if s > 127 else s for s in v.to_bytes(4, "little")]

        expected = [
            a.bit_count(), wide.bit_count(), 32 - a.bit_length(), 64 - wide.bit_length(),
            (a & -a).bit_length(), (wide & -wide).bit_length(),
            int(f"{a:032b}"[::-1], 2), int(f"{wide:064b}"[::-1], 2) % 2**32,
            (wide << (shift & 31)) >> 32, wide >> (shift & 31),
            a if shift >= 32 else (wide << shift) >> 32, b if shift >= 32 else wide >> shift,
            sum(picked(k) << 8 * k for k in range(4)),
            a * b >> 32, signed(a) * signed(b) >> 32, wide * (2**64 - 1 - wide) >> 64,
            sum(p * q for p, q in zip(bytes_signed(a), bytes_signed(b), strict=True)) + 7,
            sum(abs((a >> k & 255) - (b >> k & 255)) << k for k in range(0, 32, 8)),
        ]  # fmt: skip
        assert got[:, i].tolist() == [int(v) % 2**32 for v in expected], f"{a:#x}, {b:#x}"


def rounded_up(x: Any) -> Any:
    nearest = x.astype("f4")
    return np.where(nearest < x, np.nextafter(nearest, np.float32(np.inf)), nearest)


def test_float_functions(kernels: Any) -> None:
    kernels.configure(0)
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.standard_normal(N - 64), rng.uniform(-7e4, 7e4, 32),
                        rng.uniform(-1e-7, 1e-7, 16), rng.uniform(-5e9, 5e9, 11),
                        [0.0, -0.0, np.inf, 2.5, 65520.0]]).astype("f4")  # fmt: skip
    bits = x.view(U32)
    got = run(kernels, "floats", bits, 21)
    y = np.roll(x, -1)
    with np.errstate(all="ignore"):
        fused = (x.astype("f8") * y + x).astype("f4")  # of float32, rounded twice at worst
        whole = [np.clip(f(x.astype("f8")), -(2**31), 2**31 - 1).astype("i8").astype("i4")
                 for f in (np.rint, np.trunc, np.floor, np.ceil)]  # fmt: skip
        expected = [
            x + y, x - y, x * y, x / y, np.sqrt(abs(x)), fused, *whole,
            np.clip(np.rint(x.astype("f8")), 0, 2**32 - 1).astype("u8").astype("u4"),
            bits.view("i4").astype("f4"), bits.astype("f4"),
            np.where(x > 0, np.minimum(x, 1), np.float32(0)),
            bits.astype("u2").view("f2").astype("f4"),
            x.astype("f2").view("u2").astype("u4"),
            (bits.astype("u2").astype("u4") << 16).view("f4"),
            ((bits.astype("u8") + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u4"),
            np.full(N, 1.5, "f4"),
            rounded_up(abs(x.astype("f8")) * 65536 + 8388608),
            ((bits.astype("u8") + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u4") | 0x3F800000,
        ]  # fmt: skip
    for row, (actual, wanted) in enumerate(zip(got, expected, strict=True)):
        wanted = np.ascontiguousarray(wanted)
        if wanted.dtype == np.float32:
            nan = np.isnan(wanted)
            assert (np.isnan(actual.view("f4")) == nan).all(), f"row {row}"
            actual, wanted = actual.view("f4")[~nan], wanted[~nan]
            if row == 5:
                np.testing.assert_array_max_ulp(actual, wanted, 1)
                continue
        assert actual.tobytes() == wanted.tobytes(), f"row {row}"


def test_atomic_functions(kernels: Any, seed: int) -> None:
    x = values(seed)
    out = np.zeros(16, dtype=U32)
    out[4] = out[6] = out[7] = out[11] = 0xFFFFFFFF
    out[7] = 0x7FFFFFFF
    assert call(kernels, "run_atomics", x, out, N) == "no error"
    wide = int(x.astype("u8").sum())
    counted = 0
    for _ in range(N):
        counted = 0 if counted >= 6 else counted + 1
    expected = [
        wide % 2**32, wide >> 32, int(np.float32(N / 2).view(U32)),
        np.bitwise_or.reduce(x), np.bitwise_and.reduce(x), np.bitwise_xor.reduce(x), x.min(),
        min(map(signed, x)) % 2**32, max(0, *map(signed, x)), -wide % 2**32, counted, x.min(),
        wide % 2**32, x.max(), 77, 0,
    ]  # fmt: skip
    assert out.tolist() == [int(v) for v in expected]


def test_block_barriers_and_indices_of_three_dimensions(kernels: Any, seed: int) -> None:
    x = values(seed)
    got = run(kernels, "blocks", x, 5)
    for i in range(N):
        block, thread = divmod(i, 64)
        own = x[64 * block : 64 * block + 64]
        index = thread % 8 | thread // 8 % 4 << 8 | thread // 32 << 16
        expected = [(own & 1).sum(), 3 not in own, 3 in own, index, block % 2 | block // 2 << 16]
        assert got[:, i].tolist() == [int(v) for v in expected], f"thread {i}"


def test_decoupled_look_back(kernels: Any, seed: int) -> None:
    n = 1001
    x = values(seed)[np.arange(n) % N]
    out, state = np.zeros(n, dtype=U32), np.zeros(1 + 2 * 16, dtype=U32)
    assert call(kernels, "run_look_back", x, out, n, state) == "no error"
    assert (out == np.cumsum(x, dtype=U32)).all()


def test_launches_that_a_device_refuses(kernels: Any) -> None:
    for grid, block, shared, message in (
        (0, 32, 0, "invalid grid (0, 1, 1)"),
        (1, 1025, 0, "invalid block (1025, 1, 1)"),
        (1, 32, 49153, "49153 bytes of dynamic shared memory, but 49152 are allowed"),
    ):
        answer = call(kernels, "run_nothing", grid, block, ctypes.c_size_t(shared))
        assert message in answer
    assert call(kernels, "run_nothing", 1, 33, ctypes.c_size_t(49152)) == "no error"


def test_the_emulated_module_is_of_these_sources() -> None:
    assert not emulated.changed_since_built(), "run `make emulate`"


# --------------------------------------------------------------------------- planted bugs

Expected = Callable[[Any], Any]


def reversed_runs(length: int) -> Expected:
    return lambda x: x.reshape(-1, length)[:, ::-1].ravel()


def same(x: Any) -> Any:
    return x


def bins(x: Any) -> Any:
    return np.bincount(x & 7, minlength=8)


def ballots(x: Any) -> Any:
    words = ((x & 1).reshape(-1, 32).astype("u8") << np.arange(32, dtype="u8")).sum(axis=1)
    return words.repeat(32)


def sums(x: Any) -> Any:
    return x.reshape(-1, 32).sum(axis=1, dtype=U32).repeat(32)


# The kernel, what it computes without the bug, and what the emulator says with it. `None`: the
# result differs from what it should be.
PLANTED: list[tuple[str, Expected, str | None]] = [
    ("missing_syncthreads", reversed_runs(128), r"data race: .*static shared memory.*no barrier"),
    ("missing_syncwarp", reversed_runs(32), r"data race: .*static shared memory.*no barrier"),
    ("shuffle_is_no_barrier", reversed_runs(32), r"data race: .*static shared memory.*no barrier"),
    ("tail_read", same, r"out-of-range read at 0x.*thread \(\d+, 0, 0\).*planted\.cu"),
    ("tail_write", same, r"out-of-range write at 0x.*thread \(\d+, 0, 0\).*planted\.cu"),
    ("wrong_lane", sums, None),
    ("lane_outside_mask", lambda x: x.reshape(-1, 16)[:, 15].repeat(16), None),
    ("uninitialised_shared", bins, None),
    ("uninitialised_dynamic_shared", bins, None),
    ("missing_atomic", bins, r"data race: a (read|write) of 4 bytes"),
    ("skipped_barrier", same, r"deadlock in block .* of 128 threads: thread 17 returned; threads "
     r"0-16, 18-127 stopped at __syncthreads \(planted\.cu:\d+\)"),
    ("divergent_barrier", same, r"barrier in divergent control flow: thread .* is at __syncthreads "
     r"\(planted\.cu:\d+\), thread .* at __syncthreads \(planted\.cu:\d+\)"),
    ("wrong_mask", ballots, r"__ballot_sync \(planted\.cu:\d+, mask 0x0000ffff\) lacks the bit of"),
    ("missing_lanes", ballots, r"lanes diverge: __\w+ \(planted\.cu:\d+, mask 0xffffffff\) of"),
    ("shared_index", same, r"index 128 out of bounds of array 'unsigned int \[128\]' \(planted"),
    ("beyond_dynamic_shared", same, r"out-of-range write .*outside dynamic shared memory"),
    ("before_dynamic_shared", same, r"out-of-range write .*outside dynamic shared memory"),
    ("misaligned", same,
     r"misaligned access to '.*uint2' at 0x\w+, which is not a multiple of 8 \(planted\.cu"),
    ("missing_fence", lambda x: x[::128], r"data race: .* which thread 0 of block \d+ wrote"),
    ("waits_for_later_block", same, r"livelock: threads spin"),
]  # fmt: skip
SEEDS = range(8)


def run_planted(kernels: Any, kernel: str, bug: bool, seed: int, **options: Any) -> Any:
    """What the emulator says, and whether the result is right."""
    n = 600 if kernel.startswith("tail") else 640
    expected = next(f for name, f, _ in PLANTED if name == kernel)
    x = np.random.default_rng(3).integers(0, 2**32, n, dtype=U32)
    wanted = np.asarray(expected(x)).astype(U32)
    spare = 0 if kernel == "tail_write" else 64  # for counters and flags behind the result
    out = guarded(np.zeros(n + spare, dtype=U32), at_end=True)
    kernels.configure(seed, **options)
    x = guarded(x, at_end=True)
    message = call(kernels, "planted", kernel.encode(), int(bug), x, out, n)
    return message, bool((out[: wanted.size] == wanted).all())


@pytest.mark.parametrize("kernel", [name for name, _, _ in PLANTED])
def test_without_its_bug_a_kernel_passes(kernels: Any, kernel: str) -> None:
    for seed in SEEDS:
        assert run_planted(kernels, kernel, False, seed) == ("no error", True), f"seed {seed}"


@pytest.mark.parametrize(("kernel", "message"), [(name, said) for name, _, said in PLANTED])
def test_a_planted_bug_is_found(kernels: Any, kernel: str, message: str | None) -> None:
    seeds = (0, 3) if kernel == "waits_for_later_block" else SEEDS  # a livelock takes its time
    found = [run_planted(kernels, kernel, True, seed) for seed in seeds]
    if message is None:
        assert ("no error", False) in found
        return
    # The forbidden page of dynamic shared memory is on one side of it in one launch.
    enough = any if "dynamic_shared" in kernel else all
    assert enough(re.search(message, said) for said, _ in found), found


@pytest.mark.parametrize("kernel", ["missing_syncthreads", "missing_syncwarp", "missing_atomic"])
def test_the_order_alone_shows_a_missing_barrier(kernels: Any, kernel: str) -> None:
    """Even where the race itself is not looked for, some order gives a wrong result."""
    found = [run_planted(kernels, kernel, True, seed, races=False) for seed in SEEDS]
    assert ("no error", False) in found


def test_a_restart_repeats_the_order(kernels: Any) -> None:
    x = guarded(np.arange(640, dtype=U32), at_end=True)

    def noise(seed: int) -> bytes:
        out = np.zeros(640, dtype=U32)
        kernels.configure(seed)
        call(kernels, "planted", b"uninitialised_shared", 1, x, out, 640)
        return out.tobytes()

    kernels.restart()
    first = [noise(seed) for seed in (0, 1, 1)]
    kernels.restart()
    assert [noise(seed) for seed in (0, 1, 1)] == first
    assert len(set(first)) == 3


def test_after_a_failure_the_next_launch_runs(kernels: Any) -> None:
    for kernel in ("skipped_barrier", "tail_write", "missing_lanes"):
        assert run_planted(kernels, kernel, True, 1)[0] != "no error"
        assert run_planted(kernels, kernel, False, 1) == ("no error", True)


# --------------------------------------------------------------------------- bugs in pydist's own


@pytest.mark.parametrize("bug", planting.BUGS, ids=lambda bug: bug.name)
def test_a_bug_in_a_kernel_of_pydist_is_found(bug: planting.Bug) -> None:
    said = planting.run_with(bug)
    assert re.search(bug.found, said), said
