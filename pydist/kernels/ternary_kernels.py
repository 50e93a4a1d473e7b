"""The ternary kernels behind both doors: checks, then the call, as in ``kernels``."""

from __future__ import annotations

import ctypes
from typing import Protocol

from pydist import _C
from pydist.formats import ternary, wire
from pydist.formats.wire import IntArray
from pydist.kernels.arguments import shown
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.checks import (
    FLOATS,
    ITEMSIZE,
    View,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_n,
    check_out,
    check_payloads,
    check_rank,
    check_seed,
    check_size,
)
from pydist.kernels.signs import Target, address_of, launch, step_of

WARP_UNITS = 8
"""Units that a warp packs at a time; kWarpUnits of csrc/cuda/ternary_pack.cu."""


class TernaryCodec(Protocol):
    """A codec whose scalers are those of :class:`pydist.Ternary`."""

    @property
    def clip(self) -> float | None:
        """Deviations that magnitudes are held to."""


def clip_of(codec: TernaryCodec) -> float:
    """The codec's clip as kernels take it, 0 for none; raises TypeError where there is none."""
    if not hasattr(codec, "clip"):
        raise TypeError(f"codec must be a Ternary, got {shown(codec)}")
    ternary.check_clip(codec.clip)
    return codec.clip or 0.0


def check_table(table: IntArray | None, n: int, name: str) -> IntArray:
    """The segment table of ``n`` elements, checked."""
    if table is None:
        return wire.one_segment(n)
    ternary.check_segments(table)
    total = int(table[:, 1].sum())
    if total != n:
        raise ValueError(f"segments cover {total} elements, {name} has {n}")
    return table


def payload_table(table: IntArray | None, n: int, payloads: View) -> IntArray:
    """The segment table of payloads of ``n`` elements, checked against their length."""
    check_n(n)
    table = check_table(table, n, "n")
    needed = ternary.table_bytes(table)
    if payloads.shape[1] != needed:
        raise ValueError(
            f"{payloads.name} must have {needed} bytes for n={n}, got {payloads.shape[1]}"
        )
    return table


def check_ranks(ranks: int) -> None:
    """Raises unless ``ranks`` is a number of ranks."""
    if not 1 <= wire.as_int("ranks", ranks) <= wire.MAX_RANKS:
        raise ValueError(f"ranks must be in [1, {wire.MAX_RANKS}], got {ranks}")


def _check_scalers(scalers: View, rows: int, like: View) -> None:
    check_dtype(scalers, ("float32",))
    check_size(scalers, rows, "one a segment")
    check_device(like, scalers)


def launch_reading(
    target: Target, kernel: str, rows: IntArray, *args: object, flags: int, what: str
) -> None:
    """Launches a kernel that reads what others have sent.

    Args:
        target: Where it runs.
        kernel: Its name.
        rows: Its rows, numbered in units.
        *args: What goes between rows and flags.
        flags: Address of a word that it raises; 0 for none.
        what: What is read, for the message.

    Raises:
        ValueError: Something is malformed; on the CPU, once the kernel has run. A CUDA kernel
            raises ``wire.FLAG_MALFORMED`` instead, and goes on with zeros.
    """
    if target.stream is not None:
        launch(target, kernel, rows, *args, flags, unit=ternary.UNIT)
        return
    raised = ctypes.c_uint32(0)
    launch(target, kernel, rows, *args, ctypes.addressof(raised))
    if flags:
        ctypes.c_uint32.from_address(flags).value |= raised.value
    if raised.value & wire.FLAG_MALFORMED:
        raise ValueError(f"{what}: malformed")


PAYLOADS = f"payloads have a byte above {ternary.LARGEST_BYTE}, which no five trits are"
SUMS = "sums have one that is beyond ± ranks"


def scale(
    target: Target,
    x: View,
    out: View,
    scratch: View,
    clip: float,
    *,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the scaler of every segment into ``out``; ``scratch`` is for partial sums."""
    check_dtype(x, tuple(FLOATS))
    check_flags(flags, x, out)
    check_device(x, flags, scratch)
    table = check_table(segments, x.size, x.name)
    check_out(out, "float32", (len(table),), x)
    rows = ternary.rows_of(table)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    ternary.place_scalers(rows, out.address, 0)
    rows = ternary.scale_rows(rows)
    check_size(scratch, ternary.scratch_bytes(rows), "for partial sums")
    args = _C.TernaryScaleArgs(clip, scratch.address)
    launch(
        target, "ternary_scale", rows, FLOATS[x.dtype], args, address_of(flags),
        unit=ternary.SUM_SEGMENT,
    )  # fmt: skip


def pack(
    target: Target,
    x: View,
    scalers: View,
    shared: View | None,
    out: View,
    options: EncodeOptions,
    *,
    flags: View | None,
    segments: IntArray | None,
    step: View | None = None,
) -> None:
    """Writes the trits of ``x`` into the payload ``out``."""
    check_dtype(x, tuple(FLOATS))
    check_flags(flags, x, out)
    check_device(x, flags)
    table = check_table(segments, x.size, x.name)
    shared = scalers if shared is None else shared
    for view in (scalers, shared):
        _check_scalers(view, len(table), x)
    check_out(out, "uint8", (ternary.table_bytes(table),), x, scalers, shared)
    rows = ternary.rows_of(table, WARP_UNITS * ternary.UNIT)
    wire.dense_addresses(rows, wire.X, x.address, ITEMSIZE[x.dtype])
    ternary.place_scalers(rows, scalers.address, shared.address)
    check_seed(options.seed)
    check_rank(options.rank)
    known, step_at = step_of(target, options.step if step is None else step, out)
    args = _C.TernaryPackArgs(
        out.address, out.size, options.seed, options.rank << 2, known % 2**32, step_at
    )
    launch(
        target, "ternary_pack", rows, FLOATS[x.dtype], args, address_of(flags),
        unit=WARP_UNITS * ternary.UNIT,
    )  # fmt: skip


def _source(payloads: View, mean: bool) -> _C.TernarySource:
    ranks, size = payloads.shape
    return _C.TernarySource(payloads.address, size, size, ranks, ranks if mean else 1)


def sum_payloads(
    target: Target,
    payloads: View,
    n: int,
    out: View,
    *,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the sums of the ranks' trits into ``out``, bit planes of whole units."""
    ranks, _ = check_payloads(payloads)
    table = payload_table(segments, n, payloads)
    check_flags(flags, payloads, out)
    check_device(payloads, flags)
    size = ternary.table_units(table) * ternary.sum_unit_bytes(ranks)
    check_out(out, "uint8", (size,), payloads)
    rows = ternary.rows_of(table)
    launch_reading(
        target, "ternary_sum", rows, _source(payloads, False), out.address,
        flags=address_of(flags), what=PAYLOADS,
    )  # fmt: skip


def _value_rows(
    table: IntArray, scalers: View, out: View, source: View, flags: View | None
) -> IntArray:
    check_dtype(out, tuple(FLOATS))
    check_device(source, out, flags)
    check_disjoint(out, source)
    check_flags(flags, source, out)
    _check_scalers(scalers, len(table), source)
    check_disjoint(out, scalers)
    rows = ternary.rows_of(table)
    wire.dense_addresses(rows, wire.X, out.address, ITEMSIZE[out.dtype])
    ternary.place_scalers(rows, 0, scalers.address)
    return rows


def unpack(
    target: Target,
    payloads: View,
    scalers: View,
    out: View,
    *,
    mean: bool,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the sum, or the mean, of what the ranks sent into ``out``."""
    check_payloads(payloads)
    table = payload_table(segments, out.size, payloads)
    rows = _value_rows(table, scalers, out, payloads, flags)
    launch_reading(
        target, "ternary_unpack", rows, FLOATS[out.dtype], _source(payloads, mean),
        flags=address_of(flags), what=PAYLOADS,
    )  # fmt: skip


def unpack_sums(
    target: Target,
    sums: View,
    scalers: View,
    out: View,
    *,
    ranks: int,
    mean: bool,
    flags: View | None,
    segments: IntArray | None,
) -> None:
    """Writes the values of the sums of ``ranks`` ranks, or their means, into ``out``."""
    check_dtype(sums, ("uint8",))
    check_ranks(ranks)
    table = check_table(segments, out.size, "n")
    size = ternary.table_units(table) * ternary.sum_unit_bytes(ranks)
    check_size(sums, size, f"sums of {ranks} ranks for n={out.size}")
    rows = _value_rows(table, scalers, out, sums, flags)
    source = _C.TernarySource(sums.address, size, size, ranks, ranks if mean else 1)
    launch_reading(
        target, "ternary_unpack_sums", rows, FLOATS[out.dtype], source,
        flags=address_of(flags), what=SUMS,
    )  # fmt: skip
