"""Memory for messages in host memory: taken, given back, taken again."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

IDLE_BYTES = 8 * 1024 * 1024
"""Buffers kept for later calls, in bytes; what comes back beyond that is let go."""


class BufferPool:
    """Byte buffers of one communicator.

    A buffer that came back serves any request it is large enough for, so that chunk after chunk and
    call after call travel through the same few pages. One that is never given back (its
    call failed) is freed with the last tensor that uses it. May be used by several threads.

    Args:
        pinned: The memory is pinned, for copies from and to CUDA devices that the host does not
            wait for.

    Attributes:
        idle: Bytes of those that wait here.
        peak: The most that both have been together since :meth:`clear`.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self.idle = self.peak = 0
        self._lock = threading.Lock()
        # By address. One that is freed leaves by itself: its address may come up again elsewhere.
        self._out: weakref.WeakValueDictionary[int, torch.UntypedStorage] = (
            weakref.WeakValueDictionary()
        )
        self._idle: list[tuple[Tensor, torch.cuda.Event | None]] = []  # by size

    @property
    def in_use(self) -> int:
        """Bytes of the buffers that are out."""
        with self._lock:
            return self._out_bytes()

    def _out_bytes(self) -> int:
        # With the lock: a weak dictionary drops dead entries as it is read, under other readers.
        return sum(storage.nbytes() for storage in list(self._out.values()))

    def take(self, rows: int, columns: int) -> Tensor:
        """An uninitialised uint8 [rows, columns]."""
        size = rows * columns
        with self._lock:
            place = next((i for i, idle in enumerate(self._idle) if _serves(*idle, size)), None)
            if place is None:  # the largest is too small: it makes room for a new one
                if self._idle:
                    self.idle -= self._idle.pop()[0].numel()
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
                self.peak = max(self.peak, self._out_bytes() + self.idle + size)
            else:
                buffer = self._idle.pop(place)[0]
                self.idle -= buffer.numel()
            self._out[buffer.data_ptr()] = buffer.untyped_storage()
        return buffer[:size].view(rows, columns)

    def give(self, taken: Tensor, after: torch.cuda.Event | None = None) -> None:
        """Takes a buffer back. Other tensors are ignored.

        Args:
            taken: The buffer; nothing on the host may read or write it any more.
            after: What a device has to have done before the buffer is used again.
        """
        with self._lock:
            storage = self._out.get(taken.data_ptr())
            if storage is None or storage is not taken.untyped_storage():
                return
            del self._out[taken.data_ptr()]
            size = storage.nbytes()
            if self.idle + size <= IDLE_BYTES:
                self.idle += size
                buffer = taken.new_empty(0).set_(storage)
                place = sum(idle.numel() < size for idle, _ in self._idle)
                self._idle.insert(place, (buffer, after))

    def clear(self) -> None:
        """Lets go of what waits here, and forgets the peak."""
        with self._lock:
            self._idle.clear()
            self.idle, self.peak = 0, self._out_bytes()


def _serves(buffer: Tensor, after: torch.cuda.Event | None, size: int) -> bool:
    return buffer.numel() >= size and (after is None or after.query())
