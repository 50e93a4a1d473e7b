"""Stored values as NumPy arrays, and their comparison bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pydist.reference import signs as reference
from pydist.reference.signs import F32, Storage

Bits = npt.NDArray[Any]
"""Values as they are stored: float32, float16, or uint16 for bfloat16; uint8 for payloads."""


class DifferenceError(AssertionError):
    """Two results that should be bit-identical are not."""


# --------------------------------------------------------------------------- bits and values


def store(values: F32, storage: Storage) -> Bits:
    """The stored form of values; rounds to nearest even."""
    x = reference.round_to(values, storage)
    if storage == "bfloat16":
        return reference.bfloat16_bits(x)
    return x.astype(np.float16) if storage == "float16" else x


def widen(bits: Bits) -> F32:
    """The float32 values of stored ones; exact."""
    if bits.dtype == np.uint16:
        return reference.from_bfloat16_bits(bits)
    return bits.astype(np.float32)


def storage_of(bits: Bits) -> Storage:
    """Name of the type that an array holds."""
    names: dict[str, Storage] = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}
    return names[bits.dtype.name]


def _shown(bits: Bits) -> str:
    """One stored element, as a value and as its bytes in memory order."""
    raw = bits.tobytes().hex()
    return f"0x{raw}" if bits.dtype == np.uint8 else f"{widen(bits)[0]!s} (bytes {raw})"


def assert_same_bits(actual: Bits, expected: Bits, what: str) -> None:
    """Raises unless two arrays have the same shape, type and bits.

    Args:
        actual: What a kernel gave.
        expected: What it should have given.
        what: Kernel, backend and case, for the message.

    Raises:
        DifferenceError: The message names the first element and byte that differ and both values;
            in a payload (uint8), where an element is a bit, the element inside its rank or plane.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise DifferenceError(
            f"{what}: {actual.dtype} {list(actual.shape)} "
            f"instead of {expected.dtype} {list(expected.shape)}"
        )
    a, e = np.ascontiguousarray(actual).ravel(), np.ascontiguousarray(expected).ravel()
    wrong = np.flatnonzero(a.view(np.uint8) != e.view(np.uint8))
    if not wrong.size:
        return
    byte = int(wrong[0])
    index = byte // a.itemsize
    place = f"element {index}, byte {byte}"
    if a.dtype == np.uint8:
        row, column = divmod(byte, actual.shape[-1])
        lowest = int(a[byte] ^ e[byte])
        bit = (lowest & -lowest).bit_length() - 1
        place = f"element {8 * column + bit}, byte {column}"
        if actual.ndim > 1:
            place += f" of row {row}"
    here = slice(index, index + 1)
    raise DifferenceError(
        f"{what}: {place}: {_shown(a[here])} instead of {_shown(e[here])} "
        f"({wrong.size} of {a.nbytes} bytes differ)"
    )


def assert_same_flags(actual: int, expected: int, what: str) -> None:
    """Raises DifferenceError unless a kernel raised the flags it should."""
    if actual != expected:
        raise DifferenceError(f"{what}: flags {actual} instead of {expected}")
