"""Every CUDA kernel × dtype at odd lengths, against the reference; exits 1 on a difference.

Short, and with few kernels of anybody else's, because it is made to run under compute-sanitizer.
``--only topk elias`` runs some families: those two use shared memory and barriers, which racecheck
and synccheck are for. ``--device cpu`` does the same with the CPU's kernels, which shows that this
file works.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

# Each array gets an allocation of its own, so that the sanitizer sees where it ends.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

from pydist import _C, selfcheck
from pydist.formats import wire
from pydist.formats.topk import TopKFormat
from pydist.kernels import environment
from pydist.kernels.lion import LionOptions
from pydist.selfcheck import HostMemory, KernelRunner, backends, cases
from pydist.selfcheck import blocks as block_cases
from pydist.selfcheck import elias as elias_cases
from pydist.selfcheck import raw as raw_cases
from pydist.selfcheck import ternary as ternary_cases
from pydist.selfcheck import topk as topk_cases

LENGTHS = (33, 5003)  # one word and one element; chunks of 1,024 and 4,096, whole and cut off
STORAGES = ("float32", "float16", "bfloat16")
TOPK_OF_HOOKS = TopKFormat(0.001, 65536, "float32")


def runner() -> KernelRunner | None:
    """Arrays of CuPy, which starts quickly, or else of torch."""
    if not environment.cuda_devices():
        return None
    try:
        import cupy

        cupy.cuda.set_allocator(None)
        return KernelRunner(backends.CuPyMemory(0))
    except Exception as error:  # one that is there may still not fit this CUDA or NumPy
        print(f"kernel_pass: without CuPy: {type(error).__name__}: {error}", file=sys.stderr)
    if environment.torch_sees_cuda():
        return KernelRunner(backends.TorchMemory(0))
    return None


def driver() -> str:
    """What the driver says, which a sanitizer may keep from starting."""
    try:
        code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return "no driver"
    return f"cuInit: error {code}" if code else "a driver"


def launch_votes(run: KernelRunner) -> int:
    """Kernels of signs, votes and Lion. Raises DifferenceError; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    for n in LENGTHS:
        table = wire.segments([n // 3, n - n // 3], ordinals=[3, 1])
        for ranks in (2, 8, 300):
            payloads = cases.some_payloads(rng, ranks, n)
            selfcheck.check_count_votes(run, payloads)
            for ties in cases.TIES:
                selfcheck.check_majority_vote(run, payloads, ties=ties, seed=1, step=3, n=n)
            calls += 4
        for storage in STORAGES:
            x = cases.some_bits(rng, n, storage)
            selfcheck.check_pack_signs(run, x)
            selfcheck.check_pack_signs(run, x, segments=table)
            for ranks in (None, 8, 300):
                planes = cases.some_payloads(rng, wire.planes_for(ranks) if ranks else 2, n)
                selfcheck.check_unpack_votes(run, planes, n, ranks=ranks, storage=storage)
                selfcheck.check_lion_apply(run, x, planes, lr=0.1, weight_decay=0.1, ranks=ranks)
            calls += 8
            for momentum in ("float32", "bfloat16"):
                kept = cases.some_bits(rng, n, momentum)
                for spread in (None, 1.0):
                    options = LionOptions(0.9, 0.99, binarization_range=spread, seed=3, step=4)
                    selfcheck.check_lion_pack(run, x, kept, options)
                    calls += 1
    return calls


def launch_blocks(run: KernelRunner) -> int:
    """Kernels of block formats. Raises DifferenceError likewise; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    for n in LENGTHS:
        for i, form in enumerate(block_cases.FORMATS):
            options = block_cases.some_options(rng)
            table = block_cases.some_segments(rng, n, form)
            for storage in STORAGES:
                x = block_cases.some_bits(rng, n, form, storage)
                block_cases.check_quantize(run, x, form, options, table)
            residual = block_cases.some_bits(
                rng, n, form, ("float32", "bfloat16")[i % 2], finite=True
            )
            block_cases.check_quantize_feedback(run, x, residual, form, options, None)
            payloads = block_cases.some_payloads(rng, 3, n, form)
            storage = STORAGES[i % 3]
            block_cases.check_sum(run, payloads, n, form, mean=True, storage=storage)
            block_cases.check_reduce(run, payloads, n, form, options)
            calls += 6
    return calls


def launch_elias(run: KernelRunner) -> int:
    """Elias codes, malformed ones too. Raises DifferenceError likewise; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    for make in (elias_cases.elias_cases, elias_cases.malformed_cases):
        for case in make(run, rng):
            case()
            calls += 1
    return calls


def launch_ternary(run: KernelRunner) -> int:
    """Ternary kernels. Raises DifferenceError likewise; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    for n in LENGTHS:
        table = ternary_cases.some_segments(rng, n)
        for storage in STORAGES:
            x = ternary_cases.some_bits(rng, n, storage)
            for clip in (2.5, None):
                ternary_cases.check_scale(run, x, clip, table)
            own, shared = (ternary_cases.some_scalers(rng, len(table)) for _ in range(2))
            options = block_cases.some_options(rng)
            ternary_cases.check_pack(run, x, own, shared, options, table)
            payloads = ternary_cases.some_payloads(rng, 3, n, table)
            ternary_cases.check_sum(run, payloads, n, table)
            ternary_cases.check_unpack(
                run, payloads, shared, n, mean=True, storage=storage, segments=table
            )
            calls += 6
    return calls


def launch_raw(run: KernelRunner) -> int:
    """The kernel of plain values. Raises DifferenceError likewise; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    for n in LENGTHS:
        for source in STORAGES:
            for storage in STORAGES:
                values = raw_cases.some_rows(rng, 3, n, source, special=True)
                raw_cases.check_sum_values(run, values, mean=True, storage=storage)
                calls += 1
    return calls


def launch_topk(run: KernelRunner) -> int:
    """Top-k kernels. Raises DifferenceError likewise; returns how many calls."""
    rng = np.random.default_rng(0)
    calls = 0
    lengths = [(n, topk_cases.FORMATS) for n in LENGTHS]
    for n, forms in [*lengths, (70_001, [TOPK_OF_HOOKS])]:
        for i, form in enumerate(forms):
            order = topk_cases.some_order(rng)
            table = topk_cases.some_segments(rng, n, form)
            storage = STORAGES[i % 3]
            x = topk_cases.some_bits(rng, n, form, storage)
            topk_cases.check_select(run, x, form, order, table if i % 2 else None)
            kept = ("float32", "bfloat16")[i % 2]
            residual = topk_cases.some_bits(rng, n, form, kept, finite=True)
            topk_cases.check_feedback(run, x, residual, form, order)
            payloads = topk_cases.some_payloads(rng, 3, n, form)
            topk_cases.check_scatter(run, payloads, n, form, mean=True, storage=storage)
            topk_cases.check_reduce(run, payloads, n, form, order)
            calls += 6 if storage == "float32" else 5
    return calls


FAMILIES: dict[str, Callable[[KernelRunner], int]] = {
    "votes": launch_votes,
    "blocks": launch_blocks,
    "elias": launch_elias,
    "ternary": launch_ternary,
    "topk": launch_topk,
    "raw": launch_raw,
}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Every kernel once, against the reference.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args(arguments)
    on_host = options.device == "cpu"
    run = KernelRunner(HostMemory(_C.current_isa())) if on_host else runner()
    if run is None:
        lacks = "no CUDA device, or neither CuPy nor torch with CUDA"
        print(f"kernel_pass: {lacks} ({driver()})", file=sys.stderr)
        return 2
    try:
        calls = sum(FAMILIES[family](run) for family in options.only)
    except selfcheck.DifferenceError as error:
        print(f"kernel_pass: {error}", file=sys.stderr)
        return 1
    print(f"{run.name}: {calls} calls of kernels, all equal to the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
