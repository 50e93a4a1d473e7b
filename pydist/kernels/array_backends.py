"""NumPy and CuPy arrays for :mod:`pydist.arrays`: views, targets, memory for results."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.checks import View
from pydist.kernels.signs import Target

Array = Any
"""``numpy.ndarray`` or a CUDA array such as ``cupy.ndarray``."""


class NumPy:
    """Arrays in host memory."""

    module: Any = np

    def view(self, name: str, x: Array) -> View:
        """Describes a contiguous array."""
        address = x.__array_interface__["data"][0]
        dtype = x.dtype.name if x.dtype.isnative else f"{x.dtype.name} of the other byte order"
        return View(name, address, tuple(x.shape), dtype, "cpu")

    def target(self, threads: int | None) -> Target:
        """Where kernels run."""
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if wire.as_int("threads", threads) < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        return Target(threads=threads)


class CuPy:
    """Arrays in device memory; work runs on CuPy's current stream."""

    def __init__(self) -> None:
        import cupy

        self.module: Any = cupy

    def view(self, name: str, x: Array) -> View:
        """Describes a contiguous array."""
        return View(name, x.data.ptr, tuple(x.shape), x.dtype.name, f"cuda:{x.device.id}")

    def target(self, threads: int | None) -> Target:
        """Where kernels run."""
        return cupy_target()


def cupy_target() -> Target:
    """Where kernels on CuPy arrays run: the current device's current stream."""
    import cupy

    def upload(rows: wire.IntArray) -> tuple[int, Any]:
        table = cupy.asarray(rows)  # CuPy's pool hands memory out in stream order
        return table.data.ptr, table

    def scratch(size: int) -> tuple[int, Any]:
        room = cupy.empty(size, dtype=np.uint8)
        return room.data.ptr, room

    return Target(stream=cupy.cuda.get_current_stream().ptr, upload=upload, scratch=scratch)


def backend_of(*arrays: tuple[str, Array]) -> NumPy | CuPy:
    """The one kind of array all arguments are; raises TypeError naming the one that differs."""
    kinds = []
    for name, x in arrays:
        if x is None:
            continue
        if isinstance(x, np.ndarray):
            kinds.append((name, "numpy"))
        elif hasattr(x, "__cuda_array_interface__"):
            kinds.append((name, "cuda"))
        else:
            raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(x).__name__}")
    for name, kind in kinds[1:]:
        if kind != kinds[0][1]:
            raise TypeError(f"{name} is a {kind} array, {kinds[0][0]} a {kinds[0][1]} array")
    return NumPy() if kinds[0][1] == "numpy" else CuPy()


def contiguous(backend: NumPy | CuPy, x: Array) -> Array:
    """The array itself, or a contiguous copy."""
    return backend.module.ascontiguousarray(x)


def in_place(backend: NumPy | CuPy, name: str, x: Array) -> tuple[Array, Callable[[], None]]:
    """A contiguous array to write to, and what copies it back where ``x`` is not contiguous."""
    check_writable(name, x)
    if x.flags.c_contiguous:
        return x, lambda: None
    if x.size and any(s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True)):
        raise ValueError(f"{name} has strides {list(x.strides)}: elements share memory")
    dense = contiguous(backend, x)

    def write_back() -> None:
        x[...] = dense

    return dense, write_back


def check_writable(name: str, x: Array) -> None:
    """Raises ValueError where an array is read-only."""
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name} is read-only")


def flags_view(backend: NumPy | CuPy, flags: Array | None) -> View | None:
    """Describes the flags, if there are any."""
    if flags is None:
        return None
    check_writable("flags", flags)
    return backend.view("flags", flags)


def step_of(step: int | Array) -> tuple[int, Array | None]:
    """A step that is known, or the array that holds it."""
    return (0, step) if getattr(step, "shape", ()) else (step, None)


def result_view(backend: NumPy | CuPy, out: Array, gaps: bool = False, *inputs: View) -> View:
    """Memory that a kernel writes; what lies in the gaps between segments is padding, so zero."""
    check_writable("out", out)
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous, got strides {list(out.strides)}")
    view = backend.view("out", out)
    if gaps:
        for other in inputs:
            checks.check_disjoint(view, other)
        out[...] = 0
    return view


def payload_of(
    backend: NumPy | CuPy, out: Array | None, table: wire.IntArray, *inputs: View
) -> tuple[Array, View]:
    """Memory for the payload of a segment table: the caller's, or new."""
    if out is None:
        size = wire.segments_words(table) * wire.WORD_BYTES
        out = backend.module.empty(size, dtype=np.uint8)
    return out, result_view(backend, out, wire.has_gaps(table), *inputs)


def values_of(backend: NumPy | CuPy, n: int, dtype: Any, out: Array | None) -> Array:
    """Memory for ``n`` values: the caller's, if its dtype is the wanted one, or new."""
    wanted = np.dtype(np.float32 if dtype is None else dtype)
    if wanted.name not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {wanted}")
    if out is None:
        return backend.module.empty(n, dtype=wanted)
    if dtype is not None and out.dtype != wanted:
        raise TypeError(f"out must be {wanted}, got {out.dtype}")
    return out
