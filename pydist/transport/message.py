"""The checksum of messages: a CRC32C in their header, checked right before they are used.

While the checksum is computed its four bytes hold the digest of the call, so a message of another
call does not pass either. ``docs/wire_format.md`` has the layout.
"""

from __future__ import annotations

from torch import Tensor

from pydist import _C


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
