"""The kernels behind both doors (:mod:`pydist.ops`, :mod:`pydist.arrays`): checks, then the call.

A door describes its arrays as :class:`View` and says where to run as :class:`Target`; each function
here checks them, names the argument and the value where something is wrong, builds the table of
rows and calls the compiled module. Nothing is allocated on the caller's behalf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pydist import _C, wire
from pydist.wire import IntArray

FLOATS = {"float32": 0, "float16": 1, "bfloat16": 2}
MOMENTA = ("float32", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4}
MAX_FLOAT = float(np.finfo(np.float32).max)
TIES = {"hash": 0, "zero": 1, "positive": 2}

assert _C.WIRE_VERSION == wire.WIRE_VERSION, "pydist._C was built from other sources: reinstall"


class View(NamedTuple):
    """A contiguous array: what the checks need to know of it.

    Attributes:
        name: The argument's name, for messages.
        address: First byte.
        shape: Its shape.
        dtype: Name of its dtype.
        device: Such as ``"cpu"`` or ``"cuda:0"``.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.address + self.size * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Target:
    """Where kernels run.

    Attributes:
        threads: CPU threads, the calling one included.
        stream: CUDA stream handle, or ``None`` for the CPU.
        upload: Copies a table of rows to the device in stream order and returns its address.
    """

    threads: int = 1
    stream: int | None = None
    upload: Callable[[IntArray], int] | None = None


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

    def native(self) -> _C.LionPackArgs:
        """The checked options as the compiled module takes them."""
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        check_bit("zero_bit", self.zero_bit)
        check_seed(self.seed)
        if not 0 <= wire.as_int("rank", self.rank) < wire.MAX_RANKS:
            raise ValueError(f"rank must be in [0, {wire.MAX_RANKS}), got {self.rank}")
        check_step(self.step)
        check_range(self.binarization_range)
        r = self.binarization_range
        return _C.LionPackArgs(
            self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.zero_bit,
            0.0 if r is None else 1.0 / r, self.seed, self.rank << 2, self.step % 2**32,
        )  # fmt: skip


# --------------------------------------------------------------------------- checks


def check_bit(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is 0 or 1."""
    if wire.as_int(name, value) not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def check_seed(seed: int) -> None:
    """Raises ValueError unless ``seed`` fits 32 bits."""
    if not 0 <= wire.as_int("seed", seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")


def check_step(step: int) -> None:
    """Raises ValueError unless ``step`` fits 63 bits."""
    if not 0 <= wire.as_int("step", step) < 2**63:
        raise ValueError(f"step must be in [0, 2**63), got {step}")


def check_range(binarization_range: float | None) -> None:
    """Raises ValueError unless the range of a stochastic vote is one that float32 can divide by."""
    r = binarization_range
    if r is not None and not (0 < r < math.inf and 2**-126 <= 1.0 / r < 2**127):
        raise ValueError(f"binarization_range must be a number from 6e-39 to 8e37, got {r}")


def check_ties(ties: str) -> None:
    """Raises ValueError unless ``ties`` is a known rule."""
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")


def check_dtype(view: View, allowed: tuple[str, ...]) -> None:
    """Raises TypeError unless the view has one of the dtypes."""
    if view.dtype not in allowed:
        raise TypeError(f"{view.name} must be {' or '.join(allowed)}, got {view.dtype}")


def check_size(view: View, size: int, why: str) -> None:
    """Raises ValueError unless the view has ``size`` elements."""
    if view.size != size:
        unit = "bytes" if view.dtype == "uint8" else "elements"
        raise ValueError(f"{view.name} must have {size} {unit} ({why}), got {view.size}")


def check_device(*views: View | None) -> None:
    """Raises ValueError unless all views are on the first one's device."""
    present = [view for view in views if view is not None]
    for view in present[1:]:
        if view.device != present[0].device:
            raise ValueError(
                f"{view.name} is on {view.device}, {present[0].name} on {present[0].device}: "
                "all must be on one device"
            )


def check_disjoint(a: View, b: View, *, may_be_same: bool = False) -> None:
    """Raises ValueError where two views share memory (unless they are the same memory)."""
    if may_be_same and a.address == b.address:
        return
    if a.address < b.end and b.address < a.end:
        raise ValueError(f"{a.name} and {b.name} overlap in memory")


def check_flags(flags: View | None, *others: View) -> None:
    """Raises unless ``flags`` is absent, or int32[1] apart from the other views."""
    if flags is not None:
        check_dtype(flags, ("int32",))
        check_size(flags, 1, f"one word of {flags.name}")
        for other in others:
            check_disjoint(flags, other)


def check_payloads(payloads: View) -> tuple[int, int]:
    """Ranks and bytes of a payload matrix; raises where it is none."""
    check_dtype(payloads, ("uint8",))
    if len(payloads.shape) != 2:
        raise ValueError(f"payloads must be [ranks, bytes], got shape {list(payloads.shape)}")
    ranks, size = payloads.shape
    if not 1 <= ranks <= wire.MAX_RANKS:
        raise ValueError(f"payloads must hold 1 … {wire.MAX_RANKS} ranks, got {ranks}")
    if size % wire.WORD_BYTES:
        raise ValueError(f"payloads must be a multiple of 4 bytes long, got {size}")
    return ranks, size


def check_planes(planes: View, ranks: int | None) -> tuple[int, int]:
    """Planes and bytes of a plane matrix; raises where it does not fit ``ranks``."""
    check_dtype(planes, ("uint8",))
    if len(planes.shape) != 2:
        raise ValueError(f"planes must be [planes, bytes], got shape {list(planes.shape)}")
    count, size = planes.shape
    if size % wire.WORD_BYTES:
        raise ValueError(f"planes must be a multiple of 4 bytes long, got {size}")
    if ranks is None:
        if count not in (1, 2):
            raise ValueError(
                f"planes must hold 1 (sign) or 2 (sign, non-zero) planes, got {count}; "
                "count planes need ranks"
            )
    elif not 1 <= ranks <= wire.MAX_RANKS:
        raise ValueError(f"ranks must be in [1, {wire.MAX_RANKS}], got {ranks}")
    elif count != wire.planes_for(ranks):
        raise ValueError(
            f"planes must hold {wire.planes_for(ranks)} count planes for ranks={ranks}, got {count}"
        )
    return count, size


def check_n(n: int) -> None:
    """Raises unless ``n`` is a number of elements."""
    if wire.as_int("n", n) < 0:
        raise ValueError(f"n must be at least 0, got {n}")


def check_payload_of(size: int, n: int) -> None:
    """Raises ValueError unless a payload of ``size`` bytes holds ``n`` elements."""
    check_n(n)
    if size != wire.payload_bytes(n):
        raise ValueError(f"payload must have {wire.payload_bytes(n)} bytes for n={n}, got {size}")


def check_table(table: IntArray | None, n: int, name: str) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    if table is None:
        return wire.one_segment(n)
    wire.check_segments(table)
    total = int(table[:, 1].sum())
    if total != n:
        raise ValueError(f"segments cover {total} elements, {name} has {n}")
    return table


def vote_table(table: IntArray | None, n: int | None, size: int) -> IntArray:
    """The segment table of payloads of ``size`` bytes, checked."""
    if table is not None:
        if n is not None:
            raise ValueError(f"give n or segments, not both (n={n})")
        wire.check_segments(table)
    else:
        n = size * 8 if n is None else wire.as_int("n", n)
        if n < 0 or wire.payload_bytes(n) > size:
            raise ValueError(f"n must be in [0, {size * 8}] (bits of a payload), got {n}")
        table = wire.one_segment(n)
    if wire.segments_words(table) * wire.WORD_BYTES > size:
        raise ValueError(
            f"segments need payloads of {wire.segments_words(table) * wire.WORD_BYTES} bytes, "
            f"got {size}"
        )
    return table


# --------------------------------------------------------------------------- calls


def _cpu_rows(rows: IntArray) -> tuple[int, int]:
    return rows.__array_interface__["data"][0], len(rows)


def _cuda_rows(target: Target, rows: IntArray) -> _C.cuda.Rows:
    words = int(rows[-1, wire.WORDS_BEFORE]) + wire.words_for(int(rows[-1, wire.N]))
    if len(rows) == 1:
        return _C.cuda.Rows(0, 1, words, rows[0].tolist())
    assert target.upload is not None
    return _C.cuda.Rows(target.upload(rows), len(rows), words, [0] * 8)


def _address(view: View | None) -> int:
    return 0 if view is None else view.address


def launch(target: Target, kernel: str, rows: IntArray, *args: object) -> None:
    """Calls ``kernel`` of the compiled module over checked rows.

    Args:
        target: Where it runs.
        kernel: Its name in ``_C.cpu`` and ``_C.cuda``.
        rows: int64 [k, 8], C-contiguous.
        *args: What follows the rows, up to threads or stream.
    """
    if not len(rows):
        return
    if target.stream is None:
        getattr(_C.cpu, kernel)(*_cpu_rows(rows), *args, target.threads)
    else:
        getattr(_C.cuda, kernel)(_cuda_rows(target, rows), *args, target.stream)


def pack_signs(
    target: Target,
    x: View,
    payload: View,
    *,
    zero_bit: int,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the signs of ``x`` into ``payload``."""
    check_dtype(x, tuple(FLOATS))
    check_bit("zero_bit", zero_bit)
    check_flags(flags, x)
    check_device(x, payload, flags)
    table = check_table(segments, x.size, x.name)
    check_size(payload, wire.segments_words(table) * wire.WORD_BYTES, "one bit an element of x")
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    launch(target, "pack_signs", rows, FLOATS[x.dtype], payload.address, zero_bit, _address(flags))


def unpack_votes(target: Target, planes: View, out: View, *, ranks: int | None, mean: bool) -> None:
    """Writes the values of a vote into ``out``."""
    check_dtype(out, tuple(FLOATS))
    count, size = check_planes(planes, ranks)
    check_device(planes, out)
    if size != wire.payload_bytes(out.size):
        raise ValueError(
            f"{planes.name} must have {wire.payload_bytes(out.size)} bytes a plane for "
            f"n={out.size}, got {size}"
        )
    rows = wire.one_row(out.address, out.size)
    divisor = ranks if ranks is not None and mean else 1
    args = _C.Unpack(planes.address, size, count, ranks or 0, divisor)
    launch(target, "unpack_votes", rows, FLOATS[out.dtype], args)


def count_votes(target: Target, payloads: View, planes: View) -> None:
    """Writes how many ranks voted +1 into ``planes``."""
    ranks, size = check_payloads(payloads)
    check_device(payloads, planes)
    rows = wire.one_row(0, size * 8)
    args = _C.VoteArgs(payloads.address, size, ranks, planes.address, size, 0, 0, 0)
    launch(target, "count_votes", rows, args)


def majority_vote(
    target: Target,
    payloads: View,
    planes: View,
    *,
    ties: str,
    seed: int,
    step: int,
    n: int | None,
    segments: IntArray | None,
) -> None:
    """Writes the side most ranks voted for into ``planes``."""
    ranks, size = check_payloads(payloads)
    check_ties(ties)
    check_seed(seed)
    check_step(step)
    check_device(payloads, planes)
    rows = wire.rows_of(vote_table(segments, n, size))
    args = _C.VoteArgs(payloads.address, size, ranks, planes.address, size, TIES[ties], seed, step)
    launch(target, "majority_vote", rows, args)


def lion_pack(
    target: Target,
    grad: View,
    momentum: View,
    momentum_out: View,
    payload: View,
    options: LionOptions,
    *,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes a worker's vote into ``payload`` and its new momentum into ``momentum_out``."""
    check_dtype(grad, tuple(FLOATS))
    check_dtype(momentum, MOMENTA)
    check_dtype(momentum_out, (momentum.dtype,))
    check_size(momentum, grad.size, f"as {grad.name}")
    check_size(momentum_out, grad.size, f"as {grad.name}")
    check_flags(flags, grad, momentum, momentum_out)
    check_device(grad, momentum, momentum_out, payload, flags)
    check_disjoint(grad, momentum)
    check_disjoint(grad, momentum_out)
    check_disjoint(momentum, momentum_out, may_be_same=True)
    table = check_table(segments, grad.size, grad.name)
    rows = wire.rows_of(table)
    wire.dense_addresses(rows, wire.X, grad.address, ITEMSIZE[grad.dtype])
    width = ITEMSIZE[momentum.dtype]
    wire.dense_addresses(rows, wire.MOMENTUM, momentum.address, width)
    wire.dense_addresses(rows, wire.MOMENTUM_OUT, momentum_out.address, width)
    launch(
        target, "lion_pack", rows, FLOATS[grad.dtype], FLOATS[momentum.dtype], payload.address,
        options.native(), _address(flags),
    )  # fmt: skip


def lion_apply_args(
    lr: float, weight_decay: float, count: int, plane_bytes: int, ranks: int | None
) -> _C.LionApplyArgs:
    """The scalars of :func:`lion_apply`, each rounded once from double to float32."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value <= MAX_FLOAT:
            raise ValueError(f"{name} must be from 0 to {MAX_FLOAT:.8g}, got {value}")
    if not lr * weight_decay <= MAX_FLOAT:
        raise ValueError(f"lr * weight_decay overflows float32: {lr} * {weight_decay}")
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
    launch(target, "lion_apply", rows, FLOATS[param.dtype], planes.address, args, _address(skip))


def as_table(segments: object) -> IntArray | None:
    """A segment table from whatever array the caller has, or None."""
    if segments is None:
        return None
    return np.ascontiguousarray(np.asarray(segments))
