"""A call's kernels beside the caller's, on a CUDA device: one more stream of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class SideStream:
    """Runs a call's kernels on a stream, after what the caller had enqueued.

    All calls of a communicator share one stream for each device: the caching allocator keeps free
    memory by stream, and what is enqueued there is in order without events.

    Args:
        stream: The stream; ``None`` for data on the CPU, where nothing is enqueued.

    Attributes:
        done: Recorded after the last kernel so far; ``None`` on the CPU.
        last: The last copy from or to host memory; ``None``: there was none.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self.done: torch.cuda.Event | None = None
        self.last: torch.cuda.Event | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            self.done = torch.cuda.Event()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it, what is enqueued goes to this stream."""
        if self._stream is None or self.done is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self.done.record(self._stream)

    def to_host(self, host: Tensor, device: Tensor) -> None:
        """Copies into pinned memory, and waits for it; in a thread of pydist's own."""
        host.copy_(device, non_blocking=True)
        self._copied().synchronize()

    def to_device(self, x: Tensor) -> Tensor:
        """A tensor where the data is; pinned memory is free once :attr:`last` is complete."""
        if self._stream is None or x.is_cuda:
            return x
        moved = x.to(self._stream.device, non_blocking=True)
        self._copied()
        return moved

    def _copied(self) -> torch.cuda.Event:
        self.last = torch.cuda.Event()
        self.last.record(self._stream)
        return self.last
