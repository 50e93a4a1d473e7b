"""What messages have around their payloads: headers on a device, checksums in host memory.

A checksum is a CRC32C in the header, checked right before a message is used. While it is computed
its four bytes hold the digest of the call, so a message of another call does not pass either.
``docs/wire_format.md`` has the layout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydist import _C
from pydist.formats import wire


def crc32c(data: Tensor, before: int = 0) -> int:
    """The CRC32C of contiguous bytes in host memory, behind bytes whose CRC32C is ``before``."""
    return int(_C.cpu.crc32c(data.data_ptr(), data.numel(), before))


def seal(rows: Tensor) -> None:
    """Puts checksums into messages.

    Args:
        rows: uint8 [messages, bytes] in host memory; each begins with a header that holds the
            digest of the call.
    """
    count, size = rows.shape
    _C.cpu.seal_messages(rows.data_ptr(), count, rows.stride(0), size)


def first_damaged(rows: Tensor, digest: int) -> int | None:
    """The first message whose checksum is wrong, as one of a call with this digest.

    Args:
        rows: uint8 [messages, bytes] in host memory, as :func:`seal` left them.
        digest: The digest of the call.
    """
    count, size = rows.shape
    found = _C.cpu.first_damaged(rows.data_ptr(), count, rows.stride(0), size, digest)
    return None if found == count else int(found)


# --------------------------------------------------------------------------- on a device


class DeviceHeader:
    """The header of a call's messages that are on a CUDA device; the host waits for nothing.

    Args:
        header: The 16 bytes, flags apart.
        flags: int32[1] on the device, the flags of all ranks, which :meth:`merge` raises.
    """

    def __init__(self, header: bytes, flags: Tensor) -> None:
        self._low, self._high = np.frombuffer(header, dtype="<u8").tolist()
        self.flags = flags

    def put(self, messages: Tensor, flags: Tensor, used: int = 0, parts: int = 0) -> None:
        """Writes headers, flags and usage bits.

        Args:
            messages: uint8 [messages, bytes].
            flags: int32[1] on the device.
            used: Address of usage words (:mod:`pydist.kernels.device`); 0 without.
            parts: How many there are.
        """
        _C.cuda.put_headers(
            messages.data_ptr(), len(messages), messages.stride(0), self._low, self._high,
            flags.data_ptr(), used, parts, wire.payload_bytes(parts), _stream(messages),
        )  # fmt: skip

    def merge(self, messages: Tensor, used: int = 0, parts: int = 0) -> None:
        """Ors the flags and usage bits of all messages; a header that differs is malformed.

        Args:
            messages: uint8 [messages, bytes].
            used: Address of usage words, which are overwritten; 0 without.
            parts: How many there are.
        """
        _C.cuda.merge_headers(
            messages.data_ptr(), len(messages), messages.stride(0), self._low, self._high,
            self.flags.data_ptr(), used, parts, _stream(messages),
        )  # fmt: skip


def _stream(near: Tensor) -> int:
    return int(torch.cuda.current_stream(near.device).cuda_stream)
