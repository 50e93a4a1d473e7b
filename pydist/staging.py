"""Memory for messages in host memory: taken, given back, taken again."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

IDLE_BYTES = 8 * 1024 * 1024
"""Buffers kept for later calls, in bytes; what comes back beyond that is let go."""


class Staging:
    """Byte buffers of one communicator.

    A buffer that came back serves any request it is large enough for, so that chunk after chunk and
    call after call travel through the same few pages. One that is never given back (its
    call failed) is freed with the last tensor that uses it. May be used by several threads.

    Attributes:
        in_use: Bytes of the buffers that are out.
        idle: Bytes of those that wait here.
        peak: The most that both have been together since :meth:`clear`.
    """

    def __init__(self) -> None:
        self.in_use = self.idle = self.peak = 0
        self._lock = threading.Lock()
        self._out: dict[int, int] = {}  # size at each address
        self._idle: list[Tensor] = []  # by size

    def take(self, rows: int, columns: int) -> Tensor:
        """An uninitialised uint8 [rows, columns]."""
        size = rows * columns
        with self._lock:
            place = next((i for i, b in enumerate(self._idle) if b.numel() >= size), None)
            if place is None:  # the largest is too small: it makes room for a new one
                if self._idle:
                    self.idle -= self._idle.pop().numel()
                buffer = torch.empty(size, dtype=torch.uint8)
            else:
                buffer = self._idle.pop(place)
                self.idle -= buffer.numel()
            # What was never given back was freed, and its address may come up again.
            self.in_use += buffer.numel() - self._out.get(buffer.data_ptr(), 0)
            self._out[buffer.data_ptr()] = buffer.numel()
            self.peak = max(self.peak, self.in_use + self.idle)
        return buffer[:size].view(rows, columns)

    def give(self, taken: Tensor) -> None:
        """Takes a buffer back; nothing may read or write it any more. Others are let be."""
        with self._lock:
            size = self._out.pop(taken.data_ptr(), None)
            if size is None:
                return
            self.in_use -= size
            if self.idle + size <= IDLE_BYTES:
                self.idle += size
                buffer = taken.new_empty(0).set_(taken.untyped_storage())
                self._idle.insert(sum(b.numel() < size for b in self._idle), buffer)

    def clear(self) -> None:
        """Lets go of what waits here, and forgets the peak."""
        with self._lock:
            self._idle.clear()
            self.idle, self.peak = 0, self.in_use
