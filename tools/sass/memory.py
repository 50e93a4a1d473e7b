"""Global memory of a launch: the buffers it may touch, and what its caches would save.

Addresses are those of this process, so that launchers, tables and kernels see one memory. An access
outside the buffers that were named, or a misaligned one, is an error.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes: what memory and caches move
L1_BYTES = 200e3  # of a multiprocessor, for data
L2_BYTES = 50e6
SMS = 132
# How long a load takes, in times of one from memory.
FROM_L1, FROM_L2, FROM_MEMORY = 0.05, 0.4, 1.0


@dataclass
class Traffic:
    """Bytes that pass the memory's bus, and requests by width.

    Attributes:
        read: Sectors' bytes that are in no cache.
        written: Sectors' bytes written, each once while it is in the L2 cache.
        loads: Warp instructions by bytes a lane.
        stores: Likewise.
        loaded: Bytes that lanes have loaded.
    """

    read: int = 0
    written: int = 0
    loaded: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)


class Memory:
    """The named buffers.

    Args:
        buffers: Address and bytes of each; they may overlap.
        resident: Warps that a multiprocessor holds, which share its L1 cache.
    """

    def __init__(self, buffers: list[tuple[int, int]], resident: int) -> None:
        self._starts, self._ends = _merged(buffers)
        self._base = int(self._starts[0]) & ~(SECTOR - 1) if len(self._starts) else 0
        size = int(self._ends[-1]) - self._base if len(self._starts) else 0
        raw = (ctypes.c_uint8 * size).from_address(self._base) if size else b""
        self._bytes = np.frombuffer(raw, np.uint8)
        self._views = {
            width: self._bytes[: size // width * width].view(f"u{width}") for width in (1, 2, 4, 8)
        }
        # Sectors are numbered without what lies between buffers.
        first = self._starts // SECTOR
        counts = -(-self._ends // SECTOR) - first
        self._renumber = np.concatenate([[0], np.cumsum(counts)[:-1]]) - first
        self._seen = np.full(int(counts.sum()), -1.0)  # the warp's traffic when a sector was read
        self._dirty = np.full(int(counts.sum()), -1.0)
        self._resident = resident
        self.traffic = Traffic()
        self._own = np.zeros(0)  # bytes that each warp has moved so far

    def start(self, warps: int) -> None:
        """A new set of warps."""
        self._own = np.zeros(warps)

    # ----------------------------------------------------------------- access

    def load(self, address: np.ndarray, lanes: np.ndarray, width: int) -> tuple[np.ndarray, float]:
        """What lanes read, uint32 [lanes, width / 4] (at least one), and how long it takes."""
        place, sectors = self._checked(address, width)
        duration = self._count_load(sectors, lanes // 32, width)
        if width < 4:
            return self._views[width][place // width].astype(np.uint32)[:, None], duration
        words = (place // 4)[:, None] + np.arange(width // 4)
        return self._views[4][words], duration

    def store(self, address: np.ndarray, lanes: np.ndarray, width: int, words: np.ndarray) -> None:
        """Writes uint32 [lanes, words]; of lanes with one address the last remains."""
        place, sectors = self._checked(address, width)
        self._count_store(sectors, lanes // 32, width)
        if width < 4:
            view = self._views[width]
            view[place // width] = words[:, 0].astype(view.dtype)
        else:
            self._views[4][(place // 4)[:, None] + np.arange(width // 4)] = words

    def atomic(self, address: np.ndarray, width: int, values: np.ndarray, ufunc: np.ufunc) -> None:
        """``memory = ufunc(memory, value)``, lane by lane."""
        place, _ = self._checked(address, width)
        view = self._views[width].view(values.dtype)
        for at, value in zip(place // width, values, strict=True):  # ufunc.at may copy all of it
            view[at] = ufunc(view[at], value)

    def _checked(self, address: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        address = address.astype(np.int64)
        buffer = np.searchsorted(self._starts, address, "right") - 1
        wrong = (buffer < 0) | (address + width > self._ends[buffer]) | (address % width != 0)
        if wrong.any():
            at = int(address[wrong][0])
            raise IndexError(f"{width} bytes at {at:#x}: misaligned, or in no buffer of the launch")
        return address - self._base, address // SECTOR + self._renumber[buffer]

    # ----------------------------------------------------------------- caches

    def _count_load(self, sectors: np.ndarray, warps: np.ndarray, width: int) -> float:
        traffic = self.traffic
        warp, sector = _pairs(warps, sectors)
        traffic.loads[width] = traffic.loads.get(width, 0) + len(np.unique(warp))
        traffic.loaded += width * len(sectors)
        since = self._own[warp] - self._seen[sector]
        new = self._seen[sector] < 0
        far = new | (since * self._resident * SMS > L2_BYTES)
        near = ~far & (since * self._resident <= L1_BYTES)
        traffic.read += SECTOR * len(np.unique(sector[far]))
        np.add.at(self._own, warp, SECTOR)
        self._seen[sector] = self._own[warp]
        if far.any():
            return FROM_MEMORY
        return FROM_L1 if near.all() else FROM_L2

    def _count_store(self, sectors: np.ndarray, warps: np.ndarray, width: int) -> None:
        traffic = self.traffic
        warp, sector = _pairs(warps, sectors)
        traffic.stores[width] = traffic.stores.get(width, 0) + len(np.unique(warp))
        since = self._own[warp] - self._dirty[sector]
        far = (self._dirty[sector] < 0) | (since * self._resident * SMS > L2_BYTES)
        traffic.written += SECTOR * len(np.unique(sector[far]))
        np.add.at(self._own, warp, SECTOR)
        self._dirty[sector] = self._own[warp]
        self._seen[sector] = self._own[warp]  # it is in the L2 cache now


def _pairs(warps: np.ndarray, sectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sector once for each warp that touches it."""
    both = np.unique(warps.astype(np.int64) << 40 | sectors)
    return both >> 40, both & ((1 << 40) - 1)


def _merged(buffers: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, ascending, buffers that share memory as one."""
    merged: list[list[int]] = []
    for start, size in sorted(buffers):
        if size and merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], start + size)
        elif size:
            merged.append([start, start + size])
    both = np.array(merged, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
