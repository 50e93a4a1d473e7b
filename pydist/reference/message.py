"""The checksum of messages, bit by bit.

Castagnoli, Braeuer, Herrmann: Optimization of cyclic redundancy-check codes with 24 and 32 parity
bits. IEEE Transactions on Communications 41 (6), 1993; in the form that RFC 3720 (iSCSI) uses.
"""

from __future__ import annotations

from pydist.formats import wire

POLYNOMIAL = 0x82F63B78  # bit 31 - i is the coefficient of x^i; that of x^32 is left out


def crc32c(data: bytes, before: int = 0) -> int:
    """The CRC32C of bytes that stand behind others whose CRC32C is ``before`` (0: none)."""
    crc = before ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def seal(message: bytes) -> bytes:
    """The message with its checksum.

    Args:
        message: A header whose digest is that of the call, and what follows it.
    """
    checksum = crc32c(message).to_bytes(4, "little")
    return message[: wire.CHECKSUM_AT] + checksum + message[wire.CHECKSUM_AT + 4 :]


def is_intact(message: bytes, digest: int) -> bool:
    """Whether a message is one of the call with this digest, as :func:`seal` left it."""
    field = digest.to_bytes(4, "little")
    return seal(message[: wire.CHECKSUM_AT] + field + message[wire.CHECKSUM_AT + 4 :]) == message
