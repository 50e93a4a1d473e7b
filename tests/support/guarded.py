"""Arrays that end, or begin, at a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def guarded_bytes(size: int, *, at_end: bool) -> Any:
    """uint8 [size] whose last byte has a forbidden page behind it, or whose first has one before.

    Behind the page lies memory of this mapping alone, so that an array that is freed takes its
    page along.
    """
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    room = np.frombuffer(memory, dtype=np.uint8)
    guard = pages * mmap.PAGESIZE if at_end else 0
    address = room.__array_interface__["data"][0] + guard
    if _libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = guard - size if at_end else mmap.PAGESIZE
    return room[begin : begin + size]


def guarded(array: Any, *, at_end: bool) -> Any:
    """A copy of an array in such memory."""
    there = guarded_bytes(array.nbytes, at_end=at_end).view(array.dtype).reshape(array.shape)
    there[...] = array
    return there
