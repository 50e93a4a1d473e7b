"""Where each lane is, and the barriers at which lanes of a warp, or of a block, wait."""

from __future__ import annotations

import numpy as np

from sass.lanes import Lanes, Mask

BLOCKED = 1 << 40  # in place of the next instruction: the lane waits, or has exited
BARRIERS = 16


class Barriers:
    """Program counters of all lanes, and who waits for whom.

    Attributes:
        pc: The next instruction of each lane.
        live: Lanes that have not exited.
        votes: What the last vote of each lane's block came to.
    """

    def __init__(self, lanes: Lanes, block: int) -> None:
        self._lanes, self._block = lanes, block
        self.pc = np.zeros(lanes.n, np.int64)
        self.live = np.ones(lanes.n, bool)
        self.votes = np.zeros(lanes.n, bool)
        self._voted = np.zeros(lanes.n, bool)
        self._members = np.zeros((BARRIERS, lanes.n), bool)
        self._waiting = np.zeros((BARRIERS, lanes.n), bool)
        self._in_warp = np.zeros(lanes.n, bool)  # waiting for the whole warp
        self._in_block = np.zeros(lanes.n, bool)
        self._resume = np.zeros(lanes.n, np.int64)

    def go(self, at: int, mask: Mask) -> None:
        """Lanes go on at an instruction."""
        if mask is None:
            self.pc[self.live] = at
        else:
            self.pc[mask] = at

    def exit(self, mask: Mask) -> None:
        """Lanes end; nobody waits for them any more."""
        gone = self.live.copy() if mask is None else mask
        self.live &= ~gone
        self.pc[gone] = BLOCKED
        for number in range(BARRIERS):
            if self._waiting[number].any():
                self._release(number)
        self._release_warps()
        self._release_blocks()

    # ----------------------------------------------------------------- of a warp

    def join(self, number: int, mask: Mask) -> None:
        """These lanes, and no others of their warps, will meet at a barrier."""
        members = self._members[number]
        if mask is None:
            members[:] = True
        else:
            members &= ~self._lanes.whole_warps(mask)
            members |= mask

    def leave(self, number: int, mask: Mask) -> None:
        """These lanes will not come."""
        self._members[number] &= False if mask is None else ~mask
        self._release(number)

    def meet(self, number: int, at: int, mask: Mask) -> int | None:
        """Waits for all members; where they are here already, what follows."""
        if mask is None:
            return at + 1
        members = self._members[number] & self.live & self._lanes.whole_warps(mask)
        if not (members & ~mask).any():
            return at + 1
        self._block_lanes(at, mask)
        self._waiting[number] |= mask
        self._release(number)
        return None

    def meet_warp(self, at: int, mask: Mask) -> int | None:
        """Waits for all lanes of the warp that have not exited."""
        if mask is None or not (self.live & self._lanes.whole_warps(mask) & ~mask).any():
            return at + 1
        self._block_lanes(at, mask)
        self._in_warp |= mask
        self._release_warps()
        return None

    def _block_lanes(self, at: int, mask: np.ndarray) -> None:
        self._resume[mask] = at + 1
        self.pc[mask] = BLOCKED

    def _release(self, number: int) -> None:
        waiting, members = self._waiting[number], self._members[number]
        missing = self._lanes.whole_warps(members & self.live & ~waiting)
        self._wake(waiting, waiting & ~missing)

    def _release_warps(self) -> None:
        missing = self._lanes.whole_warps(self.live & ~self._in_warp)
        self._wake(self._in_warp, self._in_warp & ~missing)

    def _wake(self, waiting: np.ndarray, free: np.ndarray) -> None:
        if free.any():
            self.pc[free] = self._resume[free]
            waiting &= ~free

    # ----------------------------------------------------------------- of a block

    def meet_block(self, at: int, mask: Mask, vote: np.ndarray | None) -> int | None:
        """Waits for all lanes of the block that have not exited, and votes."""
        here = self.live if mask is None else mask
        if vote is not None:
            np.copyto(self._voted, vote, where=here)
        self._block_lanes(at, here)
        self._in_block |= here
        self._release_blocks()
        return None

    def _release_blocks(self) -> None:
        if not self._in_block.any():
            return
        table = (self.live & ~self._in_block).reshape(-1, self._block)
        free = self._in_block & np.repeat(~table.any(1), self._block)
        any_vote = (self._voted & self._in_block).reshape(-1, self._block).any(1)
        np.copyto(self.votes, np.repeat(any_vote, self._block), where=free)
        self._voted &= ~free
        self._wake(self._in_block, free)
