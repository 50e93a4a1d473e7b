"""All-gather on two levels: encoded bytes go across nodes, then to the ranks of a node as they are.

Both stages work for one coder, that of the all-gather of all ranks on one level: it encodes this
rank's part, and decodes everyone's bytes, whichever way they came. So the result is that of one
level, bit for bit, whatever the codec.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydist.collectives.grid import ACROSS, INSIDE, Grid
from pydist.collectives.hierarchical import Flags
from pydist.encoding.coders import GatherCoder
from pydist.formats import wire
from pydist.kernels.torch_tensors import moved
from pydist.transport.coder import BareCoder, Coder, Worker
from pydist.transport.exchange import ALL_GATHER, Route


class AllGather:
    """The stages of an all-gather (:class:`pydist.collectives.grid.Stages`).

    Args:
        grid: The groups.
        coder: That of one level.
    """

    def __init__(self, grid: Grid, coder: GatherCoder) -> None:
        self._grid, self._coder = grid, coder
        self.device, self.threads = coder.result.device, coder.worker.threads
        self._kept: list[_Kept] = []

    def coder(self, stage: int, worker: Worker) -> tuple[Coder, Route | str]:
        """The coder of a stage."""
        if stage == INSIDE:
            return Flags(self.device), ALL_GATHER
        if stage == ACROSS:
            return _Across(self._coder, self._kept), ALL_GATHER
        return _Inside(self._coder, self._kept, self._grid), ALL_GATHER

    def finish(self) -> None:
        """Everything is in its place."""


@dataclass(frozen=True)
class _Kept:
    """What a chunk has brought from the ranks with this place in their nodes.

    Attributes:
        begin: Its first unit.
        end: One past its last unit.
        messages: uint8 [nodes, bytes].
    """

    begin: int
    end: int
    messages: Tensor


class _Relay(BareCoder):
    """What both stages with data share.

    Args:
        coder: The coder of one level.
        kept: What has arrived from other nodes.
    """

    def __init__(self, coder: GatherCoder, kept: list[_Kept]) -> None:
        self._coder, self._kept = coder, kept
        self.codec, self.bits, self.agreed = coder.codec, coder.bits, coder.agreed
        self.flags, self.all_flags = coder.flags, coder.all_flags
        self.units, self.unit_bytes = coder.units, coder.unit_bytes

    def message_bytes(self, units: int) -> int:
        """Bytes of so many units of a part."""
        return self._coder.message_bytes(units)

    def reduced_bytes(self, units: int) -> int:
        """Of an all-reduce alone."""
        raise NotImplementedError


class _Across(_Relay):
    """This rank's part to the ranks that have its place in other nodes."""

    def __init__(self, coder: GatherCoder, kept: list[_Kept]) -> None:
        super().__init__(coder, kept)
        self.entropy_coder = coder.entropy_coder

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """As on one level."""
        self._coder.encode(shards, units, begin, end)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Keeps what has arrived."""
        self._kept.append(_Kept(begin, end, shards.clone(memory_format=torch.contiguous_format)))

    def finish(self, flags: Tensor) -> None:
        """Keeps the flags of these ranks for those of the node."""
        merged = self._coder.job.merged(flags, wire.FLAG_MALFORMED)
        self.flags.copy_(moved(merged.amax(), self.flags.device))


class _Inside(_Relay):
    """What has arrived from other nodes to the ranks of this one.

    A unit is what one chunk has brought: chunks inside may be cut otherwise.
    """

    def __init__(self, coder: GatherCoder, kept: list[_Kept], grid: Grid) -> None:
        super().__init__(coder, kept)
        self.units, self._local = len(kept), grid.local
        self._bytes = kept[0].messages.numel() if kept else 0  # the last one may be shorter
        self.unit_bytes = max(1, self._local * self._bytes)

    def message_bytes(self, units: int) -> int:
        """Bytes of so many chunks."""
        return units * self._bytes

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Chunk after chunk."""
        rooms = shards[0].view(units, self._bytes)
        for room, kept in zip(rooms, self._kept[begin:end], strict=True):
            room[: kept.messages.numel()] = kept.messages.view(-1)
            room[kept.messages.numel() :] = 0

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Decodes every rank's bytes, node by node, as they come on one level."""
        for i, kept in enumerate(self._kept[begin:end]):
            size = kept.messages.numel()
            arrived = shards[:, i * self._bytes : i * self._bytes + size]
            places = arrived.reshape(self._local, *kept.messages.shape)
            messages = places.transpose(0, 1).flatten(0, 1).contiguous()
            self._coder.decode(messages, kept.end - kept.begin, kept.begin, kept.end)

    def finish(self, flags: Tensor) -> None:
        """Ends the call."""
        self._coder.finish(flags)
