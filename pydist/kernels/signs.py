"""The kernels behind both doors (:mod:`pydist.ops`, :mod:`pydist.arrays`): checks, then the call.

A door describes its arrays as :class:`View` and says where to run as :class:`Target`; each function
here checks them, names the argument and the value where something is wrong, builds the table of
rows and calls the compiled module. Nothing is allocated on the caller's behalf.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pydist import _C
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels.checks import (
    FLOATS,
    ITEMSIZE,
    TIES,
    View,
    check_bit,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_out,
    check_payloads,
    check_planes,
    check_range,
    check_rank,
    check_rates,
    check_rows,
    check_seed,
    check_size,
    check_state,
    check_step,
    check_step_at,
    check_table,
    check_ties,
    vote_table,
)

assert _C.WIRE_VERSION == wire.WIRE_VERSION, "pydist._C was built from other sources: reinstall"


@dataclass(frozen=True)
class Target:
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


@dataclass(frozen=True)
class LionOptions:
    """Scalars of :func:`lion_pack`.

    Attributes:
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: What a direction of exactly zero votes, 0 or 1.
        binarization_range: ``None`` votes the sign; r votes +1 with probability
            ``(1 + c / r) / 2``.
        seed: Seed of those draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws.
    """

    beta1: float
    beta2: float
    zero_bit: int = 1
    binarization_range: float | None = None
    seed: int = 0
    rank: int = 0
    step: int = 0

    def native(self, step_at: int = 0) -> _C.LionPackArgs:
        """The checked options as the compiled module takes them.

        Args:
            step_at: Where a device is to read the step instead; 0 for nowhere.
        """
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        check_bit("zero_bit", self.zero_bit)
        check_seed(self.seed)
        check_rank(self.rank)
        check_step(self.step)
        check_range(self.binarization_range)
        r = self.binarization_range
        return _C.LionPackArgs(
            self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.zero_bit,
            0.0 if r is None else 1.0 / r, self.seed, self.rank << 2, self.step % 2**32,
            step_at,
        )  # fmt: skip


# --------------------------------------------------------------------------- calls


def _cpu_rows(rows: IntArray) -> tuple[int, int]:
    return rows.__array_interface__["data"][0], len(rows)


def _cuda_rows(target: Target, rows: IntArray, unit: int) -> tuple[_C.cuda.Rows, object]:
    rows_class = target.module.cuda.Rows
    words = int(rows[-1, wire.WORDS_BEFORE]) - int(-rows[-1, wire.N] // unit)
    if len(rows) == 1:
        return rows_class(0, 1, words, rows[0].tolist()), None
    assert target.upload is not None
    address, owner = target.upload(rows)
    return rows_class(address, len(rows), words, [0] * 8), owner


def address_of(view: View | None) -> int:
    """The address of what need not be given; 0 where it is not."""
    return 0 if view is None else view.address


def step_of(target: Target, step: int | View, like: View) -> tuple[int, int]:
    """The step where the host knows it, and the address at which a device is to read it."""
    if not isinstance(step, View):
        check_step(step)
        return step, 0
    check_step_at(step, like)
    if target.stream is not None:
        return 0, step.address  # no wait for the device; it is not checked
    value = ctypes.c_int64.from_address(step.address).value
    check_step(value)
    return value, 0


def launch(
    target: Target, kernel: str, rows: IntArray, *args: object, unit: int = wire.WORD_BITS
) -> None:
    """Calls ``kernel`` of the compiled module over checked rows.

    Args:
        target: Where it runs.
        kernel: Its name in ``cpu`` and ``cuda`` of the compiled module.
        rows: int64 [k, 8], C-contiguous.
        *args: What follows the rows, up to threads or stream.
        unit: Elements that stay together: a payload word, or the block of a codec.

    Raises:
        RuntimeError: The data is on a CUDA device, and the module was built without CUDA.
    """
    if not len(rows):
        return
    if target.stream is None:
        getattr(target.module.cpu, kernel)(*_cpu_rows(rows), *args, target.threads)
    elif not hasattr(target.module, "cuda"):
        raise RuntimeError(
            f"{kernel}: the data is on a CUDA device, but pydist was built without CUDA; build it "
            "where nvcc is found (PYDIST_CUDA=1 makes its absence an error)"
        )
    else:
        # The owner lives on here: another thread must not get its memory yet.
        table, _owner = _cuda_rows(target, rows, unit)
        getattr(target.module.cuda, kernel)(table, *args, target.stream)


def pack_signs(
    target: Target,
    x: View,
    out: View,
    *,
    zero_bit: int,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the signs of ``x`` into the payload ``out``."""
    check_dtype(x, tuple(FLOATS))
    check_bit("zero_bit", zero_bit)
    check_flags(flags, x, out)
    check_device(x, flags)
    table = check_table(segments, x.size, x.name)
    check_out(out, "uint8", (wire.segments_words(table) * wire.WORD_BYTES,), x)
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    launch(target, "pack_signs", rows, FLOATS[x.dtype], out.address, zero_bit, address_of(flags))


def unpack_votes(target: Target, planes: View, out: View, *, ranks: int | None, mean: bool) -> None:
    """Writes the values of a vote into ``out``."""
    check_dtype(out, tuple(FLOATS))
    count, size = check_planes(planes, ranks)
    check_device(planes, out)
    check_disjoint(out, planes)
    if size != wire.payload_bytes(out.size):
        raise ValueError(
            f"{planes.name} must have {wire.payload_bytes(out.size)} bytes a plane for "
            f"n={out.size}, got {size}"
        )
    rows = wire.one_row(out.address, out.size)
    divisor = ranks if ranks is not None and mean else 1
    args = _C.Unpack(planes.address, size, count, ranks or 0, divisor)
    launch(target, "unpack_votes", rows, FLOATS[out.dtype], args)


def count_votes(target: Target, payloads: View, out: View) -> None:
    """Writes how many ranks voted +1 into the planes ``out``."""
    ranks, size = check_payloads(payloads)
    check_out(out, "uint8", (wire.planes_for(ranks), size), payloads)
    rows = wire.one_row(0, size * 8)
    args = _C.VoteArgs(payloads.address, size, ranks, out.address, size, 0, 0, 0, 0)
    launch(target, "count_votes", rows, args)


def majority_vote(
    target: Target,
    payloads: View,
    out: View,
    *,
    ties: str,
    seed: int,
    step: int | View,
    n: int | None,
    segments: IntArray | None,
) -> None:
    """Writes the side most ranks voted for into the planes ``out``."""
    ranks, size = check_payloads(payloads)
    check_ties(ties)
    check_seed(seed)
    step, step_at = step_of(target, step, payloads)
    check_out(out, "uint8", (2 if ties == "zero" else 1, size), payloads)
    rows = wire.rows_of(vote_table(segments, n, size))
    args = _C.VoteArgs(
        payloads.address, size, ranks, out.address, size, TIES[ties], seed, step, step_at
    )
    launch(target, "majority_vote", rows, args)


def lion_pack(
    target: Target,
    grad: View,
    momentum: View,
    momentum_out: View,
    out: View,
    options: LionOptions,
    *,
    flags: View | None,
    segments: IntArray | None,
    step: View | None = None,
) -> None:
    """Writes a worker's vote into ``out`` and its new momentum into ``momentum_out``."""
    check_state(grad, momentum, momentum_out, out, flags)
    table = check_table(segments, grad.size, grad.name)
    size = wire.segments_words(table) * wire.WORD_BYTES
    check_out(out, "uint8", (size,), grad, momentum, momentum_out)
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, grad.address, ITEMSIZE[grad.dtype])
    width = ITEMSIZE[momentum.dtype]
    wire.dense_addresses(rows, wire.MOMENTUM, momentum.address, width)
    wire.dense_addresses(rows, wire.MOMENTUM_OUT, momentum_out.address, width)
    known, step_at = step_of(target, options.step if step is None else step, grad)
    launch(
        target, "lion_pack", rows, FLOATS[grad.dtype], FLOATS[momentum.dtype], out.address,
        replace(options, step=known).native(step_at), address_of(flags),
    )  # fmt: skip


def lion_apply_args(
    lr: float, weight_decay: float, count: int, plane_bytes: int, ranks: int | None
) -> _C.LionApplyArgs:
    """The scalars of :func:`lion_apply`, each rounded once from double to float32."""
    check_rates(lr, weight_decay)
    step = lr if ranks is None else lr / ranks
    words = plane_bytes // wire.WORD_BYTES
    return _C.LionApplyArgs(1.0 - lr * weight_decay, step, count, words, ranks or 0)


def lion_apply(
    target: Target,
    param: View,
    planes: View,
    *,
    lr: float,
    weight_decay: float,
    ranks: int | None,
    skip: View | None,
    segments: IntArray | None,
) -> None:
    """Applies a vote to ``param``, in place, unless ``skip`` holds a non-zero value."""
    check_dtype(param, tuple(FLOATS))
    count, size = check_planes(planes, ranks)
    check_flags(skip, param)
    check_device(param, planes, skip)
    check_disjoint(param, planes)
    table = check_table(segments, param.size, param.name)
    needed = wire.segments_words(table) * wire.WORD_BYTES
    if size != needed:
        raise ValueError(f"planes must have {needed} bytes a plane for {param.name}, got {size}")
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, param.address, ITEMSIZE[param.dtype])
    args = lion_apply_args(lr, weight_decay, count, size, ranks)
    launch(target, "lion_apply", rows, FLOATS[param.dtype], planes.address, args, address_of(skip))


def sum_values(target: Target, values: View, out: View, *, mean: bool, flags: View | None) -> None:
    """Writes the sum, or the mean, of the rows of ``values`` into ``out``."""
    check_dtype(out, tuple(FLOATS))
    ranks, n = check_rows(values)
    check_size(out, n, f"as a row of {values.name}")
    check_flags(flags, values, out)
    check_device(values, out, flags)
    check_disjoint(out, values)
    width = ITEMSIZE[values.dtype]
    args = _C.SumArgs(values.address, n * width, ranks, ranks if mean else 1)
    launch(
        target, "sum_values", wire.one_row(out.address, n), FLOATS[values.dtype],
        FLOATS[out.dtype], args, address_of(flags),
    )  # fmt: skip


def as_table(segments: object) -> IntArray | None:
    """A segment table from whatever array the caller has, or None."""
    if segments is None:
        return None
    return np.ascontiguousarray(np.asarray(segments))
