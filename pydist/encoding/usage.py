"""Which parameters of a bucket have a gradient: as a device knows it, and as bits of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.rows import JOB_WORDS
from pydist.formats import wire
from pydist.kernels.device import find_used
from pydist.kernels.torch_tensors import moved, target_of

if TYPE_CHECKING:
    from pydist.encoding.bucket import BucketPlan


class Usage:
    """Which parameters of a bucket have a gradient, as its device knows it.

    Args:
        flat: The bucket's gradients, on a CUDA device.
        plan: Its layout.

    Attributes:
        memory: int32: the words of a :class:`pydist.encoding.rows.Job`, then usage words
            (:mod:`pydist.kernels.device`) of this rank, then of all ranks, once they have arrived.
        places: Place of each part's word; those that messages tell of come first.
        told: How many messages tell of.
    """

    told = 0

    def __init__(self, flat: Tensor, plan: BucketPlan) -> None:
        self._parts, self.places = len(plan.parts), plan.usage_places
        size = JOB_WORDS + 2 * self._parts
        self.memory = torch.zeros(size, dtype=torch.int32, device=flat.device)
        rows = np.zeros((self._parts, wire.COLUMNS), dtype=np.int64)
        rows[:, wire.N] = [part.numel for part in plan.parts]
        offsets = np.array([part.offset for part in plan.parts], dtype=np.int64)
        rows[:, wire.X] = flat.data_ptr() + flat.element_size() * offsets
        rows[:, wire.WORD] = self.places
        find_used(target_of(flat), rows, flat.element_size(), self.address(everyones=False))

    def address(self, *, everyones: bool) -> int:
        """Of the usage words of this rank, or of all ranks."""
        at = JOB_WORDS + (self._parts if everyones else 0)
        return self.memory.data_ptr() + self.memory.element_size() * at

    def of_parts(self, *, everyones: bool) -> Tensor:
        """Which parts are used, bool [parts], on the device."""
        begin = JOB_WORDS + (self._parts if everyones else 0)
        words = self.memory[begin : begin + self._parts]
        return words[moved(torch.from_numpy(self.places), words.device)] != 0

    def on_host(self, *, everyones: bool) -> np.ndarray:
        """The same here; waits for the device."""
        found: np.ndarray = self.of_parts(everyones=everyones).cpu().numpy()
        return found


def packed(bits: Tensor) -> Tensor:
    """Booleans as bits, the first one lowest, padded to 4 bytes."""
    size = wire.payload_bytes(bits.numel()) * 8
    padded = torch.zeros(size, dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << _places(bits.device)).sum(1, dtype=torch.uint8)


def unpacked(rows: Tensor) -> Tensor:
    """The inverse, row by row."""
    bits = (rows.unsqueeze(2) >> _places(rows.device)) & 1
    return bits.view(len(rows), -1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
