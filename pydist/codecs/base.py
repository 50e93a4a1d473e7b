"""What the road of a collective asks of a codec."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Coder(Protocol):
    """One call's data on its way through a codec: local bytes, their reduction, the result.

    Positions are payload words of the local bytes; a shard is a range of words. Shards and chunks
    start on multiples of ``block_words``, so that every range can be coded on its own.

    Attributes:
        codec: Number of the codec in a header (``wire.CODECS``).
        bits: Bits an element of the reduced message, for the header.
        words: Payload words of the whole call.
        block_words: Words that must stay together.
        repeatable: Encoding changes nothing but buffers of its own, so it may be done in vain.
    """

    codec: int
    bits: int
    words: int
    block_words: int
    repeatable: bool

    def reduced_bytes(self, words: int) -> int:
        """Bytes of the reduced form of ``words`` payload words."""
        ...

    def extra(self) -> Tensor | None:
        """Bytes that travel once a call from every rank to every rank (uint8, multiple of 4)."""
        ...

    def merge_extra(self, extras: Tensor) -> None:
        """Takes the extra bytes of all ranks, uint8 [ranks, bytes]."""
        ...

    def encode(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """This rank's bytes of words ``begin`` … ``end``, and int32[1] of the flags so far."""
        ...

    def reduce(self, messages: Tensor, offset: int, begin: int, end: int) -> Tensor:
        """Combines all ranks' bytes of a shard.

        Args:
            messages: uint8 [ranks, bytes]; a rank's shard starts at byte ``offset`` of its row.
            offset: Bytes before the shard in each row.
            begin: First word of the shard.
            end: One past its last word; may lie past the data, where the bytes are padding.

        Returns:
            uint8 of ``reduced_bytes(end - begin)``, on the messages' device.
        """
        ...

    def decode(self, shards: Tensor, begin: int, end: int) -> None:
        """Takes the result of words ``begin`` … ``end``.

        Args:
            shards: uint8 [owners, bytes]: the reduced shards, equally long and in order; the last
                ones may reach past ``end``.
            begin: First word of the first shard.
            end: One past the last word of the data.
        """
        ...

    def finish(self, flags: Tensor) -> None:
        """Ends the call: everything is decoded; int32[1] ``flags`` are those of all ranks."""
        ...
