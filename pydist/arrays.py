"""The kernels on NumPy arrays and on anything with ``__cuda_array_interface__`` (CuPy).

The names and arguments are those of :mod:`pydist.ops`; the result is the same kind of array as the
input. NumPy arrays are read and written where they are, without a copy, if they are C-contiguous.
Neither torch nor CuPy is needed for NumPy; ``bfloat16`` arrays are those of ``ml_dtypes``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pydist import _C, checks, kernels, wire
from pydist.checks import View
from pydist.kernels import LionOptions, Target

_C.current_isa()  # a wrong PYDIST_ISA is an error here, not in the first kernel call

__all__ = [
    "count_votes",
    "lion_apply_",
    "lion_pack_",
    "majority_vote",
    "pack_signs",
    "unpack_signs",
    "unpack_votes",
]

Array = Any
"""``numpy.ndarray`` or a CUDA array such as ``cupy.ndarray``."""


class _NumPy:
    """Arrays in host memory."""

    module: Any = np

    def view(self, name: str, x: Array) -> View:
        address = x.__array_interface__["data"][0]
        dtype = x.dtype.name if x.dtype.isnative else f"{x.dtype.name} of the other byte order"
        return View(name, address, tuple(x.shape), dtype, "cpu")

    def target(self, threads: int | None) -> Target:
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if wire.as_int("threads", threads) < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        return Target(threads=threads)


class _CuPy:
    """Arrays in device memory; work runs on CuPy's current stream."""

    def __init__(self) -> None:
        import cupy

        self.module: Any = cupy

    def view(self, name: str, x: Array) -> View:
        return View(name, x.data.ptr, tuple(x.shape), x.dtype.name, f"cuda:{x.device.id}")

    def target(self, threads: int | None) -> Target:
        return cupy_target()


def cupy_target() -> Target:
    """Where kernels on CuPy arrays run: the current device's current stream."""
    import cupy

    def upload(rows: wire.IntArray) -> tuple[int, Any]:
        table = cupy.asarray(rows)  # CuPy's pool hands memory out in stream order
        return table.data.ptr, table

    return Target(stream=cupy.cuda.get_current_stream().ptr, upload=upload)


def _backend(*arrays: tuple[str, Array]) -> _NumPy | _CuPy:
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
    return _NumPy() if kinds[0][1] == "numpy" else _CuPy()


def _dense(backend: _NumPy | _CuPy, x: Array) -> Array:
    return backend.module.ascontiguousarray(x)


def _in_place(backend: _NumPy | _CuPy, name: str, x: Array) -> tuple[Array, Callable[[], None]]:
    """A contiguous array to write to, and what copies it back where ``x`` is not contiguous."""
    _check_writable(name, x)
    if x.flags.c_contiguous:
        return x, lambda: None
    if x.size and any(s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True)):
        raise ValueError(f"{name} has strides {list(x.strides)}: elements share memory")
    dense = _dense(backend, x)

    def write_back() -> None:
        x[...] = dense

    return dense, write_back


def _check_writable(name: str, x: Array) -> None:
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name} is read-only")


def _flags(backend: _NumPy | _CuPy, flags: Array | None) -> View | None:
    if flags is None:
        return None
    _check_writable("flags", flags)
    return backend.view("flags", flags)


def _step(step: int | Array) -> tuple[int, Array | None]:
    """A step that is known, or the array that holds it."""
    return (0, step) if getattr(step, "shape", ()) else (step, None)


def _result(backend: _NumPy | _CuPy, out: Array, gaps: bool = False, *inputs: View) -> View:
    """Memory that a kernel writes; what lies in the gaps between segments is padding, so zero."""
    _check_writable("out", out)
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous, got strides {list(out.strides)}")
    view = backend.view("out", out)
    if gaps:
        for other in inputs:
            checks.check_disjoint(view, other)
        out[...] = 0
    return view


def _payload(
    backend: _NumPy | _CuPy, out: Array | None, table: wire.IntArray, *inputs: View
) -> tuple[Array, View]:
    """Memory for the payload of a segment table: the caller's, or new."""
    if out is None:
        size = wire.segments_words(table) * wire.WORD_BYTES
        out = backend.module.empty(size, dtype=np.uint8)
    return out, _result(backend, out, wire.has_gaps(table), *inputs)


def pack_signs(
    x: Array,
    *,
    zero_bit: int = 1,
    flags: Array | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Packs signs into one bit an element; see :func:`pydist.ops.pack_signs`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        zero_bit: Bit of a zero.
        flags: int32[1]; 1 is OR-ed in where ``x`` holds a NaN or an infinity.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    backend = _backend(("x", x), ("flags", flags), ("out", out))
    x = _dense(backend, x)
    view = backend.view("x", x)
    table = checks.check_table(kernels.as_table(segments), view.size, "x")
    out, out_view = _payload(backend, out, table, view)
    kernels.pack_signs(
        backend.target(threads), view, out_view,
        zero_bit=zero_bit, flags=_flags(backend, flags), segments=table,
    )  # fmt: skip
    return out


def unpack_votes(
    planes: Array,
    n: int,
    *,
    ranks: int | None = None,
    mean: bool = False,
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Turns the planes of a vote into values; see :func:`pydist.ops.unpack_votes`.

    Args:
        planes: uint8 [p, bytes]: sign; sign and non-zero; or counts of ``ranks`` voters.
        n: Elements.
        ranks: Voters behind count planes; ``None`` for sign planes.
        mean: Divide the sum of the votes by ``ranks``.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The planes do not fit ``n`` or ``ranks``, or ``out`` does not fit ``n``.
    """
    checks.check_n(n)
    backend = _backend(("planes", planes), ("out", out))
    wanted = np.dtype(np.float32 if dtype is None else dtype)
    if wanted.name not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {wanted}")
    if out is None:
        out = backend.module.empty(n, dtype=wanted)
    elif dtype is not None and out.dtype != wanted:
        raise TypeError(f"out must be {wanted}, got {out.dtype}")
    planes = _dense(backend, planes)
    view = _result(backend, out)
    checks.check_size(view, n, "n")
    kernels.unpack_votes(
        backend.target(threads), backend.view("planes", planes), view, ranks=ranks, mean=mean
    )
    return out


def unpack_signs(
    payload: Array,
    n: int,
    *,
    dtype: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Turns a payload of :func:`pack_signs` into ±1; see :func:`pydist.ops.unpack_signs`.

    Args:
        payload: uint8 of ``ceil(n / 32) * 4`` bytes.
        n: Elements.
        dtype: float32, float16 or bfloat16 of the result; default that of ``out``, or float32.
        out: n elements of any shape; receives the values, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        [n] values of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: The payload has another length, or ``out`` does not fit ``n``.
    """
    _backend(("payload", payload), ("out", out))
    if len(payload.shape) != 1:
        raise ValueError(f"payload must be one-dimensional, got shape {list(payload.shape)}")
    checks.check_payload_of(payload.size, n)
    return unpack_votes(payload[None], n, dtype=dtype, out=out, threads=threads)


def count_votes(payloads: Array, *, out: Array | None = None, threads: int | None = None) -> Array:
    """Counts how many ranks voted +1; see :func:`pydist.ops.count_votes`.

    Args:
        payloads: uint8 [ranks, bytes].
        out: Receives the planes, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 [ceil(log2(ranks + 1)), bytes] of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: There are no ranks, more than 65,535, or bytes are not a multiple of 4; or
            ``out`` has another shape.
    """
    backend = _backend(("payloads", payloads), ("out", out))
    payloads = _dense(backend, payloads)
    view = backend.view("payloads", payloads)
    ranks, size = checks.check_payloads(view)
    if out is None:
        out = backend.module.empty((wire.planes_for(ranks), size), dtype=np.uint8)
    kernels.count_votes(backend.target(threads), view, _result(backend, out))
    return out


def majority_vote(
    payloads: Array,
    *,
    ties: str = "hash",
    seed: int = 0,
    step: int | Array = 0,
    n: int | None = None,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Finds the side that most ranks voted for; see :func:`pydist.ops.majority_vote`.

    Args:
        payloads: uint8 [ranks, bytes].
        ties: ``"hash"``, ``"zero"`` or ``"positive"``.
        seed: Seed of the tie hash.
        step: Step of the tie hash, or an array int64[1] that holds it.
        n: Elements; default all bits.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment of ``n``.
        out: Receives the planes, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 [1, bytes], or [2, bytes] with ``ties="zero"``, of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = _step(step)
    backend = _backend(("payloads", payloads), ("out", out), ("step", step_at))
    payloads = _dense(backend, payloads)
    view = backend.view("payloads", payloads)
    _, size = checks.check_payloads(view)
    table = kernels.as_table(segments)
    gaps = checks.vote_gaps(table, n, size)
    if out is None:
        out = backend.module.empty((2 if ties == "zero" else 1, size), dtype=np.uint8)
    kernels.majority_vote(
        backend.target(threads), view, _result(backend, out, gaps, view),
        ties=ties, seed=seed, n=n, segments=table,
        step=step if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    return out


def lion_pack_(
    grad: Array,
    momentum: Array,
    *,
    beta1: float,
    beta2: float,
    zero_bit: int = 1,
    momentum_out: Array | None = None,
    flags: Array | None = None,
    binarization_range: float | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | Array = 0,
    segments: Any = None,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """A worker's vote and its new momentum; see :func:`pydist.ops.lion_pack_`.

    Args:
        grad: float32, float16 or bfloat16, any shape.
        momentum: float32 or bfloat16, as many elements; updated in place.
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: Vote of a direction of exactly zero.
        momentum_out: Receives the new momentum instead.
        flags: int32[1]; 1 is OR-ed in where something is not finite.
        binarization_range: r votes +1 with probability ``(1 + c / r) / 2`` instead of the sign.
        seed: Seed of those draws.
        rank: This rank.
        step: Step of the draws, or an array int64[1] that holds it.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default all cores.

    Returns:
        uint8 payload of the same kind of array.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    step, step_at = _step(step)
    backend = _backend(
        ("grad", grad), ("momentum", momentum), ("momentum_out", momentum_out), ("flags", flags),
        ("out", out), ("step", step_at),
    )  # fmt: skip
    grad = _dense(backend, grad)
    name, target = (
        ("momentum", momentum) if momentum_out is None else ("momentum_out", momentum_out)
    )
    if momentum_out is not None and np.may_share_memory(momentum, momentum_out):
        both_dense = momentum.flags.c_contiguous and momentum_out.flags.c_contiguous
        if not both_dense:  # otherwise checks.check_disjoint sees it
            raise ValueError("momentum and momentum_out overlap in memory")
    dense, write_back = _in_place(backend, name, target)
    old = dense if target is momentum else _dense(backend, momentum)
    if out is not None and dense is not target and np.may_share_memory(out, target):
        raise ValueError(f"out and {name} overlap in memory")
    g, m = backend.view("grad", grad), backend.view("momentum", old)
    new = backend.view("momentum_out", dense)
    table = checks.check_table(kernels.as_table(segments), g.size, "grad")
    out, out_view = _payload(backend, out, table, g, m, new)
    kernels.lion_pack(
        backend.target(threads), g, m, new, out_view,
        LionOptions(beta1, beta2, zero_bit, binarization_range, seed, rank, step),
        flags=_flags(backend, flags), segments=table,
        step=None if step_at is None else backend.view("step", step_at),
    )  # fmt: skip
    write_back()
    return out


def lion_apply_(
    param: Array,
    planes: Array,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
    skip: Array | None = None,
    segments: Any = None,
    threads: int | None = None,
) -> None:
    """Weight decay and the voted update, in place; see :func:`pydist.ops.lion_apply_`.

    Args:
        param: float32, float16 or bfloat16, any shape; updated.
        planes: uint8 [p, bytes] of a vote.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        ranks: Voters behind count planes; ``None`` for sign planes.
        skip: int32[1]; where it is not 0, nothing is changed.
        segments: int64 [k, 4] (:func:`pydist.segments`); default one segment.
        threads: CPU threads; default all cores.

    Raises:
        TypeError: An array is of another kind or dtype.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    backend = _backend(("param", param), ("planes", planes), ("skip", skip))
    dense, write_back = _in_place(backend, "param", param)
    planes = _dense(backend, planes)
    kernels.lion_apply(
        backend.target(threads), backend.view("param", dense), backend.view("planes", planes),
        lr=lr, weight_decay=weight_decay, ranks=ranks,
        skip=None if skip is None else backend.view("skip", skip),
        segments=kernels.as_table(segments),
    )  # fmt: skip
    write_back()
