"""What a kernel's arguments must be; a message names the argument and the value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydist.formats import wire
from pydist.formats.wire import IntArray

FLOATS = {"float32": 0, "float16": 1, "bfloat16": 2}
FLOAT_NAMES = tuple(FLOATS)
MOMENTA = ("float32", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}
MAX_FLOAT = float(np.finfo(np.float32).max)
TIES = {"hash": 0, "zero": 1, "positive": 2}


class ArrayInfo:
    """A contiguous array: what the checks need to know of it.

    Args:
        name: The argument's name, for messages.
        address: First byte.
        shape: Its shape.
        dtype: Name of its dtype.
        device: Such as ``"cpu"`` or ``"cuda:0"``, or an object that is printed so.
        array: What owns the memory; it lives as long as this.

    Attributes:
        size: Number of elements.
        end: One past the last byte.
    """

    __slots__ = ("address", "array", "device", "dtype", "end", "name", "shape", "size")

    def __init__(
        self,
        name: str,
        address: int,
        shape: tuple[int, ...],
        dtype: str,
        device: object,
        array: Any = None,
    ) -> None:
        self.name, self.address, self.shape = name, address, shape
        self.dtype, self.device, self.array = dtype, device, array
        self.size = shape[0] if len(shape) == 1 else math.prod(shape)
        self.end = address + self.size * ITEMSIZE.get(dtype, 1)


def check_rates(lr: float, weight_decay: float) -> None:
    """Raises ValueError unless float32 holds the learning rate, the decay and their product."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value <= MAX_FLOAT:
            raise ValueError(f"{name} must be from 0 to {MAX_FLOAT:.8g}, got {value}")
    if not lr * weight_decay <= MAX_FLOAT:
        raise ValueError(f"lr * weight_decay overflows float32: {lr} * {weight_decay}")


def check_bit(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is 0 or 1."""
    if wire.as_int(name, value) not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def check_seed(seed: int) -> None:
    """Raises ValueError unless ``seed`` fits 32 bits."""
    if not 0 <= wire.as_int("seed", seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")


def check_rank(rank: int) -> None:
    """Raises ValueError unless ``rank`` can draw random numbers of its own."""
    if not 0 <= wire.as_int("rank", rank) < wire.MAX_RANKS:
        raise ValueError(f"rank must be in [0, {wire.MAX_RANKS}), got {rank}")


def check_step(step: int) -> None:
    """Raises ValueError unless ``step`` fits 63 bits."""
    if not 0 <= wire.as_int("step", step) < 2**63:
        raise ValueError(f"step must be in [0, 2**63), got {step}")


def check_step_at(step: ArrayInfo, like: ArrayInfo) -> None:
    """Raises unless a step that lies in memory is int64[1] on the device of the other arrays."""
    check_dtype(step, ("int64",))
    check_size(step, 1, "a step in memory")
    check_device(like, step)


def check_range(binarization_range: float | None) -> None:
    """Raises ValueError unless the range of a stochastic vote is one that float32 can divide by."""
    r = binarization_range
    if r is not None and not (0 < r < math.inf and 2**-126 <= 1.0 / r < 2**127):
        raise ValueError(f"binarization_range must be a number from 6e-39 to 8e37, got {r}")


def check_ties(ties: str) -> None:
    """Raises ValueError unless ``ties`` is a known rule."""
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")


def check_dtype(view: ArrayInfo, allowed: tuple[str, ...]) -> None:
    """Raises TypeError unless the view has one of the dtypes."""
    if view.dtype not in allowed:
        raise TypeError(f"{view.name} must be {' or '.join(allowed)}, got {view.dtype}")


def check_size(view: ArrayInfo, size: int, why: str, like: ArrayInfo | None = None) -> None:
    """Raises ValueError unless the view has ``size`` elements; says why, and as which other."""
    if view.size != size:
        why = why if like is None else f"{why} {like.name}"
        unit = "bytes" if view.dtype == "uint8" else "elements"
        raise ValueError(f"{view.name} must have {size} {unit} ({why}), got {view.size}")


def check_device(*views: ArrayInfo | None) -> None:
    """Raises ValueError unless all views are on the first one's device."""
    first = views[0]
    for view in views[1:]:
        if view is not None and first is not None and view.device != first.device:
            raise ValueError(
                f"{view.name} is on {view.device}, {first.name} on {first.device}: "
                "all must be on one device"
            )


def check_disjoint(a: ArrayInfo, b: ArrayInfo, *, may_be_same: bool = False) -> None:
    """Raises ValueError where two views share memory (unless they are the same memory)."""
    if may_be_same and a.address == b.address:
        return
    if a.address < b.end and b.address < a.end:
        raise ValueError(f"{a.name} and {b.name} overlap in memory")


def check_out(out: ArrayInfo, dtype: str, shape: tuple[int, ...], *inputs: ArrayInfo) -> None:
    """Raises unless ``out`` has the dtype and shape of the result, and memory of its own."""
    check_dtype(out, (dtype,))
    if out.shape != shape:
        raise ValueError(f"{out.name} must have shape {list(shape)}, got {list(out.shape)}")
    check_device(inputs[0], out)
    for view in inputs:
        check_disjoint(out, view)


def check_state(x: ArrayInfo, state: ArrayInfo, state_out: ArrayInfo) -> None:
    """Raises unless ``x`` can be encoded while ``state`` becomes ``state_out``."""
    check_dtype(x, FLOAT_NAMES)
    check_dtype(state, MOMENTA)
    check_size(state, x.size, "as", x)
    check_device(x, state)
    check_disjoint(x, state)
    if state_out is state:
        return
    check_dtype(state_out, (state.dtype,))
    check_size(state_out, x.size, "as", x)
    check_device(x, state_out)
    check_disjoint(x, state_out)
    check_disjoint(state, state_out, may_be_same=True)


def check_flags(flags: ArrayInfo | None, *others: ArrayInfo) -> None:
    """Raises unless ``flags`` is absent, or int32[1] apart from the other views."""
    if flags is not None:
        check_dtype(flags, ("int32",))
        check_size(flags, 1, f"one word of {flags.name}")
        for other in others:
            check_disjoint(flags, other)


def check_payloads(payloads: ArrayInfo) -> tuple[int, int]:
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


def check_rows(values: ArrayInfo) -> tuple[int, int]:
    """Ranks and elements of a matrix of values; raises where it is none."""
    check_dtype(values, FLOAT_NAMES)
    if len(values.shape) != 2:
        raise ValueError(f"{values.name} must be [ranks, n], got shape {list(values.shape)}")
    ranks, n = values.shape
    if not 1 <= ranks <= wire.MAX_RANKS:
        raise ValueError(f"{values.name} must hold 1 … {wire.MAX_RANKS} ranks, got {ranks}")
    return ranks, n


def check_planes(planes: ArrayInfo, ranks: int | None) -> tuple[int, int]:
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


def check_one_payload(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a payload has one dimension."""
    if len(shape) != 1:
        raise ValueError(f"payload must be one-dimensional, got shape {list(shape)}")


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
