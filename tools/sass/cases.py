"""The kernels that are counted: the benchmark's own cases, run on the machine code.

What a case writes is compared, byte by byte, with what the CPU kernels write, which are equal to
the reference in every bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from pydist.bench import options
from pydist.bench.case import Case, Maker
from pydist.bench.cases import cases
from pydist.bench.timing import copy_of
from pydist.kernels import torch_tensors
from pydist.kernels.launch import LaunchTarget
from sass.counts import per_element
from sass.host import Done, Executor

Row = dict[str, Any]

DTYPES = ("float32", "bfloat16")
LENGTH = 20480  # elements: a multiple of every kernel's tile that gives each warp of a block one
LENGTHS = {
    "topk": 65536,  # a block, whatever it is given
    "elias_encode": 8192,  # hundreds of instructions for an element
    "elias_decode": 32 * 512,  # a thread decodes a block: a warp, and then two
    "ternary_scale": 1 << 19,  # a batch of the partial sums that its last launch reads
    "count_votes": 1 << 17,
    "majority_vote": 1 << 17,
}
KERNELS = [kernel for family in options.FAMILIES.values() for kernel in family]


class DifferentBytes(AssertionError):
    """The machine code has written something else than the CPU kernels."""


def length_of(kernel: str) -> int:
    """Elements on which a kernel is counted, and twice as many."""
    return next((n for name, n in LENGTHS.items() if kernel.startswith(name)), LENGTH)


def all_cases(length: int | None = None, kernels: list[str] | None = None) -> Iterator[Case]:
    """The cases of these kernels, on a length or on each kernel's own."""
    for kernel in kernels or KERNELS:
        yield from cases(Maker(length or length_of(kernel), "cpu", DTYPES), [kernel])


# --------------------------------------------------------------------------- execution


@contextlib.contextmanager
def on_machine_code(executor: Executor) -> Iterator[None]:
    """Within it, kernels on CPU tensors run as they would on a card; tensors are the memory."""
    executor.buffers.clear()
    executor.done.clear()
    kept: list[torch.Tensor] = []  # until the kernels have run
    described = torch_tensors.Torch.info

    def info(self: Any, name: str, x: torch.Tensor, *, written: bool = False) -> Any:
        executor.buffers.append((x.data_ptr(), x.nbytes))
        return described(self, name, x, written=written)

    def scratch(size: int) -> tuple[int, torch.Tensor]:
        room = torch.full((size,), 0xA5, dtype=torch.uint8)
        kept.append(room)
        executor.buffers.append((room.data_ptr(), size))
        return room.data_ptr(), room

    def target(self: Any, x: torch.Tensor, threads: int | None) -> LaunchTarget:
        return LaunchTarget(stream=0, scratch=scratch, module=executor.module)

    with (
        mock.patch.object(torch_tensors.Torch, "info", info),
        mock.patch.object(torch_tensors.Torch, "target", target),
        executor.raising(),
    ):
        yield


def run(executor: Executor, case: Case) -> list[Done]:
    """Runs a case on the machine code.

    Raises:
        DifferentBytes: It has written other bytes than the CPU kernels.
    """
    torch.manual_seed(0)
    mine = case.make()
    others = copy_of(mine)
    with on_machine_code(executor):
        result = case.run(mine)
        done = list(executor.done)
    expected = case.run(others)
    pairs = [(name, getattr(mine, name), getattr(others, name)) for name in vars(mine)]
    pairs += [("result", *both) for both in zip(_flat(result), _flat(expected), strict=True)]
    for name, here, there in pairs:
        _compare(f"{case.name}, {case.dtype}, {case.numel} elements: {name}", here, there)
    return done


def _flat(result: Any) -> list[Any]:
    if isinstance(result, (tuple, list)):
        return list(result)
    return [] if result is None else [result]


def _compare(what: str, here: Any, there: Any) -> None:
    if not isinstance(here, torch.Tensor):
        if here != there:
            raise DifferentBytes(f"{what} is {here}, not {there}")
        return
    a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (here, there))
    if not torch.equal(a, b):
        at = int((a != b).nonzero()[0])
        raise DifferentBytes(f"{what}: byte {at} is {int(a[at])}, not {int(b[at])}")


# --------------------------------------------------------------------------- counting


def count(executor: Executor, once: Case, twice: Case) -> Row:
    """A row of the table: a case on a length and on twice that."""
    first = run(executor, once)
    executor.grids = [done.launch.grid for done in first]
    second = run(executor, twice)
    launches = [
        per_element(a, b, once.numel) for a, b in zip(first, second, strict=True)
    ]  # fmt: skip
    return {
        "kernel": once.kernel,
        "variant": once.variant,
        "dtype": once.dtype,
        "least": round(twice.bytes / twice.numel, 4),
        "instructions": round(sum(launch["pipes"]["issue"] for launch in launches), 2),
        "registers": max(launch["registers"] for launch in launches),
        "moved": round(sum(launch["moved"] for launch in launches), 3),
        "launches": launches,
    }


def rows(executor: Executor, kernels: list[str] | None = None) -> Iterator[Row]:
    """All of them."""
    for kernel in kernels or KERNELS:
        length = length_of(kernel)
        singles = all_cases(length, [kernel])
        doubles = all_cases(2 * length, [kernel])
        for once, twice in zip(singles, doubles, strict=True):
            yield count(executor, once, twice)
