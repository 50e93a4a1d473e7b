"""From checked arguments to the compiled module: where kernels run, and the rows they read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pydist import _C
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels.checks import ArrayInfo, check_step, check_step_at

assert _C.WIRE_VERSION == wire.WIRE_VERSION, "pydist._C was built from other sources: reinstall"

OneRow = tuple[int, int, int, int, int, int, int, int, int]
"""A table of a single row, without a table in memory; columns as in :mod:`pydist.formats.wire`."""


@dataclass(frozen=True)
class DeviceRows:
    """A table of rows that a kernel has written in device memory.

    Attributes:
        address: Of the table.
        count: Rows.
        work: Units of work of all of them.
        owner: Keeps the memory.
    """

    address: int
    count: int
    work: int
    owner: object

    def __len__(self) -> int:
        return self.count


Rows = IntArray | OneRow | DeviceRows


@dataclass(frozen=True)
class LaunchTarget:
    """Where kernels run.

    Attributes:
        threads: CPU threads, the calling one included.
        stream: CUDA stream handle, or ``None`` for the CPU.
        upload: Copies a table of rows to the device in stream order; returns its address and what
            must live until the kernel is launched.
        scratch: Uninitialised memory on the device, as many bytes as asked for, that kernels may
            use until the owner is gone; returns its address and the owner. A multiple of 16.
        module: The compiled module that holds the kernels; tests have a second one, with emulated
            CUDA.
    """

    threads: int = 1
    stream: int | None = None
    upload: Callable[[IntArray], tuple[int, object]] | None = None
    scratch: Callable[[int], tuple[int, object]] | None = None
    module: Any = _C


_CPU_TARGETS: dict[int, LaunchTarget] = {}


def cpu_target(threads: int) -> LaunchTarget:
    """Kernels on so many CPU threads; made once.

    Raises:
        TypeError: ``threads`` is not an integer.
        ValueError: It is below 1.
    """
    found = _CPU_TARGETS.get(threads) if type(threads) is int else None
    if found is None:
        if wire.as_int("threads", threads) < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        found = _CPU_TARGETS[int(threads)] = LaunchTarget(threads=int(threads))
    return found


def launch(
    target: LaunchTarget, kernel: str, rows: Rows, *args: object, unit: int = wire.WORD_BITS
) -> None:
    """Calls ``kernel`` of the compiled module over checked rows.

    Args:
        target: Where it runs.
        kernel: Its name in ``cpu`` and ``cuda`` of the compiled module.
        rows: int64 [k, 9], C-contiguous; or the nine numbers of one row.
        *args: What follows the rows, up to threads or stream.
        unit: Elements that stay together: a payload word, or the block of a codec.

    Raises:
        RuntimeError: The data is on a CUDA device, and the module was built without CUDA.
    """
    if not len(rows):
        return
    if target.stream is None:
        assert not isinstance(rows, DeviceRows)
        table = rows if isinstance(rows, tuple) else (_address(rows), len(rows))
        getattr(target.module.cpu, kernel)(table, *args, target.threads)
        return
    run = cuda_kernel(target, kernel)
    # The owner lives on here: another thread must not get its memory yet.
    device_rows, _owner = _on_device(target, rows, unit)
    run(device_rows, *args, target.stream)


def cuda_kernel(target: LaunchTarget, kernel: str) -> Callable[..., None]:
    """A function of the compiled module's ``cuda``.

    Raises:
        RuntimeError: The module was built without CUDA.
    """
    if not hasattr(target.module, "cuda"):
        raise RuntimeError(
            f"{kernel}: the data is on a CUDA device, but pydist was built without CUDA; build it "
            "where nvcc is found (PYDIST_CUDA=1 makes its absence an error)"
        )
    found: Callable[..., None] = getattr(target.module.cuda, kernel)
    return found


def _address(rows: IntArray) -> int:
    return int(_C.address_of(rows))


def _on_device(target: LaunchTarget, rows: Rows, unit: int) -> tuple[tuple[int, ...], object]:
    """Rows as launchers of CUDA kernels take them, the amount of work at the end.

    Each row of a table is told the work of the rows before it, whatever it was cut out of.
    """
    if isinstance(rows, DeviceRows):
        return (rows.address, rows.count, rows.work), rows.owner
    if isinstance(rows, tuple):
        return (*rows, -(-rows[wire.N] // unit)), None
    if len(rows) == 1:
        row = rows[0].tolist()
        row[wire.WORDS_BEFORE] = 0
        return (*row, -(-row[wire.N] // unit)), None
    assert target.upload is not None
    numbered = wire.number_rows(rows.copy(), unit)
    address, owner = target.upload(numbered)
    work = int(numbered[-1, wire.WORDS_BEFORE]) - int(-numbered[-1, wire.N] // unit)
    return (address, len(rows), work), owner


def one_row(x: int, n: int, momentum: int = 0, momentum_out: int = 0) -> OneRow:
    """The row of one dense array that is all of a parameter.

    Args:
        x: Address of its first element.
        n: Elements.
        momentum: Address of its state: a momentum, a residual, a scaler.
        momentum_out: Where the new state goes.
    """
    return (x, momentum, momentum_out, n, 0, 0, 0, 0, 0)


def address_of(info: ArrayInfo | None) -> int:
    """The address of what need not be given; 0 where it is not."""
    return 0 if info is None else info.address


def step_of(target: LaunchTarget, step: int | ArrayInfo, like: ArrayInfo) -> tuple[int, int]:
    """The step where the host knows it, and the address at which a device is to read it."""
    if not isinstance(step, ArrayInfo):
        check_step(step)
        return step, 0
    check_step_at(step, like)
    if target.stream is not None:
        return 0, step.address  # no wait for the device; it is not checked
    value = ctypes.c_int64.from_address(step.address).value
    check_step(value)
    return value, 0


def as_table(segments: Any) -> IntArray | None:
    """A segment table from whatever array the caller has, or None."""
    if segments is None or type(segments) is np.ndarray:
        return None if segments is None else np.ascontiguousarray(segments)
    if hasattr(segments, "detach"):  # a tensor, on any device
        segments = segments.numpy(force=True)
    return np.ascontiguousarray(np.asarray(segments))
