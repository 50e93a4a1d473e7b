"""What a call on a CUDA device needs beside its codecs, so that the host waits for none of it.

Kernels of ``csrc/cuda/kernels/message.cu``. A *usage word* is int32, 1 where a parameter has a
gradient that is not all zeros, else 0; the words of a bucket are one tensor on its device.
"""

from __future__ import annotations

import numpy as np

from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels.launch import DeviceRows, LaunchTarget, cuda_kernel, launch

ROW_BYTES = 8 * wire.COLUMNS


def find_used(target: LaunchTarget, rows: IntArray, itemsize: int, used: int) -> None:
    """Sets the usage words of parameters whose gradients are not all zeros; NaN is not zero.

    Args:
        target: Where the gradients are.
        rows: int64 [k, 9]: addresses and lengths; ``WORD`` is the place of the usage word.
        itemsize: Bytes of an element.
        used: Address of the usage words, which were zero.
    """
    launch(target, "find_used", rows, itemsize, used)


def keep_used(
    target: LaunchTarget, rows: IntArray, places: IntArray, used: int, unit: int
) -> DeviceRows:
    """The rows, without residuals where a parameter is not used.

    Args:
        target: Where the kernels run.
        rows: int64 [k, 9].
        places: Place of each row's usage word.
        used: Address of the usage words.
        unit: Elements of a unit of work.
    """
    numbered = wire.number_rows(rows.copy(), unit)
    assert target.upload is not None and target.scratch is not None
    table, _owner = target.upload(np.concatenate([numbered.reshape(-1), places]))
    address, owner = target.scratch(-(-ROW_BYTES * len(rows) // 16) * 16)
    cuda_kernel(target, "keep_used")(table, len(rows), used, address, target.stream)
    work = int(numbered[-1, wire.WORDS_BEFORE]) - int(-numbered[-1, wire.N] // unit)
    return DeviceRows(address, len(rows), work, owner)


NANS = {
    "float32": (4, 0x7FC00000), "float16": (2, 0x7E00), "bfloat16": (2, 0x7FC0),
    "float64": (8, 0x7FF8 << 48),
}  # fmt: skip
"""Bytes and bits of a NaN of each type."""


def fill_nan(target: LaunchTarget, x: int, n: int, dtype: str, flags: int, words: int) -> None:
    """Overwrites elements with NaN where a flag says that something was not finite.

    Args:
        target: Where the elements are.
        x: Address of the first one.
        n: Elements.
        dtype: float32, float16, bfloat16 or float64.
        flags: Address of the flags.
        words: How many there are, int32 each.
    """
    itemsize, nan = NANS[dtype]
    cuda_kernel(target, "fill_nan")(x, n, itemsize, nan, flags, words, target.stream)
